// Products of few tokens with a weight that lies in tiles along its input dimension:
//
//   out[t][o] = sum over tiles i and columns k of x[t][i width + k] weight[i][o][k]
//
// and, on request, plus a bias and through a ReLU, rounded once. A decode step is bound by reading
// the weight, so the weight has the tensor cores' long side, 16 rows an instruction, and the tokens
// the short one, 8. A block takes 64 rows, 8 to 64 tokens, and one of `splits` equal spans of the
// columns, which stream through a ring of stages in shared memory, several of them on their way.
// Splits are added up by a second kernel in their order: the same input gives the same bits.
//
// fp32 has no tensor cores that are exact; its sums are spread over lanes in the same way.
#include "../include/async_copy.h"
#include "../include/tensor_core.h"

namespace megachat {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;  // of the weight
constexpr int kRows = kWarps * kWarpRows;
constexpr int kChunks = 8;                // 16-byte chunks in a row of a stage, all banks
constexpr int kRowBytes = 16 * kChunks;
constexpr int kSumStride = kRows + 4;     // floats between tokens: keeps lanes in different banks
constexpr int kMaxTokens = 64;            // of a block
constexpr int kMaxSplits = 32;
constexpr int kMinStepsPerSplit = 8;
constexpr int kMaxOutputs = 65535 * kRows;  // as a grid allows

// Columns of a stage: 64 or 32.
template <typename T>
constexpr int kDepth = kChunks * kPack<T>;

// As many as 48 KiB hold, up to four.
template <int kTokens>
constexpr int kStages = kTokens <= 32 ? 4 : 3;

template <typename T>
struct LinearArguments {
  const T* x;       // [tokens, tiles * width]
  const T* weight;  // [tiles, outputs, width], with the strides below
  const T* bias;    // [outputs], or null
  T* out;           // [tokens, outputs]
  float* partial;   // [splits, tokens, outputs], with splits > 1
  int64_t tile_stride, row_stride;  // in elements
  int tokens, tiles, outputs, width, splits;
  bool relu;
};

// Where a chunk of a row lies in a stage, in bytes. Eight rows in a row have a given chunk in eight
// different places, and so in different banks.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kRowBytes + (chunk ^ row % kChunks) * 16;
}

// Starts copying columns of a tile; zeros stand for what is outside of the tile or of the tensors.
template <typename T, int kTokens>
__device__ __forceinline__ void copy_stage(const LinearArguments<T>& a, int tile, int column,
                                           unsigned char* stage) {
  constexpr int kRowsAtOnce = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  column += chunk * kPack<T>;
  const bool inside = column < a.width;
  const T* const weight = a.weight + tile * a.tile_stride + column;
#pragma unroll
  for (int row = first; row < kRows; row += kRowsAtOnce) {
    const int output = blockIdx.y * kRows + row;
    copy_async(stage + place_of(row, chunk), weight + output * a.row_stride,
               inside && output < a.outputs);
  }
  const T* const x = a.x + static_cast<int64_t>(tile) * a.width + column;
  const int64_t stride = static_cast<int64_t>(a.tiles) * a.width;
#pragma unroll
  for (int row = first; row < kTokens; row += kRowsAtOnce) {
    const int token = blockIdx.x * kTokens + row;
    copy_async(stage + place_of(kRows + row, chunk), x + token * stride,
               inside && token < a.tokens);
  }
}

// Adds the products of a stage to the sums of a warp's 16 rows, which lie as `d` of tensor_core.h:
// one such tile for every eight tokens.
template <typename T, int kTokens>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage,
                                               float (&sums)[kTokens / 8][4]) {
  const int lane = threadIdx.x % kWarpSize, first_row = threadIdx.x / kWarpSize * kWarpRows;
  if constexpr (std::is_same_v<T, float>) {
    const int group = lane / 4, place = lane % 4;
#pragma unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float rows[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + group + 8 * i;
        load_pack(reinterpret_cast<const float*>(stage + place_of(row, chunk)), rows[i]);
      }
#pragma unroll
      for (int octet = 0; octet < kTokens / 8; ++octet) {
        float tokens[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = kRows + 8 * octet + 2 * place + i;
          load_pack(reinterpret_cast<const float*>(stage + place_of(row, chunk)), tokens[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[octet][i] += rows[i / 2][k] * tokens[i % 2][k];
        }
      }
    }
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      unsigned rows[4];
      load_matrices(rows, stage + place_of(first_row + lane % 16, chunk + lane / 16));
      if constexpr (kTokens == 8) {
        unsigned tokens[2];
        load_matrices(tokens, stage + place_of(kRows + lane % 8, chunk + lane / 8 % 2));
        multiply_add<T>(sums[0], rows, tokens);
      } else {
#pragma unroll
        for (int octet = 0; octet < kTokens / 8; octet += 2) {
          unsigned tokens[4];  // of two octets, two registers each
          const int row = kRows + 8 * (octet + lane / 16) + lane % 8;
          load_matrices(tokens, stage + place_of(row, chunk + lane / 8 % 2));
          multiply_add<T>(sums[octet], rows, {tokens[0], tokens[1]});
          multiply_add<T>(sums[octet + 1], rows, {tokens[2], tokens[3]});
        }
      }
    }
  }
}

