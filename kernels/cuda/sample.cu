// The next token of every row: temperature, repetition penalty, forbidden tokens, top-k, top-p and
// a draw, with the log-probability: megachat/ops/sample.py defines the result.
//
// One block a row, which reads the logits a few times (all but the first from L2) and keeps
// nothing of their size. What tokens were said and which are forbidden are bits in shared memory.
// The edges of top-k and top-p are found digit by digit of the logits' binary form, over a
// histogram in shared memory: of counts, and of masses in fixed point, so that the order of its
// atomic additions does not matter. The draw is two Gumbel-max races, between groups of 128
// neighbouring tokens by their mass, then within the winning group. The same input gives the same
// bits.
//
// The vocabulary may be cut over a tensor group: a rank's row is a slice, and what the kernel
// leaves are the four numbers that ranks exchange. What top-k and top-p keep of the whole
// vocabulary is then given, as the lowest logit of each row that is kept. sample_combine.cu picks
// the winner; of one rank, too.
#include "../include/numeric.h"
#include "../include/philox.h"
#include "../include/reduce.h"

namespace megachat {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGroupTokens = 128;  // GROUP_TOKENS of megachat/ops/sample.py
constexpr int kMaxColumns = 1 << 16;
constexpr int kMaxGroups = kMaxColumns / kGroupTokens;
constexpr unsigned kGroupStream = 0, kTokenStream = 1;
constexpr int kDigitBits = 11, kDigits = 3;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsEach = kBins / kThreads;  // of a thread
constexpr float kMassUnit = 1099511627776.0f;  // 2^40: 2^16 masses of at most 1 fit 57 bits

using Amount = unsigned long long;

template <typename T>
struct SampleArguments {
  const T* logits;                 // [rows, width]
  const int64_t* keys;             // [rows], the random stream of each row
  const int64_t* positions;        // [rows], tokens of the response before this one
  const int64_t* history;          // [rows, history_width] tokens; with a penalty
  const int64_t* history_lengths;  // [rows]; with a penalty
  const float* edges;              // [rows], what top-k and top-p keep; or null
  const int64_t* suppressed;       // columns that are never chosen
  const int64_t* stops;            // columns that are not chosen before `min_new_tokens`
  double* parts;                   // [4, rows]: score, token, its logit, logsumexp
  int rows, width, columns;        // columns of the width that mean something
  int history_width, num_suppressed, num_stops, min_new_tokens;
  int vocab_start, top_k;
  float temperature, top_p, penalty;
};

// What a block keeps besides the two bits of every token.
struct Scratch {
  Amount bins[kBins];
  Amount of_warps[kWarps];
  float maxima[kMaxGroups];  // of the groups of tokens
  float sums[kMaxGroups];
  double scores[kWarps];
  int winners[kWarps];
  float floats[kWarps];
  unsigned digit;
  Amount above, at;
};

// The order of a float's bits as an unsigned number is that of the floats.
__device__ __forceinline__ unsigned order_preserving(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float order_restoring(unsigned ordered) {
  return __uint_as_float(ordered ^ (ordered >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// The larger score wins, of equal ones the lower index; NaN never does.
struct Candidate {
  double score = -INFINITY;
  int index = 0x7fffffff;

  __device__ __forceinline__ void meet(double other, int other_index) {
    if (other > score || (other == score && other_index < index)) {
      score = other;
      index = other_index;
    }
  }
};

__device__ __forceinline__ Candidate block_best(Candidate best, Scratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int bit = kWarpSize / 2; bit > 0; bit /= 2) {
    const double score = __shfl_xor_sync(kWholeWarp, best.score, bit, kWarpSize);
    const int index = __shfl_xor_sync(kWholeWarp, best.index, bit, kWarpSize);
    best.meet(score, index);
  }
  __syncthreads();  // nobody reads what an earlier call left
  if (lane == 0) {
    scratch.scores[warp] = best.score;
    scratch.winners[warp] = best.index;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best.meet(scratch.scores[w], scratch.winners[w]);
  return best;
}

__device__ __forceinline__ float block_max(float value, Scratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = lane_max<1, kWarpSize>(value);
  __syncthreads();  // nobody reads what an earlier call left
  if (lane == 0) scratch.floats[warp] = value;
  __syncthreads();
  return lane_max<1, kWarpSize>(lane < kWarps ? scratch.floats[lane] : -INFINITY);
}

// A row's logits as the rules see them.
template <typename T>
class Row {
 public:
  __device__ __forceinline__ Row(const SampleArguments<T>& a, int row, unsigned* bits)
      : a_(a),
        logits_(a.logits + static_cast<size_t>(row) * a.width),
        row_(row),
        words_((a.columns + 31) / 32),
        said_(bits),
        forbidden_(bits + words_) {}

  // Sets the bits; they are there after the next barrier.
  __device__ __forceinline__ void mark() {
    for (int i = threadIdx.x; i < 2 * words_; i += kThreads) said_[i] = 0;
    __syncthreads();
    if (a_.penalty != 1.0f) {
      const int64_t length = min(a_.history_lengths[row_], static_cast<int64_t>(a_.history_width));
      const int64_t* history = a_.history + static_cast<size_t>(row_) * a_.history_width;
      set(said_, history, length, a_.vocab_start);
    }
    set(forbidden_, a_.suppressed, a_.num_suppressed, 0);
    const bool early = a_.positions[row_] + 1 < a_.min_new_tokens;
    if (early) set(forbidden_, a_.stops, a_.num_stops, 0);
  }

  // Calls `visit(column, scaled logit)` for every column of the thread's packs.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (int column = threadIdx.x * kPack<T>; column < a_.columns; column += kThreads * kPack<T>) {
      float x[kPack<T>];
      load_scaled(column, x);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (column + i < a_.columns) visit(column + i, x[i]);
      }
    }
  }
  // A pack of scaled logits.
  __device__ __forceinline__ void load_scaled(int column, float (&x)[kPack<T>]) const {
    load_pack(logits_ + column, x);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] = over_temperature(x[i]);
  }
  __device__ __forceinline__ float scaled(int column) const {
    return over_temperature(to_float(logits_[column]));
  }
  // The scaled logit after the penalty, minus infinity where forbidden.
  __device__ __forceinline__ float choice(int column, float scaled) const {
    const unsigned bit = 1u << column % 32;
    if (forbidden_[column / 32] & bit) return -INFINITY;
    if (!(said_[column / 32] & bit)) return scaled;
    return scaled > 0.0f ? scaled / a_.penalty : scaled * a_.penalty;
  }

 private:
  __device__ __forceinline__ float over_temperature(float x) const {
    return a_.temperature == 0.0f ? x : x / a_.temperature;
  }
  // Of the numbers that are columns when counted from `start`.
  __device__ __forceinline__ void set(unsigned* bits, const int64_t* numbers, int64_t count,
                                      int start) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const int64_t column = numbers[i] - start;
      if (column < 0 || column >= a_.columns) continue;
      atomicOr(&bits[column / 32], 1u << column % 32);
    }
  }

  const SampleArguments<T>& a_;
  const T* logits_;
  int row_, words_;
  unsigned *said_, *forbidden_;
};

