// Causal attention of ragged chunks of query tokens to all tokens of their sequences, over pages.
//
// A block takes one head of a tile of a chunk's queries, and walks over tiles of the tokens that
// they see. Keys and values of a tile are read once into shared memory for all its queries, in the
// format of the cache; arithmetic and the running softmax, in base 2, are fp32. Eight lanes share a
// few queries: each has the scores of its own keys, then the output of its own columns. Every sum
// has one order: the same input gives the same bits. Slots beyond the last visible token and
// the table entries beyond its page are never read.
#include "../include/numeric.h"
#include "../include/pages.h"
#include "../include/reduce.h"

namespace megachat {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;  // that share queries
constexpr int kQueryGroups = kThreads / kLanes;

template <typename T>
struct PrefillArguments {
  const T* query;          // [tokens, heads, head_dim], chunks one after the other
  const T* keys;           // [blocks, block_size, heads, head_dim]
  const T* values;         // as keys
  const int32_t* tables;   // [chunks, columns]
  const int64_t* starts;   // [chunks], tokens of each sequence before its chunk
  const int64_t* offsets;  // [chunks + 1], where each chunk starts in `query`, and the end
  T* out;                  // [tokens, heads, head_dim]
  int heads, columns, chunks;
  float scale;  // of the scores, times log2(e)
  PageDivider divider;
};

// Shapes of a tile. Rows in shared memory are 16 bytes longer than a head: an odd number of packs,
// so that eight rows at one column lie in different banks.
template <typename T, int kHeadDim>
struct Tile {
  static constexpr int kEach = kPack<T> / 2;  // queries and keys of a thread
  static constexpr int kQueries = kQueryGroups * kEach;
  static constexpr int kKeys = kLanes * kEach;
  static constexpr int kPacks = kHeadDim / kPack<T>;
  static constexpr int kPitch = kHeadDim + kPack<T>;
  static constexpr int kOutPacks = (kPacks + kLanes - 1) / kLanes;  // of a thread
  static constexpr int kWeightPitch = kKeys + 4;

  T query[kQueries][kPitch];
  T keys[kKeys][kPitch];
  T values[kKeys][kPitch];
  float weights[kQueries][kWeightPitch];
};

// Chunk c owns the tiles from offsets[c] / kQueries + c on: as many as it needs and sometimes one
// more, known without a pass over the chunks before it. Returns the last chunk with tiles up to
// this one.
template <int kQueries>
__device__ __forceinline__ int chunk_of(const int64_t* offsets, int chunks, int tile) {
  int first = 0, count = chunks;
  while (count > 1) {
    const int half = count / 2;
    if (offsets[first + half] / kQueries + first + half <= tile) {
      first += half;
      count -= half;
    } else {
      count = half;
    }
  }
  return first;
}

// Copies `kRows` heads into shared memory; those from `count` on become zeros. `place` is the number
// of a row's head in `source`.
template <int kRows, typename T, int kPitch, typename Place>
__device__ __forceinline__ void load_rows(const T* source, T (&rows)[kRows][kPitch], int count,
                                          Place place) {
  constexpr int kHeadDim = kPitch - kPack<T>, kPacks = kHeadDim / kPack<T>;
  for (int i = threadIdx.x; i < kRows * kPacks; i += kThreads) {
    const int row = i / kPacks, column = i % kPacks * kPack<T>;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (row < count) raw = load_raw(source + place(row) * kHeadDim + column);
    *reinterpret_cast<uint4*>(&rows[row][column]) = raw;
  }
}

// The running softmax of a thread's queries; lanes of a group agree in all but `mixed`.
template <typename T, int kHeadDim>
struct Running {
  using Shape = Tile<T, kHeadDim>;
  float maximum[Shape::kEach];
  float sum[Shape::kEach];
  float mixed[Shape::kEach][Shape::kOutPacks][kPack<T>];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int q = 0; q < Shape::kEach; ++q) {
      maximum[q] = -INFINITY;
      sum[q] = 0.0f;
#pragma unroll
      for (int p = 0; p < Shape::kOutPacks; ++p) {
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) mixed[q][p][i] = 0.0f;
      }
    }
  }
};

