// The one place for cp.async: copies from global to shared memory that go on while a thread works.
//
//   copy_async(shared, global, valid);  16 bytes, both aligned to 16; zeros where not `valid`, and
//                                       `global` is then not read
//   commit_copies();                    what this thread has issued since the last time is a group
//   wait_for_copies<kPending>();        until at most the last `kPending` groups are under way
//
// Only the thread that issued a copy sees it after its wait; other threads need a barrier as well,
// and one before the next copy to the same place.
#pragma once

#include "device.h"

#ifdef __CUDACC__

namespace megachat {

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace megachat

#else
#include "../emulator/async_copy.h"
#endif