// log sum exp of the scaled logits: those of the distribution that training recomputes.
template <typename T>
__device__ __forceinline__ double log_sum_exp(const Row<T>& row, Scratch& scratch) {
  float largest = -INFINITY;
  row.for_each([&](int, float x) { largest = fmaxf(largest, x); });
  const float maximum = block_max(largest, scratch);
  float sum = 0.0f;
  row.for_each([&](int, float x) { sum += expf(x - maximum); });
  __syncthreads();  // nobody reads the maxima any more
  sum = block_sum(sum, scratch.floats);
  return maximum == -INFINITY ? maximum : maximum + log(static_cast<double>(sum));
}

// The largest logit from which on the tokens have a wanted amount, of count or of mass.
struct Edge {
  unsigned ordered = 0;
  Amount above = 0;  // what the tokens above it have
  Amount at = 0;     // what those exactly at it have

  __device__ __forceinline__ float logit() const { return order_restoring(ordered); }
};

// Adds up the bins from the top; returns what stands above the thread's own, and the total.
struct BinSums {
  Amount before, total;
};
__device__ __forceinline__ BinSums scan_bins(Scratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsEach;
  Amount mine = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) mine += scratch.bins[top - i];
  Amount through = mine;  // of this thread's bins and those of the lanes before it
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const Amount before = __shfl_up_sync(kWholeWarp, through, delta, kWarpSize);
    if (lane >= delta) through += before;
  }
  if (lane == kWarpSize - 1) scratch.of_warps[warp] = through;
  __syncthreads();
  BinSums sums{through - mine, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sums.before += scratch.of_warps[w];
    sums.total += scratch.of_warps[w];
  }
  return sums;
}