// scores[q][k] = scaled product of the thread's q-th query and the k-th key of its lane.
template <typename T, int kHeadDim, int kEach = Tile<T, kHeadDim>::kEach>
__device__ __forceinline__ void score(const Tile<T, kHeadDim>& tile, int first_query, int lane,
                                      float scale, float (&scores)[kEach][kEach]) {
#pragma unroll
  for (int q = 0; q < kEach; ++q) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) scores[q][k] = 0.0f;
  }
#pragma unroll 1
  for (int column = 0; column < kHeadDim; column += kPack<T>) {
    float keys[kEach][kPack<T>];
#pragma unroll
    for (int k = 0; k < kEach; ++k) load_pack(&tile.keys[lane + k * kLanes][column], keys[k]);
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      float query[kPack<T>];
      load_pack(&tile.query[first_query + q][column], query);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) scores[q][k] += query[i] * keys[k][i];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kEach; ++q) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) scores[q][k] *= scale;
  }
}

// Adds the values of a tile, weighted, to the thread's columns of its queries' output.
template <typename T, int kHeadDim>
__device__ __forceinline__ void mix(const Tile<T, kHeadDim>& tile, int first_query, int lane,
                                    Running<T, kHeadDim>& state) {
  using Shape = Tile<T, kHeadDim>;
  constexpr int kStep = 4;  // keys whose weights are one 16-byte access
#pragma unroll 1
  for (int key = 0; key < Shape::kKeys; key += kStep) {
    float weights[Shape::kEach][kStep];
#pragma unroll
    for (int q = 0; q < Shape::kEach; ++q) {
      load_pack(&tile.weights[first_query + q][key], weights[q]);
    }
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
#pragma unroll
      for (int p = 0; p < Shape::kOutPacks; ++p) {
        const int pack = lane + p * kLanes;
        if (pack >= Shape::kPacks) continue;
        float value[kPack<T>];
        load_pack(&tile.values[key + k][pack * kPack<T>], value);
#pragma unroll
        for (int q = 0; q < Shape::kEach; ++q) {
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) state.mixed[q][p][i] += weights[q][k] * value[i];
        }
      }
    }
  }
}

// Takes in a tile of keys, the first of which is token `key`. A query at position p sees the tokens
// up to p, none from `end` on.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(Tile<T, kHeadDim>& tile, int key, int position, int end,
                                       float scale, Running<T, kHeadDim>& state) {
  constexpr int kEach = Tile<T, kHeadDim>::kEach;
  const int lane = threadIdx.x % kLanes, first_query = threadIdx.x / kLanes * kEach;
  float scores[kEach][kEach];
  score(tile, first_query, lane, scale, scores);
#pragma unroll
  for (int q = 0; q < kEach; ++q) {
    const int visible = min(position + first_query + q + 1, end) - key;
    float maximum = state.maximum[q];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (lane + k * kLanes >= visible) scores[q][k] = -INFINITY;
      maximum = fmaxf(maximum, scores[q][k]);
    }
    // Not -inf: token 0 is in the first tile, and every query sees it.
    maximum = lane_max<1, kLanes>(maximum);
    const float decay = exp2f(state.maximum[q] - maximum);
    state.maximum[q] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float weight = exp2f(scores[q][k] - maximum);
      sum += weight;
      tile.weights[first_query + q][lane + k * kLanes] = weight;
    }
    state.sum[q] = state.sum[q] * decay + lane_sum<1, kLanes>(sum);
#pragma unroll
    for (int p = 0; p < Tile<T, kHeadDim>::kOutPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) state.mixed[q][p][i] *= decay;
    }
  }
  __syncwarp(kWholeWarp);  // the lanes of a query are of one warp
  mix(tile, first_query, lane, state);
}

