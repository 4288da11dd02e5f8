// The one place for reductions over the lanes of a warp and the threads of a block.
#pragma once

#include "device.h"

namespace megachat {

// Sum over lanes whose numbers differ in the bits [kFrom, kTo), powers of two; every lane gets it.
template <int kFrom, int kTo>
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int bit = kTo / 2; bit >= kFrom; bit /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, bit, kWarpSize);
  }
  return value;
}

template <int kFrom, int kTo>
__device__ __forceinline__ float lane_max(float value) {
#pragma unroll
  for (int bit = kTo / 2; bit >= kFrom; bit /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, bit, kWarpSize));
  }
  return value;
}

// Sum over the block, whose size is a multiple of the warp; every thread gets the same bits.
// `scratch` has a float for each warp, and is nobody else's until the next barrier after this call.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = lane_sum<1, kWarpSize>(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return lane_sum<1, kWarpSize>(lane < warps ? scratch[lane] : 0.0f);
}

}  // namespace megachat