// Settles the next digit of the edge: the largest with which the tokens from it on have `wanted`.
// Where nothing has any mass it is 0, which keeps everything.
__device__ __forceinline__ void settle_digit(Edge& edge, int shift, Amount before, Amount wanted,
                                             Scratch& scratch) {
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsEach;
  Amount reached = edge.above + before;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const Amount at = scratch.bins[top - i];
    if (reached < wanted && reached + at >= wanted) {  // of one digit only
      scratch.digit = top - i;
      scratch.above = reached;
      scratch.at = at;
    }
    reached += at;
  }
  __syncthreads();
  edge.ordered |= scratch.digit << shift;
  edge.above = scratch.above;
  edge.at = scratch.at;
}

// Finds an edge among the tokens whose ordered bits are at least `lowest`. `amount_of(choice)` is
// what a token counts, `wanted_of(total)` how much is wanted of the total, at least 1.
template <typename T, typename AmountOf, typename WantedOf>
__device__ __forceinline__ Edge find_edge(const Row<T>& row, unsigned lowest, AmountOf amount_of,
                                          WantedOf wanted_of, Scratch& scratch) {
  Edge edge;
  Amount wanted = 0;
  unsigned settled = 0;  // the bits that the digits so far have decided
#pragma unroll 1
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = max(32 - (digit + 1) * kDigitBits, 0);
    for (int i = threadIdx.x; i < kBins; i += kThreads) scratch.bins[i] = 0;
    if (threadIdx.x == 0) {
      scratch.digit = 0;
      scratch.above = edge.above;
      scratch.at = 0;
    }
    __syncthreads();
    row.for_each([&](int column, float x) {
      const float choice = row.choice(column, x);
      const unsigned ordered = order_preserving(choice);
      if ((ordered & settled) != edge.ordered || ordered < lowest) return;
      const Amount amount = amount_of(choice);
      if (amount != 0) atomicAdd(&scratch.bins[(ordered & ~settled) >> shift], amount);
    });
    __syncthreads();
    const BinSums sums = scan_bins(scratch);
    if (digit == 0) wanted = wanted_of(sums.total);
    settle_digit(edge, shift, sums.before, wanted, scratch);
    settled = 0xffffffffu << shift;
    __syncthreads();  // everyone has read the digit
  }
  return edge;
}

