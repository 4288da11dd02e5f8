// What include/peer_flag.h means on the emulator: a reader lets others run first, so that a loop
// around it ends.
#pragma once

#include "simt.h"

namespace megachat {

inline unsigned read_flag(const unsigned* flag, simt::Site site = simt::here()) {
  simt::poll(site);
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

inline void set_flag(unsigned* flag, unsigned value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  simt::note_progress();
  simt::interleave();
}

}  // namespace megachat