// Packs of fp32, as many as make up one of T.
template <typename T>
__device__ __forceinline__ void load_sums(const float* from, float (&to)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; i += 4) {
    float pack[4];
    load_pack(from + i, pack);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[i + k] = pack[k];
  }
}

template <typename T>
__device__ __forceinline__ void store_sums(float* to, const float (&from)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; i += 4) {
    const float pack[4] = {from[i], from[i + 1], from[i + 2], from[i + 3]};
    store_pack(to + i, pack);
  }
}

// Bias, ReLU and rounding of one pack of a token.
template <typename T>
__device__ __forceinline__ void finish(const LinearArguments<T>& a, int token, int output,
                                       float (&values)[kPack<T>]) {
  if (a.bias != nullptr) {
    float bias[kPack<T>];
    load_pack(a.bias + output, bias);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] += bias[i];
  }
  if (a.relu) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] = relu(values[i]);
  }
  store_pack(a.out + static_cast<size_t>(token) * a.outputs + output, values);
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads) tiled_linear_kernel(const LinearArguments<T> a) {
  constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  constexpr int kAhead = kStages<kTokens> - 1;
  MEGACHAT_DYNAMIC_SHARED(shared);

  const int steps_of_tile = (a.width + kDepth<T> - 1) / kDepth<T>;
  const int steps = a.tiles * steps_of_tile;
  const int span = (steps + a.splits - 1) / a.splits;
  const int begin = min(static_cast<int>(blockIdx.z) * span, steps);
  const int end = min(begin + span, steps);
  int tile = begin / steps_of_tile, column = begin % steps_of_tile * kDepth<T>;  // of the next copy
  const auto copy_step = [&](int step) {
    if (step < end) {
      copy_stage<T, kTokens>(a, tile, column, shared + step % kStages<kTokens> * kStageBytes);
      column += kDepth<T>;
      if (column >= a.width) {
        column = 0;
        ++tile;
      }
    }
    commit_copies();  // a group for every step, if an empty one: waiting counts them
  };

  float sums[kTokens / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_step(begin + i);
  for (int step = begin; step < end; ++step) {
    wait_for_copies<kAhead - 1>();
    __syncthreads();  // all see this stage and are done with the last
    copy_step(step + kAhead);
    multiply_stage<T, kTokens>(shared + step % kStages<kTokens> * kStageBytes, sums);
  }

  // Through shared memory, so that tokens are written in packs.
  __syncthreads();
  auto* const block_sums = reinterpret_cast<float*>(shared);  // [kTokens][kSumStride]
  const int lane = threadIdx.x % kWarpSize, first_row = threadIdx.x / kWarpSize * kWarpRows;
#pragma unroll
  for (int octet = 0; octet < kTokens / 8; ++octet) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * octet + lane % 4 * 2 + i % 2;
      block_sums[token * kSumStride + first_row + lane / 4 + i / 2 * 8] = sums[octet][i];
    }
  }
  __syncthreads();
  constexpr int kPacks = kRows / kPack<T>;
  for (int i = threadIdx.x; i < kTokens * kPacks; i += kThreads) {
    const int row = i % kPacks * kPack<T>;
    const int token = blockIdx.x * kTokens + i / kPacks, output = blockIdx.y * kRows + row;
    if (token >= a.tokens || output >= a.outputs) continue;
    float values[kPack<T>];
    load_sums<T>(block_sums + i / kPacks * kSumStride + row, values);
    if (a.splits == 1) {
      finish(a, token, output, values);
    } else {
      const size_t place = static_cast<size_t>(blockIdx.z) * a.tokens + token;
      store_sums<T>(a.partial + place * a.outputs + output, values);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_splits_kernel(const LinearArguments<T> a) {
  const int token = blockIdx.x;
  const int output = (blockIdx.y * kThreads + threadIdx.x) * kPack<T>;
  if (output >= a.outputs) return;
  float values[kPack<T>] = {};
  for (int s = 0; s < a.splits; ++s) {
    const size_t place = static_cast<size_t>(s) * a.tokens + token;
    float part[kPack<T>];
    load_sums<T>(a.partial + place * a.outputs + output, part);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] += part[i];
  }
  finish(a, token, output, values);
}

template <typename T, int kTokens>
int launch(const LinearArguments<T>& a, cudaStream_t stream) {
  constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  constexpr int kSharedBytes = kStages<kTokens> * kStageBytes;
  static_assert(kSharedBytes <= 48 << 10 && kTokens * kSumStride * 4 <= kSharedBytes);
  const dim3 grid((a.tokens + kTokens - 1) / kTokens, (a.outputs + kRows - 1) / kRows, a.splits);
  MEGACHAT_LAUNCH((tiled_linear_kernel<T, kTokens>), grid, dim3(kThreads), kSharedBytes, stream, a);
  if (a.splits > 1) {
    const int packs = a.outputs / kPack<T>;
    MEGACHAT_LAUNCH(add_splits_kernel<T>, dim3(a.tokens, (packs + kThreads - 1) / kThreads),
                    dim3(kThreads), 0, stream, a);
  }
  return cudaGetLastError();
}

template <typename T>
int launch_tokens(const LinearArguments<T>& a, cudaStream_t stream) {
  if (a.width % kPack<T> != 0 || a.outputs % kPack<T> != 0 || a.tile_stride % kPack<T> != 0 ||
      a.row_stride % kPack<T> != 0) {
    return cudaErrorInvalidValue;
  }
  if (a.tokens == 0) return cudaSuccess;
  if (a.tokens <= 8) return launch<T, 8>(a, stream);
  if (a.tokens <= 16) return launch<T, 16>(a, stream);
  if (a.tokens <= 32) return launch<T, 32>(a, stream);
  return launch<T, kMaxTokens>(a, stream);
}

}  // namespace
}  // namespace megachat