// The smallest logit that is kept. Tokens as likely as the last one that is kept are kept, too;
// top-p is of the mass of exactly k tokens.
template <typename T>
__device__ __forceinline__ float lowest_kept(const SampleArguments<T>& a, const Row<T>& row, int at,
                                             Scratch& scratch) {
  if (a.edges != nullptr) return a.edges[at];
  const Amount count = min(a.top_k > 0 ? a.top_k : a.columns, a.columns);
  Edge edge;
  if (a.top_k > 0) {
    edge = find_edge(
        row, 0, [](float) { return Amount{1}; }, [&](Amount) { return count; }, scratch);
  }
  if (a.top_p >= 1.0f) return a.top_k > 0 ? edge.logit() : -INFINITY;

  float peak = -INFINITY;
  row.for_each([&](int column, float x) { peak = fmaxf(peak, row.choice(column, x)); });
  peak = block_max(peak, scratch);
  const auto mass = [&](float choice) {
    const float weight = expf(choice - peak);
    return weight > 0.0f ? static_cast<Amount>(weight * kMassUnit) : Amount{0};
  };
  const Amount surplus = a.top_k > 0 ? (edge.above + edge.at - count) * mass(edge.logit()) : 0;
  const auto share = [&](Amount total) {
    const double wanted = ceil(static_cast<double>(a.top_p) * static_cast<double>(total - surplus));
    return max(static_cast<Amount>(wanted), Amount{1});
  };
  return find_edge(row, edge.ordered, mass, share, scratch).logit();
}

// Leaves the mass of each group of tokens that are kept, as maximum and sum.
template <typename T>
__device__ __forceinline__ void weigh_groups(const SampleArguments<T>& a, const Row<T>& row,
                                             float lowest, int groups, Scratch& scratch) {
  constexpr int kLanes = kGroupTokens / kPack<T>;  // of a group
  for (int base = 0; base < groups; base += kThreads / kLanes) {
    const int group = base + static_cast<int>(threadIdx.x) / kLanes;
    const int column = group * kGroupTokens + threadIdx.x % kLanes * kPack<T>;
    float x[kPack<T>];
    if (column < a.columns) row.load_scaled(column, x);
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      x[i] = column + i < a.columns ? row.choice(column + i, x[i]) : -INFINITY;
      if (x[i] < lowest) x[i] = -INFINITY;
      maximum = fmaxf(maximum, x[i]);
    }
    maximum = lane_max<1, kLanes>(maximum);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      sum += x[i] == -INFINITY ? 0.0f : expf(x[i] - maximum);
    }
    sum = lane_sum<1, kLanes>(sum);
    if (threadIdx.x % kLanes == 0 && group < groups) {
      scratch.maxima[group] = maximum;
      scratch.sums[group] = sum;
    }
  }
}

// Draws a column; its score is that of its group, which other ranks' groups are compared with.
template <typename T>
__device__ __forceinline__ Candidate race(const SampleArguments<T>& a, const Row<T>& row, int at,
                                          float lowest, Scratch& scratch) {
  const int groups = (a.columns + kGroupTokens - 1) / kGroupTokens;
  const unsigned first_group = a.vocab_start / kGroupTokens;
  const uint64_t key = static_cast<uint64_t>(a.keys[at]);
  const unsigned position = static_cast<unsigned>(a.positions[at]);
  weigh_groups(a, row, lowest, groups, scratch);
  __syncthreads();
  Candidate of_groups;
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    const double mass = scratch.maxima[group] + log(static_cast<double>(scratch.sums[group]));
    const unsigned word = philox_word(key, position, kGroupStream, first_group + group);
    of_groups.meet(mass + gumbel(word), group);
  }
  of_groups = block_best(of_groups, scratch);
  const int group = min(of_groups.index, groups - 1);

  Candidate of_tokens;
  const int column = group * kGroupTokens + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kGroupTokens && column < a.columns) {
    const float choice = row.choice(column, row.scaled(column));
    const unsigned stream = kTokenStream + first_group + group;
    const unsigned word = philox_word(key, position, stream, threadIdx.x);
    of_tokens.meet(choice < lowest ? -INFINITY : choice + gumbel(word), column);
  }
  of_groups.index = block_best(of_tokens, scratch).index;
  return of_groups;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleArguments<T> a) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
  const int at = blockIdx.x;
  Row<T> row(a, at, reinterpret_cast<unsigned*>(shared + sizeof(Scratch)));
  row.mark();
  const double total = log_sum_exp(row, scratch);  // of no penalty: it does not read the bits yet

  Candidate best;
  if (a.temperature == 0.0f) {
    row.for_each([&](int column, float x) { best.meet(row.choice(column, x), column); });
    best = block_best(best, scratch);
  } else {
    best = race(a, row, at, lowest_kept(a, row, at, scratch), scratch);
  }
  if (threadIdx.x != 0) return;
  const int column = min(best.index, a.columns - 1);  // of NaN alone nothing was chosen
  a.parts[at] = best.score;
  a.parts[a.rows + at] = a.vocab_start + column;
  a.parts[2 * a.rows + at] = row.scaled(column);
  a.parts[3 * a.rows + at] = total;
}

