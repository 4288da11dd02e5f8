#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#endif
#ifdef SIMT_ASAN
extern "C" {
void __asan_unpoison_memory_region(const volatile void* start, size_t bytes);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
}
#endif

// Saves the callee-saved registers and the stack pointer, loads those of the other side.
asm(R"(
.text
.globl simt_switch_stacks
.hidden simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
)");
extern "C" void simt_switch_stacks(void** save_pointer, void* load_pointer);

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kSavedRegisters = 6;

void* scheduler_pointer = nullptr;
#ifdef SIMT_TSAN
void* scheduler_state = nullptr;
constexpr unsigned kNoSynchronisation = 1;
#endif
#ifdef SIMT_ASAN
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;
#endif

}  // namespace

void StackArena::reserve(size_t count) {
  if (count_ >= count) return;
  release();
  void* memory = mmap(nullptr, count * (kPage + kStackBytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("simt: no memory for the stacks of a thread block");
    abort();
  }
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect(bottom(i) - kPage, kPage, PROT_NONE);
}

void StackArena::release() {
  if (memory_ != nullptr) munmap(memory_, count_ * (kPage + kStackBytes));
  memory_ = nullptr;
  count_ = 0;
}

char* StackArena::bottom(size_t index) const {
  return memory_ + index * (kPage + kStackBytes) + kPage;
}

size_t StackArena::bytes() const { return kStackBytes; }

void Fiber::prepare(void (*entry)(), char* stack_bottom, size_t stack_bytes) {
  stack_bottom_ = stack_bottom;
  stack_bytes_ = stack_bytes;
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(stack_bottom, stack_bytes);
  sanitizer_state_ = nullptr;
#endif
#ifdef SIMT_TSAN
  sanitizer_state_ = __tsan_create_fiber(0);
#endif
  // The frame that simt_switch_stacks pops: registers, then the address it returns to. The slot
  // above is where a caller's return address would be, which aligns the stack as the ABI wants.
  void** top = reinterpret_cast<void**>(stack_bottom + stack_bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::retire() {
#ifdef SIMT_TSAN
  __tsan_destroy_fiber(sanitizer_state_);
  sanitizer_state_ = nullptr;
#endif
}

void Fiber::resume() {
#ifdef SIMT_TSAN
  scheduler_state = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_state_, kNoSynchronisation);
#endif
#ifdef SIMT_ASAN
  void* scheduler_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_bottom_, stack_bytes_);
#endif
  simt_switch_stacks(&scheduler_pointer, stack_pointer_);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend([[maybe_unused]] bool finished) {
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(scheduler_state, kNoSynchronisation);
#endif
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &sanitizer_state_, scheduler_bottom,
                                 scheduler_bytes);
#endif
  simt_switch_stacks(&stack_pointer_, scheduler_pointer);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(sanitizer_state_, &scheduler_bottom, &scheduler_bytes);
#endif
}

void Fiber::started() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
}

void acquire_edge([[maybe_unused]] void* token) {
#ifdef SIMT_TSAN
  __tsan_acquire(token);
#endif
}

void release_edge([[maybe_unused]] void* token) {
#ifdef SIMT_TSAN
  __tsan_release(token);
#endif
}

}  // namespace simt
