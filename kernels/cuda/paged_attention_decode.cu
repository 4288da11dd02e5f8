// Attention of one query token a row to all tokens of its sequence, over pages.
//
// A block takes one head of one row and one of `splits` equal spans of the tokens. A token belongs
// to a group of lanes, each of which holds 16 bytes of the head; a group streams its tokens,
// several loads in flight, and keeps a running softmax in base 2. Groups are combined over the
// warp, then over the block, then, with more than one split, over the splits by a second kernel,
// always in the same order: the same input gives the same bits. Slots beyond a row's length and
// table entries beyond its pages are never read.
#include "../include/numeric.h"
#include "../include/pages.h"
#include "../include/reduce.h"

namespace megachat {
namespace {

constexpr int kWarps = 4;
constexpr int kTokensInFlight = 4;  // of a group of lanes: as many 16-byte loads of keys and values
constexpr int kMaxSplits = 64;
constexpr int kMinTokensPerSplit = 256;

__host__ __device__ constexpr int next_power_of_two(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

template <typename T>
struct DecodeArguments {
  const T* query;          // [rows, heads, head_dim]
  const T* keys;           // [blocks, block_size, heads, head_dim]
  const T* values;         // as keys
  const int32_t* tables;   // [rows, columns]
  const int64_t* lengths;  // [rows]
  T* out;                  // [rows, heads, head_dim]
  float* partial;          // [rows, heads, splits, head_dim], unnormalised; with splits > 1
  float2* statistics;      // [rows, heads, splits]: maximum and sum; with splits > 1
  int rows, heads, columns, splits;
  float scale;  // of the scores, times log2(e)
  PageDivider divider;
};

// exp2(value - maximum), and 0 for what has summed nothing up: its maximum is -inf, as may be the
// common one.
__device__ __forceinline__ float rescale(float value, float sum, float maximum) {
  return sum == 0.0f ? 0.0f : exp2f(value - maximum);
}

// One head's running softmax in the registers of one lane.
template <int kWidth>
struct Running {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float mixed[kWidth] = {};
};

// Takes in tokens [begin, end) of the group, `stride` apart.
template <typename T, int kHeadDim, int kLanes>
__device__ __forceinline__ void stream_tokens(const DecodeArguments<T>& a, int row, int head,
                                              int begin, int end, int stride,
                                              Running<kPack<T>>& state) {
  const int column = threadIdx.x % kLanes * kPack<T>;
  const bool has_columns = column < kHeadDim;
  float query[kPack<T>] = {};
  if (has_columns) {
    load_pack(a.query + (static_cast<size_t>(row) * a.heads + head) * kHeadDim + column, query);
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) query[i] *= a.scale;
  const int32_t* const table = a.tables + static_cast<size_t>(row) * a.columns;
  const int group = threadIdx.x / kLanes;

  for (int base = begin; base < end; base += stride * kTokensInFlight) {
    uint4 keys[kTokensInFlight], values[kTokensInFlight];
    float scores[kTokensInFlight];
    float maximum = state.maximum;
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      const int token = base + t * stride + group;
      keys[t] = values[t] = make_uint4(0, 0, 0, 0);
      if (token < end && has_columns) {
        const size_t offset = (a.divider.slot(table, token) * a.heads + head) * kHeadDim + column;
        keys[t] = load_raw(a.keys + offset);
        values[t] = load_raw(a.values + offset);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      float key[kPack<T>], score = 0.0f;
      unpack<T>(keys[t], key);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) score += query[i] * key[i];
      score = lane_sum<1, kLanes>(score);
      scores[t] = base + t * stride + group < end ? score : -INFINITY;
      maximum = fmaxf(maximum, scores[t]);
    }
    if (base + group >= end) continue;  // nothing for this group: its maximum may still be -inf
    const float decay = rescale(state.maximum, state.sum, maximum);
    state.maximum = maximum;
    state.sum *= decay;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) state.mixed[i] *= decay;
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      const float weight = exp2f(scores[t] - maximum);
      float value[kPack<T>];
      unpack<T>(values[t], value);
      state.sum += weight;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) state.mixed[i] += weight * value[i];
    }
  }
}

// Combines the groups of a warp; afterwards they all hold the result.
template <typename T, int kLanes>
__device__ __forceinline__ void combine_warp(Running<kPack<T>>& state) {
  const float maximum = lane_max<kLanes, kWarpSize>(state.maximum);
  const float factor = rescale(state.maximum, state.sum, maximum);
  state.maximum = maximum;
  state.sum = lane_sum<kLanes, kWarpSize>(state.sum * factor);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    state.mixed[i] = lane_sum<kLanes, kWarpSize>(state.mixed[i] * factor);
  }
}

