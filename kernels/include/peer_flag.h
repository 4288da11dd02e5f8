// The one place for flags by which blocks and devices wait for each other, in memory that all see.
//
// What a thread wrote before `set_flag` is seen by whoever has read the flag's new value with
// `read_flag`. A barrier before the one and after the other extends that to their blocks. Blocks
// that wait for each other must be resident at once: the launcher has to keep its grid that small.
#pragma once

#include "device.h"

#ifdef __CUDACC__

namespace megachat {

__device__ __forceinline__ unsigned read_flag(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void set_flag(unsigned* flag, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

}  // namespace megachat

#else
#include "../emulator/peer_flag.h"
#endif
