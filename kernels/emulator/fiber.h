// The one place for switching stacks: fibers of one OS thread, known to the sanitizers.
//
// x86-64 System V only. A fiber runs until it suspends itself; whoever resumed it then goes on.
// Compiled with -DSIMT_ASAN or -DSIMT_TSAN, every switch is announced to that sanitizer, so that it
// can tell the fibers' stacks (ASan) and their histories (TSan) apart.
#pragma once

#include <cstddef>

namespace simt {

// Stacks for the fibers of one thread block, all of one size, each with a guard page below it.
class StackArena {
 public:
  StackArena() = default;
  ~StackArena() { release(); }
  StackArena(const StackArena&) = delete;
  StackArena& operator=(const StackArena&) = delete;

  // Makes sure that `count` stacks exist. Memory comes straight from mmap, which TSan takes as the
  // start of a new life of these addresses.
  void reserve(size_t count);
  void release();
  // Lowest usable byte of a stack.
  char* bottom(size_t index) const;
  size_t bytes() const;

 private:
  char* memory_ = nullptr;
  size_t count_ = 0;
};

class Fiber {
 public:
  // Gets ready to call `entry()` on a stack; what ran on it before is forgotten.
  void prepare(void (*entry)(), char* stack_bottom, size_t stack_bytes);
  // Forgets what the sanitizer knows of a fiber that finished or was abandoned.
  void retire();
  // Runs the fiber until it suspends. Called from the scheduler's stack only.
  void resume();
  // Goes back to the scheduler. A fiber that is `finished` is not resumed again.
  void suspend(bool finished);
  // The first thing `entry` has to call.
  static void started();

 private:
  void* stack_pointer_ = nullptr;
  char* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  [[maybe_unused]] void* sanitizer_state_ = nullptr;
};

// Edges of the happens-before order, for TSan; nothing in other builds.
void acquire_edge(void* token);
void release_edge(void* token);

}  // namespace simt