// What each warp hands to the block.
template <int kHeadDim>
struct WarpResults {
  float mixed[kWarps][kHeadDim];
  float maximum[kWarps];
  float sum[kWarps];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    paged_attention_decode_kernel(const DecodeArguments<T> a) {
  constexpr int kLanes = next_power_of_two(kHeadDim / kPack<T>);
  static_assert(kLanes <= kWarpSize && kHeadDim % kPack<T> == 0, "a token has one group of lanes");
  constexpr int kGroups = kWarps * kWarpSize / kLanes;
  MEGACHAT_DYNAMIC_SHARED(shared);
  auto& results = *reinterpret_cast<WarpResults<kHeadDim>*>(shared);
  const int row = blockIdx.x, head = blockIdx.y, split = blockIdx.z;

  const int64_t reach = static_cast<int64_t>(a.columns) * a.divider.block_size;
  const int length = static_cast<int>(min(max(a.lengths[row], int64_t{0}), reach));
  const int span = (length + a.splits - 1) / a.splits;
  const int begin = min(split * span, length), end = min(begin + span, length);

  Running<kPack<T>> state;
  stream_tokens<T, kHeadDim, kLanes>(a, row, head, begin, end, kGroups, state);
  combine_warp<T, kLanes>(state);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int column = lane * kPack<T>;
  if (column < kHeadDim) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) results.mixed[warp][column + i] = state.mixed[i];
  }
  if (lane == 0) {
    results.maximum[warp] = state.maximum;
    results.sum[warp] = state.sum;
  }
  __syncthreads();

  if (threadIdx.x >= kHeadDim) return;
  float maximum = -INFINITY, sum = 0.0f, mixed = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, results.maximum[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float factor = rescale(results.maximum[w], results.sum[w], maximum);
    sum += factor * results.sum[w];
    mixed += factor * results.mixed[w][threadIdx.x];
  }
  const size_t place = static_cast<size_t>(row) * a.heads + head;
  if (a.splits == 1) {
    from_float(sum == 0.0f ? 0.0f : mixed / sum, a.out + place * kHeadDim + threadIdx.x);
    return;
  }
  const size_t part = place * a.splits + split;
  a.partial[part * kHeadDim + threadIdx.x] = mixed;
  if (threadIdx.x == 0) a.statistics[part] = make_float2(maximum, sum);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim) combine_splits_kernel(const DecodeArguments<T> a) {
  const size_t place = static_cast<size_t>(blockIdx.x) * a.heads + blockIdx.y;
  const float2* const statistics = a.statistics + place * a.splits;
  const float* const partial = a.partial + place * a.splits * kHeadDim + threadIdx.x;
  float maximum = -INFINITY, sum = 0.0f, mixed = 0.0f;
  for (int s = 0; s < a.splits; ++s) maximum = fmaxf(maximum, statistics[s].x);
  for (int s = 0; s < a.splits; ++s) {
    const float factor = rescale(statistics[s].x, statistics[s].y, maximum);
    sum += factor * statistics[s].y;
    mixed += factor * partial[s * kHeadDim];
  }
  from_float(sum == 0.0f ? 0.0f : mixed / sum, a.out + place * kHeadDim + threadIdx.x);
}

template <typename T, int kHeadDim>
int launch(const DecodeArguments<T>& a, cudaStream_t stream) {
  MEGACHAT_LAUNCH((paged_attention_decode_kernel<T, kHeadDim>), dim3(a.rows, a.heads, a.splits),
                  dim3(kWarps * kWarpSize), sizeof(WarpResults<kHeadDim>), stream, a);
  if (a.splits > 1) {
    MEGACHAT_LAUNCH((combine_splits_kernel<T, kHeadDim>), dim3(a.rows, a.heads), dim3(kHeadDim), 0,
                    stream, a);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace megachat

// How many splits keep a GPU of so many multiprocessors busy: enough for four blocks on each, but
// none with less than 256 of the `columns x block_size` tokens that a row may have.
MEGACHAT_EXPORT int megachat_paged_attention_decode_splits(int rows, int heads, int columns,
                                                           int block_size, int multiprocessors) {
  using namespace megachat;
  const int64_t blocks = static_cast<int64_t>(rows) * heads;
  if (blocks <= 0) return 1;
  const int64_t wanted = (4ll * multiprocessors + blocks - 1) / blocks;
  const int64_t useful = static_cast<int64_t>(columns) * block_size / kMinTokensPerSplit;
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits);
}

// Bytes of workspace that a call needs.
MEGACHAT_EXPORT size_t megachat_paged_attention_decode_workspace(int rows, int heads, int head_dim,
                                                                 int splits) {
  if (splits <= 1) return 0;
  const size_t parts = static_cast<size_t>(rows) * heads * splits;
  return parts * (head_dim * sizeof(float) + sizeof(float2));
}

// `format` is a megachat::Format, that of query, keys, values and out; tables are int32, lengths
// int64; all are contiguous and aligned to 16 bytes, shapes as in DecodeArguments. A length of 0
// gives zeros, one beyond the table's reach counts as that reach. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_paged_attention_decode(int format, const void* query, const void* keys,
                                                    const void* values, const int32_t* tables,
                                                    const int64_t* lengths, void* out,
                                                    void* workspace, int rows, int heads,
                                                    int head_dim, int block_size, int columns,
                                                    int splits, void* stream) {
  using namespace megachat;
  if (rows < 0 || heads <= 0 || splits < 1 || splits > kMaxSplits ||
      !valid_pages(columns, block_size) || (splits > 1 && workspace == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (const void* pointer :
       {query, keys, values, static_cast<const void*>(out), static_cast<const void*>(workspace)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;
  float* const partial = static_cast<float*>(workspace);
  const size_t elements = static_cast<size_t>(rows) * heads * splits * head_dim;
  const float scale = kLog2E / std::sqrt(static_cast<float>(head_dim));
  return dispatch_format(format, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const DecodeArguments<T> arguments{
        static_cast<const T*>(query),
        static_cast<const T*>(keys),
        static_cast<const T*>(values),
        tables,
        lengths,
        static_cast<T*>(out),
        partial,
        splits > 1 ? reinterpret_cast<float2*>(partial + elements) : nullptr,
        rows,
        heads,
        columns,
        splits,
        scale,
        PageDivider(block_size)};
    return dispatch_head_dim(head_dim, [&](auto size) {
      return launch<T, decltype(size)::value>(arguments, static_cast<cudaStream_t>(stream));
    });
  });
}
