// Kernels that use every feature of the emulator rightly, and some that misuse it. Test data.
#include "../../kernels/include/numeric.h"

namespace megachat {
namespace {

__global__ void misuse_kernel(int what, float* out) {
  const int thread = threadIdx.x;
  switch (what) {
    case 1:  // two places for one barrier
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:  // half a warp never comes
      if (thread % 32 < 16) out[thread] = __shfl_xor_sync(kWholeWarp, 1.0f, 1, kWarpSize);
      if (thread % 32 >= 16) __syncthreads();
      break;
    case 3:  // reads a lane that the mask leaves out
      if (thread % 32 < 16) out[thread] = __shfl_sync(0xffffu, 1.0f, 20, kWarpSize);
      break;
    case 4:  // calls without being in the mask
      __syncwarp(0xfffeu);
      break;
    case 5:  // two collectives for one mask
      if (thread % 2 == 0) {
        __syncwarp(kWholeWarp);
      } else {
        out[thread] = __ballot_sync(kWholeWarp, true);
      }
      break;
    case 6:  // a warp that has returned is named
      if (thread % 32 == 5) return;
      __syncwarp(kWholeWarp);
      break;
  }
}

// out: [0, 64) shuffles with width 8, [64, 128) ballots, [128] and [129] atomics, [130, 194) what
// shared memory held before anyone wrote, [194, 258) the neighbour's value by way of shared memory,
// [258] a word whose bits atomics have set.
__global__ void use_kernel(float* out) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x;
  out[130 + thread] = values[thread];
  const float own = static_cast<float>(thread);
  const float down = __shfl_down_sync(kWholeWarp, own, 3, 8);
  const float up = __shfl_up_sync(kWholeWarp, own, 3, 8);
  out[thread] = down + 1000.0f * up;
  out[64 + thread] = static_cast<float>(__ballot_sync(kWholeWarp, thread % 32 < 3));
  atomicAdd(&out[128], own);
  atomicMax(&out[129], own);
  atomicOr(reinterpret_cast<unsigned*>(&out[258]), 1u << thread % 16);
  values[thread] = own;
  __syncthreads();
  out[194 + thread] = values[(thread + 1) % blockDim.x];
}

// Appends thread numbers in the order in which they get there.
__global__ void order_kernel(int* next, int* out) {
  const int place = atomicAdd(next, 1);
  out[place] = blockIdx.x * blockDim.x + threadIdx.x;
}

// Threads of a warp race unless `barrier`; blocks race where they write the same place.
__global__ void race_kernel(int barrier, int same_place, float* out) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1.0f;
  if (barrier) __syncwarp(kWholeWarp);
  const float neighbour = values[(threadIdx.x + 1) % blockDim.x];
  out[same_place ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x] = neighbour;
}

}  // namespace
}  // namespace megachat

using namespace megachat;

MEGACHAT_EXPORT int probe_misuse(int what, float* out) {
  MEGACHAT_LAUNCH(misuse_kernel, dim3(2), dim3(64), 0, nullptr, what, out);
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_use(float* out) {
  MEGACHAT_LAUNCH(use_kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, out);
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_order(int* next, int* out) {
  MEGACHAT_LAUNCH(order_kernel, dim3(3), dim3(40), 0, nullptr, next, out);
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_race(int barrier, int same_place, int shared_floats, float* out) {
  MEGACHAT_LAUNCH(race_kernel, dim3(2), dim3(32), shared_floats * sizeof(float), nullptr, barrier,
                  same_place, out);
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_configuration(int threads, int grid_y, int shared_bytes, float* out) {
  MEGACHAT_LAUNCH(use_kernel, dim3(1, grid_y), dim3(threads), shared_bytes, nullptr, out);
  return cudaGetLastError();
}
