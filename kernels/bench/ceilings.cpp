// What a machine can do at best: read memory, multiply and add. Known to `tools/scaling` alone.
#include <omp.h>
#include <time.h>

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kLine = 64;     // bytes
constexpr int64_t kAhead = 1024;  // bytes between what is read and what is fetched
constexpr int kStreams = 4;       // of a thread: one alone leaves banks of the memory idle
constexpr int kChains = 12;       // of dependent operations: more than latency times units

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint64_t Words __attribute__((vector_size(kLine)));

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

// Bytes a second at which `threads` threads read a buffer.
extern "C" double megachat_read_ceiling(const char* buffer, int64_t bytes, int threads) {
    uint64_t found = 0;
    const double start = now();
#pragma omp parallel num_threads(threads) reduction(+ : found)
    {
        const int64_t stream = bytes / omp_get_num_threads() / kStreams / kLine * kLine;
        const char* from = buffer + kStreams * stream * omp_get_thread_num();
        Words sums[kStreams] = {};
        for (int64_t at = 0; at < stream; at += kLine) {
            for (int i = 0; i < kStreams; ++i) {
                const char* here = from + i * stream + at;
                __builtin_prefetch(here + kAhead);
                Words line;
                std::memcpy(&line, here, kLine);
                sums[i] ^= line;
            }
        }
        for (int i = 0; i < kStreams; ++i) found += sums[i][0];
    }
    const double seconds = now() - start;
    volatile uint64_t kept = found;  // or the compiler would leave the reading out
    (void)kept;
    return static_cast<double>(bytes) / seconds;
}

// Operations a second of `threads` threads that multiply and add float32 in registers.
extern "C" double megachat_fma_ceiling(int64_t rounds, int threads) {
    float found = 0;
    const double start = now();
#pragma omp parallel num_threads(threads) reduction(+ : found)
    {
        Floats totals[kChains];
        for (int i = 0; i < kChains; ++i) totals[i] = Floats{} + static_cast<float>(i);
        const Floats factor = Floats{} + 0.999f, term = Floats{} + 0.001f;
        for (int64_t round = 0; round < rounds; ++round) {
            for (int i = 0; i < kChains; ++i) totals[i] = totals[i] * factor + term;
        }
        for (int i = 0; i < kChains; ++i) found += totals[i][0];
    }
    const double seconds = now() - start;
    volatile float kept = found;
    (void)kept;
    return 2.0 * kLanes * kChains * static_cast<double>(rounds) * threads / seconds;
}
