// max(x + bias, 0): what follows the first product of a feed-forward block where that product is not
// `tiled_linear`, which does it itself.
//
// A thread has one 16-byte pack of columns: it keeps their bias and goes down the tokens.
#include "../include/numeric.h"

namespace megachat {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxRows = 1024;  // of blocks; more tokens are several for each

template <typename T>
struct BiasReluArguments {
  const T* x;     // [tokens, width]
  const T* bias;  // [width]
  T* out;         // [tokens, width], may be `x`
  int tokens, width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) bias_relu_kernel(const BiasReluArguments<T> a) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kPack<T>;
  if (column >= a.width) return;
  float bias[kPack<T>];
  load_pack(a.bias + column, bias);
  for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    const size_t place = static_cast<size_t>(token) * a.width + column;
    float values[kPack<T>];
    load_pack(a.x + place, values);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] = relu(values[i] + bias[i]);
    store_pack(a.out + place, values);
  }
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format; all tensors have it and are contiguous, aligned to 16 bytes, with
// rows of whole 16-byte packs. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_bias_relu(int format, const void* x, const void* bias, void* out,
                                       int tokens, int width, void* stream) {
  using namespace megachat;
  if (tokens < 0 || width <= 0) return cudaErrorInvalidValue;
  for (const void* pointer : {x, bias, static_cast<const void*>(out)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  return dispatch_format(format, [=](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    if (width % kPack<T> != 0) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    const BiasReluArguments<T> arguments{static_cast<const T*>(x), static_cast<const T*>(bias),
                                         static_cast<T*>(out), tokens, width};
    const int columns = (width / kPack<T> + kThreads - 1) / kThreads;
    MEGACHAT_LAUNCH(bias_relu_kernel<T>, dim3(columns, min(tokens, kMaxRows)), dim3(kThreads), 0,
                    static_cast<cudaStream_t>(stream), arguments);
    return cudaGetLastError();
  });
}
