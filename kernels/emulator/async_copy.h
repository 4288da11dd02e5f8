// What include/async_copy.h means on the emulator.
//
// A copy lands at the wait that asks for it and not before; from its issue until then its
// destination is NaN. So a kernel that reads too early, or issues a copy to what another thread
// still reads, computes NaN. All accesses are made here, where the sanitizers watch, and not in the
// runtime: a copy counts as written by its thread, at its issue and when it lands.
#pragma once

#include "simt.h"

namespace megachat {

inline void copy_async(void* shared, const void* global, bool valid = true,
                       simt::Site site = simt::here()) {
  simt::check_shared(shared, 16, "cp.async writes", site);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    simt::fail("cp.async reads an address that is not aligned to 16 bytes", site);
  }
  auto* const destination = static_cast<uint4*>(shared);
  if (valid) {
    // Read here, too, so that an access outside the source is reported where it was asked for.
    const auto* const source = static_cast<const volatile uint64_t*>(global);
    static_cast<void>(source[0]);
    static_cast<void>(source[1]);
  }
  *destination = make_uint4(~0u, ~0u, ~0u, ~0u);
  simt::begin_copy({destination, valid ? static_cast<const uint4*>(global) : nullptr});
}

inline void commit_copies() { simt::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  static_assert(kPending >= 0, "a number of groups");
  simt::AsyncCopy copy;
  while (simt::take_copy(kPending, &copy)) {
    *copy.shared = copy.global != nullptr ? *copy.global : make_uint4(0, 0, 0, 0);
  }
}

}  // namespace megachat
