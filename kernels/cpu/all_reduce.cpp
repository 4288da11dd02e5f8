// Sums over processes that share a piece of memory.
//
// Each rank puts its message where all can read it, says so, waits until all have, and adds up all
// messages, in float32 and in the order of the ranks: all ranks get the same bits. Two places are
// used in turn. A rank that writes to one for the second time has waited for all ranks in between,
// and these had finished with the first. Flags count calls, so that nothing is ever reset.
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "team.h"
#include "vectors.h"

namespace megachat {
namespace {

constexpr int kYields = 256;        // before it is left to them: whoever is missing is not close
constexpr int64_t kNap = 50000;     // nanoseconds
constexpr int64_t kPatience = 100;  // milliseconds until the caller hears that somebody is missing

using Flag = std::atomic<int64_t>;
static_assert(Flag::is_always_lock_free, "processes share it");

// A flag for each rank, in a cache line of its own, then its two places for messages, rank by rank.
struct Region {
    char* at;
    int64_t ranks;
    int64_t place_bytes;  // of a message at most, whole lines

    Flag& calls(int64_t rank) const { return *reinterpret_cast<Flag*>(at + rank * kLineBytes); }

    char* place(int64_t rank, int64_t call) const {
        return at + ranks * kLineBytes + (2 * rank + call % 2) * place_bytes;
    }
};

int64_t milliseconds() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

// Whether a rank has made a call, after some time at most.
bool has_come(const Flag& calls, int64_t call) {
    for (int spins = 0; spins < kSpins; ++spins) {
        if (calls.load(std::memory_order_acquire) > call) return true;
        pause();
    }
    for (int yields = 0; yields < kYields; ++yields) {
        if (calls.load(std::memory_order_acquire) > call) return true;
        sched_yield();  // the rank that is missing may need this very processor
    }
    for (const int64_t start = milliseconds(); milliseconds() - start < kPatience;) {
        if (calls.load(std::memory_order_acquire) > call) return true;
        const timespec nap{0, kNap};
        nanosleep(&nap, nullptr);
    }
    return false;
}

template <class T>
void post(const T* message, const Region& region, int64_t rank, int64_t count, int64_t call) {
    std::memcpy(region.place(rank, call), message, count * sizeof(T));
    region.calls(rank).store(call + 1, std::memory_order_release);
}

// The first rank that has not come, or -1: then `out` is the sum.
template <class T>
int64_t collect(T* out, const Region& region, int64_t count, int64_t call) {
    for (int64_t rank = 0; rank < region.ranks; ++rank) {
        if (!has_come(region.calls(rank), call)) return rank;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
        const int some = static_cast<int>(count - i);
        Floats total = {};
        for (int64_t rank = 0; rank < region.ranks; ++rank) {
            total += load_first(reinterpret_cast<const T*>(region.place(rank, call)) + i, some);
        }
        store_first(out + i, total, some);
    }
    return -1;
}

}  // namespace
}  // namespace megachat

// Bytes of a region, which is zero before the first call.
extern "C" int64_t megachat_all_reduce_region(int64_t ranks, int64_t place_bytes) {
    return ranks * (megachat::kLineBytes + 2 * place_bytes);
}

// `message` is `count` elements, at most `place_bytes` of them; `call` counts from 0. What is in
// `message` may change afterwards.
#define MEGACHAT_ALL_REDUCE(SUFFIX, TYPE)                                                        \
    extern "C" void megachat_all_reduce_post_##SUFFIX(const TYPE* message, char* region,         \
                                                      int64_t ranks, int64_t place_bytes,        \
                                                      int64_t rank, int64_t count,               \
                                                      int64_t call) {                            \
        megachat::post(message, {region, ranks, place_bytes}, rank, count, call);                \
    }                                                                                            \
    extern "C" int64_t megachat_all_reduce_collect_##SUFFIX(TYPE* out, char* region,             \
                                                            int64_t ranks, int64_t place_bytes,  \
                                                            int64_t count, int64_t call) {       \
        return megachat::collect(out, {region, ranks, place_bytes}, count, call);                \
    }

MEGACHAT_ALL_REDUCE(float32, float)
MEGACHAT_ALL_REDUCE(bfloat16, megachat::BFloat16)
