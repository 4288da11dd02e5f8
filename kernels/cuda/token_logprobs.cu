// Log-probability and entropy of given tokens from a slice of the vocabulary's logits: one read of
// the logits forward, one read and one write backward, nothing of their size in fp32.
//
// Forward leaves four fp32 numbers a token, from which the slices of a tensor group are put
// together. With x = logit / temperature over this slice:
//
//   maximum = max x;  sum = sum exp(x - maximum);  weighted = sum exp(x - maximum) (x - maximum)
//   target = x of the target token, 0 where it belongs to another slice
//
// and over slices, M the largest maximum: logsumexp = M + log sum_i exp(maximum_i - M) sum_i, and
// so on. Backward is closed: with log p = x - logsumexp,
//
//   d logit_k = ([k = target] g - p_k (g + h (log p_k + entropy))) / temperature
//
// for the gradients g of the log-probability and h of the entropy. One block a token.
#include "../include/numeric.h"
#include "../include/reduce.h"

namespace megachat {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLowest = -3.402823466e38f;
// The lowest shifted logit that is kept apart: exp of it is 0, and it times 0 is 0, where the -inf
// of a padded column times 0 would be NaN.
constexpr float kNegligible = -1e4f;

// The value, if it is not negligible; fmaxf would hide a NaN.
__device__ __forceinline__ float keep_apart(float shifted) {
  return shifted < kNegligible ? kNegligible : shifted;
}

// The statistics of some columns of a row.
struct Statistics {
  float maximum = kLowest, sum = 0.0f, weighted = 0.0f;

  // Expresses the sums relative to a larger maximum.
  __device__ __forceinline__ void raise(float to) {
    const float step = keep_apart(maximum - to);
    const float factor = expf(step);
    weighted = factor * (weighted + step * sum);
    sum *= factor;
    maximum = to;
  }
  __device__ __forceinline__ void merge(Statistics other) {
    const float largest = fmaxf(maximum, other.maximum);
    raise(largest);
    other.raise(largest);
    sum += other.sum;
    weighted += other.weighted;
  }
};

template <typename T>
struct ForwardArguments {
  const T* logits;         // [tokens, width]
  const int64_t* targets;  // [tokens], of the whole vocabulary
  float* statistics;       // [4, tokens]: maximum, sum, weighted, target
  int tokens, width;
  int vocab_start;  // of this slice
  float inverse_temperature;
};

template <typename T>
__device__ __forceinline__ void take_in(Statistics& state, float (&x)[kPack<T>]) {
  float largest = state.maximum;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) largest = fmaxf(largest, x[i]);
  state.raise(largest);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    const float shifted = keep_apart(x[i] - largest);
    const float weight = expf(shifted);
    state.sum += weight;
    state.weighted += weight * shifted;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) token_statistics_kernel(const ForwardArguments<T> a) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  Statistics* const of_warps = reinterpret_cast<Statistics*>(shared);
  const int token = blockIdx.x;
  const T* const row = a.logits + static_cast<size_t>(token) * a.width;

  Statistics state;
  for (int column = threadIdx.x * kPack<T>; column < a.width; column += kThreads * kPack<T>) {
    float x[kPack<T>];
    load_pack(row + column, x);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] *= a.inverse_temperature;
    take_in<T>(state, x);
  }
#pragma unroll
  for (int bit = kWarpSize / 2; bit > 0; bit /= 2) {
    Statistics other;
    other.maximum = __shfl_xor_sync(kWholeWarp, state.maximum, bit, kWarpSize);
    other.sum = __shfl_xor_sync(kWholeWarp, state.sum, bit, kWarpSize);
    other.weighted = __shfl_xor_sync(kWholeWarp, state.weighted, bit, kWarpSize);
    state.merge(other);
  }
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;

  for (int warp = 1; warp < kWarps; ++warp) state.merge(of_warps[warp]);
  const int64_t target = a.targets[token] - a.vocab_start;
  const bool is_here = target >= 0 && target < a.width;
  a.statistics[token] = state.maximum;
  a.statistics[a.tokens + token] = state.sum;
  a.statistics[2 * a.tokens + token] = state.weighted;
  a.statistics[3 * a.tokens + token] =
      is_here ? to_float(row[target]) * a.inverse_temperature : 0.0f;
}

