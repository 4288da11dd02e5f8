// Sums of small messages over the ranks of a tensor group whose devices map each other's memory.
//
// One shot: each rank puts its message where all can read it, says so, waits until all have, and
// adds up all messages, in fp32 and in the order of the ranks: all ranks get the same bits.
//
// A block deals with one slice of the message. It has a place for it in the rank's region, flags and
// a count of its calls, all its own, so that it waits for the block of the same number on the other
// ranks only. It tells by the count, not by resetting anything, which call a flag belongs to:
// a launch can be captured and replayed. Two places are used in turn. A rank that writes to one for
// the second time has waited for all ranks in between, and these had finished with the first.
#include "../include/numeric.h"
#include "../include/peer_flag.h"

namespace megachat {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlocks = 64;  // so that all are resident: blocks of two ranks wait for each other
constexpr int kMaxRanks = 8;
constexpr int64_t kMaxBytes = 1 << 20;

// What a region begins with; the places, [blocks][2][packs], follow.
struct Header {
  unsigned calls[kMaxBlocks];
  unsigned flags[kMaxBlocks][kMaxRanks];  // the call for which the message of a rank is there
};
static_assert(sizeof(Header) % 16 == 0, "places are aligned");

template <typename T>
struct AllReduceArguments {
  Header* regions[kMaxRanks];
  Header* own;
  const T* in;
  T* out;  // may be `in`
  int rank, ranks;
  int packs;        // of 16 bytes, in the message
  int slice;        // of which a block has so many
  int place_packs;  // and room for so many
};

// The region of a rank that threads differ in: indexed at run time, the array would go to the stack.
template <int kMostRanks, typename T>
__device__ __forceinline__ Header* region_of(const AllReduceArguments<T>& a, int rank) {
  Header* region = a.regions[0];
#pragma unroll
  for (int r = 1; r < kMostRanks; ++r) {
    if (r == rank) region = a.regions[r];
  }
  return region;
}

__device__ __forceinline__ uint4* place_of(Header* region, size_t place) {
  return reinterpret_cast<uint4*>(region + 1) + place;
}

template <typename T, int kMostRanks>
__global__ void __launch_bounds__(kThreads)
    all_reduce_kernel(const AllReduceArguments<T> a) {
  const int block = blockIdx.x, thread = threadIdx.x;
  const int begin = block * a.slice, end = min(begin + a.slice, a.packs);
  const unsigned call = a.own->calls[block] + 1;
  const size_t place = (static_cast<size_t>(block) * 2 + call % 2) * a.place_packs;

  uint4* const message = place_of(a.own, place);
  for (int i = begin + thread; i < end; i += kThreads) {
    message[i - begin] = load_raw(a.in + static_cast<size_t>(i) * kPack<T>);
  }
  __syncthreads();
  if (thread < a.ranks) {
    set_flag(&region_of<kMostRanks>(a, thread)->flags[block][a.rank], call);
    // The other may be one call ahead; the count may start again at zero.
    while (static_cast<int>(read_flag(&a.own->flags[block][thread]) - call) < 0) {
    }
  }
  __syncthreads();
  if (thread == 0) a.own->calls[block] = call;

  for (int i = begin + thread; i < end; i += kThreads) {
    uint4 raw[kMostRanks];
#pragma unroll
    for (int r = 0; r < kMostRanks; ++r) {
      if (r < a.ranks) raw[r] = place_of(a.regions[r], place)[i - begin];
    }
    float sum[kPack<T>];
    unpack<T>(raw[0], sum);
#pragma unroll
    for (int r = 1; r < kMostRanks; ++r) {
      if (r >= a.ranks) break;
      float part[kPack<T>];
      unpack<T>(raw[r], part);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) sum[k] += part[k];
    }
    store_pack(a.out + static_cast<size_t>(i) * kPack<T>, sum);
  }
}

constexpr int blocks_for(int packs) {
  const int blocks = (packs + kThreads - 1) / kThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

constexpr int packs_of_block(int packs, int blocks) { return (packs + blocks - 1) / blocks; }

// Room of a block for any message of up to so many packs: a smaller one may have fewer blocks with
// as many packs as threads.
constexpr int room_for(int most_packs) {
  const int slice = packs_of_block(most_packs, kMaxBlocks);
  return slice < kThreads ? kThreads : slice;
}

template <typename T>
int launch(const AllReduceArguments<T>& a, cudaStream_t stream) {
  const dim3 grid(blocks_for(a.packs));
  if (a.ranks <= 2) {
    MEGACHAT_LAUNCH((all_reduce_kernel<T, 2>), grid, dim3(kThreads), 0, stream, a);
  } else if (a.ranks <= 4) {
    MEGACHAT_LAUNCH((all_reduce_kernel<T, 4>), grid, dim3(kThreads), 0, stream, a);
  } else {
    MEGACHAT_LAUNCH((all_reduce_kernel<T, kMaxRanks>), grid, dim3(kThreads), 0, stream, a);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace megachat

// Bytes of the region that each rank provides for messages of up to `capacity` bytes; 0 if that is
// more than this kernel is for. It is set to zero before the first call, which no rank makes before
// all have done that.
MEGACHAT_EXPORT size_t megachat_all_reduce_region(int64_t capacity) {
  using namespace megachat;
  if (capacity <= 0 || capacity > kMaxBytes) return 0;
  const int packs = static_cast<int>((capacity + 15) / 16);
  return sizeof(Header) + static_cast<size_t>(blocks_for(packs)) * 2 * room_for(packs) * 16;
}

// All ranks make the same calls in the same order, on one stream each, with their own `in` and `out`:
// `elements` of the megachat::Format `format`, aligned to 16 bytes and a multiple of that, at most
// `capacity` bytes. `regions` is an array on the host of the ranks' regions as this device sees them,
// each made for `capacity`. Returns a cudaError_t.
MEGACHAT_EXPORT int megachat_all_reduce(int format, const void* in, void* out, void* const* regions,
                                        int rank, int ranks, int64_t elements, int64_t capacity,
                                        void* stream) {
  using namespace megachat;
  if (ranks < 2 || ranks > kMaxRanks || rank < 0 || rank >= ranks || elements < 0 ||
      capacity <= 0 || capacity > kMaxBytes || !is_aligned(in) || !is_aligned(out)) {
    return cudaErrorInvalidValue;
  }
  for (int r = 0; r < ranks; ++r) {
    if (regions[r] == nullptr || !is_aligned(regions[r])) return cudaErrorInvalidValue;
  }
  return dispatch_format(format, [=](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    if (elements % kPack<T> != 0 || elements > capacity / static_cast<int>(sizeof(T))) {
      return cudaErrorInvalidValue;
    }
    if (elements == 0) return cudaSuccess;
    AllReduceArguments<T> arguments = {};
    for (int r = 0; r < ranks; ++r) arguments.regions[r] = static_cast<Header*>(regions[r]);
    arguments.own = arguments.regions[rank];
    arguments.in = static_cast<const T*>(in);
    arguments.out = static_cast<T*>(out);
    arguments.rank = rank;
    arguments.ranks = ranks;
    arguments.packs = static_cast<int>(elements / kPack<T>);
    arguments.slice = packs_of_block(arguments.packs, blocks_for(arguments.packs));
    arguments.place_packs = room_for(static_cast<int>((capacity + 15) / 16));
    return launch(arguments, static_cast<cudaStream_t>(stream));
  });
}