// How many splits keep a GPU of so many multiprocessors busy: enough for two blocks on each, but
// none with less than eight stages to go through. `format` is a megachat::Format.
MEGACHAT_EXPORT int megachat_tiled_linear_splits(int format, int tokens, int tiles, int outputs,
                                                 int width, int multiprocessors) {
  using namespace megachat;
  const int depth = static_cast<Format>(format) == Format::kFloat32 ? kDepth<float> : kDepth<Float16>;
  const int64_t token_blocks = (static_cast<int64_t>(tokens) + kMaxTokens - 1) / kMaxTokens;
  const int64_t blocks = token_blocks * ((static_cast<int64_t>(outputs) + kRows - 1) / kRows);
  if (blocks <= 0) return 1;
  const int64_t wanted = (2ll * multiprocessors + blocks - 1) / blocks;
  const int64_t steps = static_cast<int64_t>(tiles) * ((width + depth - 1) / depth);
  const int64_t useful = steps / kMinStepsPerSplit;
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits);
}

// Bytes of workspace that a call needs.
MEGACHAT_EXPORT size_t megachat_tiled_linear_workspace(int tokens, int outputs, int splits) {
  if (splits <= 1) return 0;
  return static_cast<size_t>(splits) * tokens * outputs * sizeof(float);
}

// `format` is a megachat::Format, that of all tensors, with shapes as in LinearArguments; `bias` may
// be null. Pointers are aligned to 16 bytes; width, outputs and both strides are multiples of the 4
// fp32 or 8 16-bit elements of a pack. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_tiled_linear(int format, const void* x, const void* weight,
                                          const void* bias, void* out, void* workspace,
                                          int64_t tile_stride, int64_t row_stride, int tokens,
                                          int tiles, int outputs, int width, int relu, int splits,
                                          void* stream) {
  using namespace megachat;
  if (tokens < 0 || tiles <= 0 || outputs <= 0 || outputs > kMaxOutputs || width <= 0 ||
      static_cast<int64_t>(tiles) * width > std::numeric_limits<int>::max() || tile_stride < 0 ||
      row_stride < width || splits < 1 || splits > kMaxSplits ||
      (splits > 1 && workspace == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (const void* pointer :
       {x, weight, bias, static_cast<const void*>(out), static_cast<const void*>(workspace)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  return dispatch_format(format, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LinearArguments<T> arguments{static_cast<const T*>(x),
                                       static_cast<const T*>(weight),
                                       static_cast<const T*>(bias),
                                       static_cast<T*>(out),
                                       static_cast<float*>(workspace),
                                       tile_stride,
                                       row_stride,
                                       tokens,
                                       tiles,
                                       outputs,
                                       width,
                                       splits,
                                       relu != 0};
    return launch_tokens(arguments, static_cast<cudaStream_t>(stream));
  });
}