template <typename T>
struct BackwardArguments {
  const T* logits;             // [tokens, width]
  const int64_t* targets;      // [tokens]
  const float* logsumexp;      // [tokens], over all slices
  const float* entropy;        // [tokens], over all slices
  const float* grad_logprobs;  // [tokens], or null for 0
  const float* grad_entropy;   // [tokens], or null for 0
  T* gradient;                 // [tokens, width], may be `logits`
  int width;
  int vocab_start;
  float inverse_temperature;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_backward_kernel(const BackwardArguments<T> a) {
  const int token = blockIdx.x;
  const size_t row = static_cast<size_t>(token) * a.width;
  const float logsumexp = a.logsumexp[token], entropy = a.entropy[token];
  const float of_logprob = a.grad_logprobs != nullptr ? a.grad_logprobs[token] : 0.0f;
  const float of_entropy = a.grad_entropy != nullptr ? a.grad_entropy[token] : 0.0f;
  const int64_t target = a.targets[token] - a.vocab_start;
  for (int column = threadIdx.x * kPack<T>; column < a.width; column += kThreads * kPack<T>) {
    float x[kPack<T>];
    load_pack(a.logits + row + column, x);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const float log_p = keep_apart(x[i] * a.inverse_temperature - logsumexp);
      const float slope = of_logprob + of_entropy * (log_p + entropy);
      const float at_target = column + i == target ? of_logprob : 0.0f;
      x[i] = (at_target - expf(log_p) * slope) * a.inverse_temperature;
    }
    store_pack(a.gradient + row + column, x);
  }
}

template <typename T>
bool valid_shape(int tokens, int width, float temperature) {
  return tokens >= 0 && width > 0 && width % kPack<T> == 0 && temperature > 0.0f;
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format, that of the logits, which are contiguous and aligned to 16 bytes,
// as is each row. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_token_logprobs_forward(int format, const void* logits,
                                                    const int64_t* targets, float* statistics,
                                                    int tokens, int width, int vocab_start,
                                                    float temperature, void* stream) {
  using namespace megachat;
  if (!is_aligned(logits)) return cudaErrorInvalidValue;
  return dispatch_format(format, [=](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!valid_shape<T>(tokens, width, temperature)) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    const ForwardArguments<T> arguments{static_cast<const T*>(logits),
                                        targets,
                                        statistics,
                                        tokens,
                                        width,
                                        vocab_start,
                                        1.0f / temperature};
    MEGACHAT_LAUNCH((token_statistics_kernel<T>), dim3(tokens), dim3(kThreads),
                    kWarps * sizeof(Statistics), static_cast<cudaStream_t>(stream), arguments);
    return cudaGetLastError();
  });
}

// As above; `logsumexp` and `entropy` are those of the whole vocabulary, and a gradient that is
// null is 0.
MEGACHAT_EXPORT int megachat_token_logprobs_backward(
    int format, const void* logits, const int64_t* targets, const float* logsumexp,
    const float* entropy, const float* grad_logprobs, const float* grad_entropy, void* gradient,
    int tokens, int width, int vocab_start, float temperature, void* stream) {
  using namespace megachat;
  if (!is_aligned(logits) || !is_aligned(gradient)) return cudaErrorInvalidValue;
  return dispatch_format(format, [=](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!valid_shape<T>(tokens, width, temperature)) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    const BackwardArguments<T> arguments{static_cast<const T*>(logits),
                                         targets,
                                         logsumexp,
                                         entropy,
                                         grad_logprobs,
                                         grad_entropy,
                                         static_cast<T*>(gradient),
                                         width,
                                         vocab_start,
                                         1.0f / temperature};
    MEGACHAT_LAUNCH((token_logprobs_backward_kernel<T>), dim3(tokens), dim3(kThreads), 0,
                    static_cast<cudaStream_t>(stream), arguments);
    return cudaGetLastError();
  });
}
