// Projection bias, residual and LayerNorm in one pass over the tokens.
//
//   pre-LN:  stream = x + bias + residual;  normalised = LayerNorm(stream), of the rounded stream
//   post-LN: normalised = LayerNorm(x + bias + residual)
//
// One block a token. A thread keeps its 16-byte packs of the sum in registers, so everything is
// read and written once, and the variance is that of the differences from the mean.
#include "../include/numeric.h"
#include "../include/reduce.h"

namespace megachat {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kComfortableThreads = 256;  // more packs a thread before more threads than this
constexpr int kMaxPacks = 4;

template <typename T>
struct LayerNormArguments {
  const T* x;         // [tokens, hidden], the product without its bias
  const T* bias;      // [hidden]
  const T* residual;  // [tokens, hidden]
  const T* gamma;     // [hidden]
  const T* beta;      // [hidden]
  T* stream;          // [tokens, hidden], may be `residual` or `x`; null for post-LN
  T* normalised;      // [tokens, hidden], may be `x`, and `residual` for post-LN
  int hidden;
  float epsilon;
};

template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads)
    bias_residual_layer_norm_kernel(const LayerNormArguments<T> a) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  float* const sum_scratch = reinterpret_cast<float*>(shared);
  float* const square_scratch = sum_scratch + kWarpSize;
  const size_t row = static_cast<size_t>(blockIdx.x) * a.hidden;

  float values[kPacks][kPack<T>];
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * blockDim.x + threadIdx.x) * kPack<T>;
    if (column >= a.hidden) continue;
    float bias[kPack<T>], residual[kPack<T>];
    load_pack(a.x + row + column, values[p]);
    load_pack(a.bias + column, bias);
    load_pack(a.residual + row + column, residual);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[p][i] += bias[i] + residual[i];
    if (a.stream != nullptr) {
      store_pack(a.stream + row + column, values[p]);
      round_pack<T>(values[p]);
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) sum += values[p][i];
  }
  const float mean = block_sum(sum, sum_scratch) / a.hidden;

  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * blockDim.x + threadIdx.x) * kPack<T>;
    if (column >= a.hidden) continue;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      values[p][i] -= mean;
      squares += values[p][i] * values[p][i];
    }
  }
  const float scale = rsqrtf(block_sum(squares, square_scratch) / a.hidden + a.epsilon);

#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * blockDim.x + threadIdx.x) * kPack<T>;
    if (column >= a.hidden) continue;
    float gamma[kPack<T>], beta[kPack<T>];
    load_pack(a.gamma + column, gamma);
    load_pack(a.beta + column, beta);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[p][i] = values[p][i] * scale * gamma[i] + beta[i];
    store_pack(a.normalised + row + column, values[p]);
  }
}

template <typename T, int kPacks>
int launch_packs(const LayerNormArguments<T>& arguments, int tokens, cudaStream_t stream) {
  const int lanes = (arguments.hidden / kPack<T> + kPacks - 1) / kPacks;
  const int threads = (lanes + kWarpSize - 1) / kWarpSize * kWarpSize;
  if (threads > kMaxThreads) return cudaErrorInvalidValue;
  MEGACHAT_LAUNCH((bias_residual_layer_norm_kernel<T, kPacks>), dim3(tokens), dim3(threads),
                  2 * kWarpSize * sizeof(float), stream, arguments);
  return cudaGetLastError();
}

template <typename T>
int launch(const LayerNormArguments<T>& arguments, int tokens, cudaStream_t stream) {
  if (arguments.hidden <= 0 || arguments.hidden % kPack<T> != 0) return cudaErrorInvalidValue;
  const int packs = arguments.hidden / kPack<T>;
  if (packs <= kComfortableThreads) return launch_packs<T, 1>(arguments, tokens, stream);
  if (packs <= 2 * kComfortableThreads) return launch_packs<T, 2>(arguments, tokens, stream);
  return launch_packs<T, kMaxPacks>(arguments, tokens, stream);
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format; all tensors have it and are contiguous, aligned to 16 bytes.
// `stream_out` null asks for the post-LN order. Returns a cudaError_t; 16384 fp32 or 32768 16-bit
// columns are the most.
MEGACHAT_EXPORT int megachat_bias_residual_layer_norm(int format, const void* x, const void* bias,
                                                      const void* residual, const void* gamma,
                                                      const void* beta, void* stream_out,
                                                      void* normalised, int tokens, int hidden,
                                                      float epsilon, void* stream) {
  using namespace megachat;
  if (tokens < 0) return cudaErrorInvalidValue;
  for (const void* pointer : {x, bias, residual, gamma, beta, static_cast<const void*>(stream_out),
                              static_cast<const void*>(normalised)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  if (tokens == 0) return cudaSuccess;
  return dispatch_format(format, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LayerNormArguments<T> arguments{static_cast<const T*>(x),
                                          static_cast<const T*>(bias),
                                          static_cast<const T*>(residual),
                                          static_cast<const T*>(gamma),
                                          static_cast<const T*>(beta),
                                          static_cast<T*>(stream_out),
                                          static_cast<T*>(normalised),
                                          hidden,
                                          epsilon};
    return launch<T>(arguments, tokens, static_cast<cudaStream_t>(stream));
  });
}
