// Asynchronous copies and tensor cores, used rightly and wrongly. Test data.
#include "../../kernels/include/async_copy.h"
#include "../../kernels/include/tensor_core.h"

namespace megachat {
namespace {

// One product of fragments, as they lie in the registers of 32 lanes.
template <typename T>
__global__ void fragments_kernel(const unsigned* a, const unsigned* b, float* d) {
  unsigned left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[threadIdx.x * 4 + i];
  multiply_add<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sums[i];
}

// `rows` is [32, 8] of 16 bits. out: for each lane 4 registers, those of an x2 load in front.
__global__ void load_kernel(int matrices, int transposed, int valid_rows,
                            const unsigned short* rows, unsigned* out) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  auto* const tile = reinterpret_cast<unsigned short*>(shared);
  const int lane = threadIdx.x;
  copy_async(tile + lane * 8, rows + lane * 8, lane < valid_rows);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp(kWholeWarp);
  if (matrices == 4) {
    unsigned registers[4];
    if (transposed) {
      load_matrices_transposed(registers, tile + lane * 8);
    } else {
      load_matrices(registers, tile + lane * 8);
    }
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = registers[i];
  } else {
    unsigned registers[2];
    if (transposed) {
      load_matrices_transposed(registers, tile + lane * 8);
    } else {
      load_matrices(registers, tile + lane * 8);
    }
    for (int i = 0; i < 2; ++i) out[lane * 4 + i] = registers[i];
  }
}

// out [16, 16] = x [16, width] times the transposed of w [16, width], bf16 in, by two warps with
// eight columns each and two stages of 16 x 16 tiles.
template <int kPending, bool kBarrierAfterWait, bool kBarrierAfterUse>
__global__ void pipeline_kernel(int width, const Bfloat16* x, const Bfloat16* w, float* out) {
  constexpr int kTile = 16 * 16;
  MEGACHAT_DYNAMIC_SHARED(shared);
  auto* const stages = reinterpret_cast<Bfloat16*>(shared);  // [2][x and w][16][16]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto copy_stage = [&](int step) {
    const int row = lane / 2, column = lane % 2 * 8;
    const Bfloat16* const source = warp == 0 ? x : w;
    copy_async(stages + (step % 2 * 2 + warp) * kTile + row * 16 + column,
               source + row * width + step * 16 + column);
    commit_copies();
  };
  float sums[4] = {};
  copy_stage(0);
  for (int step = 0; step < width / 16; ++step) {
    if (step + 1 < width / 16) {
      copy_stage(step + 1);
      wait_for_copies<kPending>();
    } else {
      wait_for_copies<0>();
    }
    if (kBarrierAfterWait) __syncthreads();
    const Bfloat16* const left = stages + step % 2 * 2 * kTile;
    const Bfloat16* const right = left + kTile + warp * 8 * 16;
    unsigned a[4], b[2];
    load_matrices(a, left + lane % 16 * 16 + lane / 16 * 8);
    load_matrices(b, right + lane % 8 * 16 + lane / 8 % 2 * 8);
    multiply_add<Bfloat16>(sums, a, b);
    if (kBarrierAfterUse) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    out[(lane / 4 + i / 2 * 8) * 16 + warp * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

__global__ void misuse_kernel(int what, const unsigned short* rows, float* out) {
  MEGACHAT_DYNAMIC_SHARED(shared);
  auto* const tile = reinterpret_cast<unsigned short*>(shared);
  unsigned a[4] = {}, b[2] = {};
  float d[4] = {};
  switch (what) {
    case 1:  // copies to memory that is not shared
      copy_async(out, rows);
      break;
    case 2:  // copies from an address between packs
      copy_async(tile, rows + 1);
      break;
    case 3:  // loads a row between packs
      load_matrices(b, tile + threadIdx.x * 4);
      break;
    case 4:  // loads a row behind the end
      load_matrices(a, tile + 8 + threadIdx.x * 8);
      break;
    case 5:  // multiplies in a part of the warp
      if (threadIdx.x < 16) multiply_add<Bfloat16>(d, a, b);
      break;
  }
  out[threadIdx.x] = d[0] + static_cast<float>(a[0] + b[0]);
}

}  // namespace
}  // namespace megachat

using namespace megachat;

MEGACHAT_EXPORT int probe_fragments(int format, const unsigned* a, const unsigned* b, float* d) {
  if (format == static_cast<int>(Format::kBfloat16)) {
    MEGACHAT_LAUNCH(fragments_kernel<Bfloat16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
  } else {
    MEGACHAT_LAUNCH(fragments_kernel<Float16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
  }
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_load(int matrices, int transposed, int valid_rows,
                               const unsigned short* rows, unsigned* out) {
  MEGACHAT_LAUNCH(load_kernel, dim3(1), dim3(32), 512, nullptr, matrices, transposed, valid_rows,
                  rows, out);
  return cudaGetLastError();
}
// fault: 0 none, 1 waits too little, 2 no barrier after the wait, 3 none after the use.
MEGACHAT_EXPORT int probe_pipeline(int fault, int width, const Bfloat16* x, const Bfloat16* w,
                                   float* out) {
  auto* const kernel = fault == 0   ? pipeline_kernel<1, true, true>
                       : fault == 1 ? pipeline_kernel<2, true, true>
                       : fault == 2 ? pipeline_kernel<1, false, true>
                                    : pipeline_kernel<1, true, false>;
  MEGACHAT_LAUNCH(kernel, dim3(1), dim3(64), 4 * 512, nullptr, width, x, w, out);
  return cudaGetLastError();
}
MEGACHAT_EXPORT int probe_tensor_misuse(int what, int threads, const unsigned short* rows,
                                        float* out) {
  MEGACHAT_LAUNCH(misuse_kernel, dim3(1), dim3(threads), 512, nullptr, what, rows, out);
  return cudaGetLastError();
}
