// The one place for what a kernel needs from its compiler: CUDA's own names under nvcc, and the
// same names from the emulator (kernels/emulator, tests only) under a host compiler.
//
// Three things differ in the source, so they are macros here:
//   MEGACHAT_LAUNCH((kernel<T, 64>), grid, block, shared_bytes, stream, arguments...)
//   MEGACHAT_DYNAMIC_SHARED(name): `unsigned char* name`, aligned to 16 bytes
//   a `mask` and a `width` are always written out in warp intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MEGACHAT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define MEGACHAT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#else

#include "../emulator/simt.h"

#define MEGACHAT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch_kernel(kernel, #kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define MEGACHAT_DYNAMIC_SHARED(name) unsigned char* name = simt::dynamic_shared()

#endif

#define MEGACHAT_EXPORT extern "C" __attribute__((visibility("default")))

namespace megachat {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

}  // namespace megachat
