// The one place for threads that work on one thing in phases: `Team`, `together`, `workspace`.
//
// A decode step has some eight phases a layer, each a few microseconds to a few hundred long. One
// parallel region holds them all; between two phases the threads meet at a barrier where they spin,
// because waking a thread up would take longer than most phases do.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace megachat {

constexpr int kLineBytes = 64;  // of a cache
constexpr int kSpins = 4096;  // of who waits, before others may use this processor

// Once round a loop that waits.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

class Team {
public:
    // Of `threads` that run at once; to be told before any of them meets another.
    void gather(int threads) { threads_ = threads; }

    int threads() const { return threads_; }

    // The number of the next piece of work of this phase. Whoever is free takes it: a thread that
    // the system has set aside does not keep the others waiting for its share.
    int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

    // Ends a phase: nobody goes on before all have come.
    void meet() {
        if (threads_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < kSpins) {
                pause();
            } else {
                sched_yield();  // the thread that is missing may need this very processor
            }
        }
    }

private:
    int threads_ = 1;
    alignas(kLineBytes) std::atomic<int64_t> next_{0};
    alignas(kLineBytes) std::atomic<int> arrived_{0};
    alignas(kLineBytes) std::atomic<int> phase_{0};
};

// Runs `work(team)` on each of at most `threads` threads.
template <class Work>
inline void together(int threads, const Work& work) {
    Team team;
    if (threads <= 1) {
        work(team);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.gather(omp_get_num_threads());
        work(team);
    }
}

// Working memory of one thread, kept between calls and overwritten by the next user. It begins
// with a cache line: a vector that lies in two lines is loaded twice.
inline float* workspace(int64_t floats) {
    constexpr std::align_val_t kLine{kLineBytes};
    struct Delete {
        void operator()(float* memory) const { ::operator delete(memory, kLine); }
    };
    thread_local std::unique_ptr<float, Delete> memory;
    thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset(static_cast<float*>(::operator new(floats * sizeof(float), kLine)));
        size = floats;
    }
    return memory.get();
}

}  // namespace megachat
