// The one place for random numbers in kernels: those of megachat/ops/philox.py, word by word.
//
// Philox 4x32-10: ten rounds turn a counter of four words under a key of two into four random
// words. A number is named by what it is for: the key of a request, a position in its response, a
// stream, and an index in the stream.
#pragma once

#include "device.h"

namespace megachat {

// The random 32-bit word `index` of a stream; the four words of a counter have indices in a row.
__device__ __forceinline__ unsigned philox_word(uint64_t key, unsigned position, unsigned stream,
                                                unsigned index) {
  constexpr int kRounds = 10;
  constexpr unsigned kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr unsigned kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
  unsigned counter[4] = {index / 4, stream, position, 0};
  unsigned key0 = static_cast<unsigned>(key), key1 = static_cast<unsigned>(key >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const unsigned high0 = __umulhi(counter[0], kMultiplier0), low0 = counter[0] * kMultiplier0;
    const unsigned high1 = __umulhi(counter[2], kMultiplier1), low1 = counter[2] * kMultiplier1;
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += kStep0;
    key1 += kStep1;
  }
  const unsigned word = index % 4;
  return word < 2 ? (word == 0 ? counter[0] : counter[1]) : (word == 2 ? counter[2] : counter[3]);
}

// Standard Gumbel noise of a uniform number in (0, 1), a multiple of 2^-33.
__device__ __forceinline__ double gumbel(unsigned word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 2.3283064365386962890625e-10;
  return -log(-log(uniform));
}

}  // namespace megachat
