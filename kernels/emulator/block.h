// The one place for a thread block: its threads, shared memory, barrier, collectives and copies.
//
// The order that TSan is told: __syncthreads and __syncwarp order the threads that meet there.
// Shuffles, ballots, tensor-core operations and atomics order nothing, as in CUDA's memory model.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

constexpr unsigned kWholeWarp = 0xffffffffu;

enum class State { kReady, kAtBarrier, kInCollective, kFinished };

// The lanes of one mask meeting, again and again. Two sets of values, since a fast lane may hand in
// its next value before a slow one has read the last.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  Site site{};
  uint64_t values[2][kWarpSize] = {};
};

class Block;

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  ThreadIndices indices;
  Block* block = nullptr;
  unsigned number = 0;  // within the block
  Site site{};          // where it waits, or polls
  bool polls = false;
  Meeting* meeting = nullptr;
  std::vector<AsyncCopy> issued;              // cp.async since the last commit
  std::deque<std::vector<AsyncCopy>> groups;  // committed, not landed

  int lane() const { return static_cast<int>(number % kWarpSize); }
};

// What all blocks of a launch have in common.
struct Shape {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;

  size_t threads() const { return static_cast<size_t>(block.x) * block.y * block.z; }
  size_t blocks() const { return static_cast<size_t>(grid.x) * grid.y * grid.z; }
};

std::string describe(Site site);
std::string describe(const dim3& index);

// What a block asks of whoever runs its threads.
class Scheduler {
 public:
  // Suspends the running thread, which goes on when it is ready and its turn comes.
  virtual void suspend() = 0;
  // As `suspend`, where the order of threads is random; nothing otherwise.
  virtual void interleave() = 0;
  // Something happened that a waiting thread may have waited for.
  virtual void note_progress() = 0;
  // Ends everything with a report that names the running thread.
  [[noreturn]] virtual void fail(const std::string& what, Site site) = 0;

 protected:
  ~Scheduler() = default;
};

class Block {
 public:
  // `stacks` has one for each thread; `entry` is what each fiber calls.
  Block(const Shape& shape, size_t index, std::unique_ptr<StackArena> stacks, void (*entry)(),
        Scheduler& scheduler);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Called by the running thread.
  void barrier(Thread& thread, Site site);
  // Waits for all lanes of the mask; returns which set of values is theirs.
  unsigned meet(Thread& thread, unsigned mask, uint64_t value, Site site, bool orders_memory,
                Meeting** met);
  void finish(Thread& thread);

  unsigned char* shared() const { return shared_.get(); }
  bool owns(const void* address, size_t bytes) const;

  std::vector<Thread>& threads() { return threads_; }
  const Shape& shape() const { return shape_; }
  size_t live() const { return live_; }
  // Tells the sanitizer that the threads are gone, and hands the stacks back.
  std::unique_ptr<StackArena> retire();

 private:
  struct FreeDeleter {
    void operator()(void* memory) const { free(memory); }
  };

  void wait(Thread& thread, State state, Site site);
  void release_barrier();
  Meeting& meeting_of(const Thread& thread, unsigned mask, Site site);

  const Shape& shape_;
  Scheduler& scheduler_;
  std::unique_ptr<StackArena> stacks_;
  std::unique_ptr<unsigned char, FreeDeleter> shared_;
  std::vector<Thread> threads_;
  std::vector<std::deque<Meeting>> warps_;  // a deque, since threads point into it
  size_t live_, at_barrier_ = 0;
  Site barrier_site_{};
  // Used in turn: a fast thread may arrive at the next barrier before a slow one has left the last,
  // and must not seem to be ordered with it.
  char barrier_tokens_[2] = {};
  unsigned barrier_generation_ = 0;
};

}  // namespace simt