// Blocks of a multiprocessor that registers must leave room for: as many as shared memory does, of
// the largest head.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 4 : 3;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    paged_attention_prefill_kernel(const PrefillArguments<T> a) {
  using Shape = Tile<T, kHeadDim>;
  MEGACHAT_DYNAMIC_SHARED(shared);
  Shape& tile = *reinterpret_cast<Shape*>(shared);
  const int head = blockIdx.y;
  // The last tiles of a chunk see the most tokens, so they start first.
  const int number = gridDim.x - 1 - blockIdx.x;
  const int chunk = chunk_of<Shape::kQueries>(a.offsets, a.chunks, number);
  const int64_t offset = a.offsets[chunk];
  const int length = static_cast<int>(a.offsets[chunk + 1] - offset);
  const int first =
      (number - static_cast<int>(offset / Shape::kQueries) - chunk) * Shape::kQueries;
  if (first >= length) return;

  const int queries = min(length - first, Shape::kQueries);
  const int position = static_cast<int>(a.starts[chunk]) + first;
  const int reach = a.columns * static_cast<int>(a.divider.block_size);
  const int end = min(position + queries, reach);
  const int32_t* const table = a.tables + static_cast<size_t>(chunk) * a.columns;
  const auto head_of_token = [&](int row) {
    return static_cast<size_t>(offset + first + row) * a.heads + head;
  };
  load_rows(a.query, tile.query, queries, head_of_token);

  Running<T, kHeadDim> state;
  for (int key = 0; key < end; key += Shape::kKeys) {
    const auto head_of_key = [&](int row) {
      return a.divider.slot(table, key + row) * a.heads + head;
    };
    __syncthreads();  // nobody reads the last tile any more
    load_rows(a.keys, tile.keys, end - key, head_of_key);
    load_rows(a.values, tile.values, end - key, head_of_key);
    __syncthreads();
    attend(tile, key, position, end, a.scale, state);
  }

  const int lane = threadIdx.x % kLanes, first_query = threadIdx.x / kLanes * Shape::kEach;
  // One pointer and steps from it; with separate addresses nvcc splits fp32's 16-byte stores, too. Of
  // the 16-bit formats it still makes words of those to a lane's first pack.
  T* const out = a.out + head_of_token(first_query) * kHeadDim + lane * kPack<T>;
  const size_t next_query = static_cast<size_t>(a.heads) * kHeadDim;
#pragma unroll
  for (int q = 0; q < Shape::kEach; ++q) {
    if (first_query + q >= queries) continue;
    const float inverse = 1.0f / state.sum[q];  // of at least 1
#pragma unroll
    for (int p = 0; p < Shape::kOutPacks; ++p) {
      if (lane + p * kLanes >= Shape::kPacks) continue;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) state.mixed[q][p][i] *= inverse;
      store_pack(out + q * next_query + p * kLanes * kPack<T>, state.mixed[q][p]);
    }
  }
}

template <typename T, int kHeadDim>
int launch(const PrefillArguments<T>& a, int tokens, cudaStream_t stream) {
  using Shape = Tile<T, kHeadDim>;
  static_assert(sizeof(Shape) <= 48 << 10, "what a block gets without asking for more");
  const dim3 grid(tokens / Shape::kQueries + a.chunks, a.heads);
  MEGACHAT_LAUNCH((paged_attention_prefill_kernel<T, kHeadDim>), grid, dim3(kThreads),
                  sizeof(Shape), stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format, that of query, keys, values and out; tables are int32, starts and
// offsets int64; all are contiguous and aligned to 16 bytes, shapes as in PrefillArguments. Chunks
// may be empty; offsets rise from 0 to `tokens`. The cache holds the chunks' own tokens already.
// A chunk that ends beyond its table's reach sees the tokens up to that reach. Returns a
// cudaError_t.
MEGACHAT_EXPORT int megachat_paged_attention_prefill(int format, const void* query,
                                                     const void* keys, const void* values,
                                                     const int32_t* tables, const int64_t* starts,
                                                     const int64_t* offsets, void* out, int tokens,
                                                     int chunks, int heads, int head_dim,
                                                     int block_size, int columns, void* stream) {
  using namespace megachat;
  if (tokens < 0 || chunks < 0 || (tokens > 0 && chunks == 0) || heads <= 0 ||
      (tokens > 0 && columns == 0) || !valid_pages(columns, block_size)) {
    return cudaErrorInvalidValue;
  }
  for (const void* pointer : {query, keys, values, static_cast<const void*>(out)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  if (tokens == 0) return cudaSuccess;
  const float scale = kLog2E / std::sqrt(static_cast<float>(head_dim));
  return dispatch_format(format, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PrefillArguments<T> arguments{static_cast<const T*>(query),
                                        static_cast<const T*>(keys),
                                        static_cast<const T*>(values),
                                        tables,
                                        starts,
                                        offsets,
                                        static_cast<T*>(out),
                                        heads,
                                        columns,
                                        chunks,
                                        scale,
                                        PageDivider(block_size)};
    return dispatch_head_dim(head_dim, [&](auto size) {
      return launch<T, decltype(size)::value>(arguments, tokens, static_cast<cudaStream_t>(stream));
    });
  });
}
