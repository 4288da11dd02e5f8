// The one place for how the attention kernels find tokens in pages, and for their limits.
#pragma once

#include "device.h"

namespace megachat {

constexpr int64_t kMaxReach = 1 << 24;  // tokens that PageDivider is exact for
constexpr int kMinBlockSize = 16, kMaxBlockSize = 256;
constexpr float kLog2E = 1.4426950408889634f;  // softmax is computed in base 2

// token / block_size by multiplication: exact while token x (excess of the multiplier) < 2^32, and
// the excess is at most block_size.
struct PageDivider {
  unsigned block_size, multiplier;

  explicit PageDivider(int size)
      : block_size(size), multiplier(static_cast<unsigned>((1ull << 32) / size + 1)) {}
  __device__ __forceinline__ unsigned page(unsigned token) const {
    return __umulhi(token, multiplier);
  }
  // Where a token of a row lies in a cache of [blocks, block_size].
  __device__ __forceinline__ size_t slot(const int32_t* table, unsigned token) const {
    const unsigned in_table = page(token);
    return static_cast<size_t>(table[in_table]) * block_size + (token - in_table * block_size);
  }
};

inline bool valid_pages(int columns, int block_size) {
  return columns >= 0 && block_size >= kMinBlockSize && block_size <= kMaxBlockSize &&
         static_cast<int64_t>(columns) * block_size <= kMaxReach;
}

}  // namespace megachat