template <typename T>
bool valid(const SampleArguments<T>& a) {
  const bool shape = a.rows >= 0 && a.width > 0 && a.width % kPack<T> == 0 && a.columns > 0 &&
                     a.columns <= a.width && a.columns <= kMaxColumns && a.vocab_start >= 0 &&
                     a.vocab_start % kGroupTokens == 0;
  const bool rules = a.temperature >= 0.0f && a.top_k >= 0 && a.top_p > 0.0f && a.top_p <= 1.0f &&
                     a.penalty > 0.0f && a.num_suppressed >= 0 && a.num_stops >= 0;
  const bool given = (a.penalty == 1.0f || (a.history != nullptr && a.history_lengths != nullptr &&
                                            a.history_width > 0)) &&
                     (a.num_suppressed == 0 || a.suppressed != nullptr) &&
                     (a.num_stops == 0 || a.stops != nullptr);
  return shape && rules && given;
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format, that of the logits, which are contiguous and aligned to 16 bytes,
// as is each row; the first `columns` of a row mean something, 65536 are the most. Indices are
// int64: `history` has tokens of the whole vocabulary, `suppressed` and `stops` columns of the row.
// `parts` are [4, rows] doubles: the row's score, its token, the token's scaled logit, the row's
// logsumexp.
//
// A row may be the slice of a vocabulary that starts at `vocab_start`, a multiple of 128. Then
// `edges` say what top-k and top-p keep: ranks would have to agree upon them digit by digit in the
// middle of the kernel. Where they are null the row is whole, and top-k and top-p are of it.
// Temperature 0 takes the most likely token. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_sample(int format, const void* logits, const int64_t* keys,
                                    const int64_t* positions, const int64_t* history,
                                    const int64_t* history_lengths, const float* edges,
                                    const int64_t* suppressed, const int64_t* stops, double* parts,
                                    int rows, int width, int columns, int history_width,
                                    int num_suppressed, int num_stops, int min_new_tokens,
                                    int vocab_start, int top_k, float temperature, float top_p,
                                    float penalty, void* stream) {
  using namespace megachat;
  if (!is_aligned(logits)) return cudaErrorInvalidValue;
  return dispatch_format(format, [=](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const SampleArguments<T> arguments{static_cast<const T*>(logits),
                                       keys,
                                       positions,
                                       history,
                                       history_lengths,
                                       edges,
                                       suppressed,
                                       stops,
                                       parts,
                                       rows,
                                       width,
                                       columns,
                                       history_width,
                                       num_suppressed,
                                       num_stops,
                                       min_new_tokens,
                                       vocab_start,
                                       top_k,
                                       temperature,
                                       top_p,
                                       penalty};
    if (!valid(arguments)) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    const size_t bits = 2 * sizeof(unsigned) * ((columns + 31) / 32);
    MEGACHAT_LAUNCH((sample_kernel<T>), dim3(rows), dim3(kThreads), sizeof(Scratch) + bits,
                    static_cast<cudaStream_t>(stream), arguments);
    return cudaGetLastError();
  });
}
