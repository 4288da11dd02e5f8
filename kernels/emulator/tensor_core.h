// What include/tensor_core.h means on the emulator, which includes this after numeric.h.
//
// Each lane collects from the others what it needs for its own registers. Products are added in
// fp32 in the order of k; a GPU's order and inner precision are its own.
#pragma once

#include "../include/numeric.h"

namespace megachat {

// The row addresses of a whole warp, of which the first 8 `matrices` count.
inline simt::Gathered matrix_rows(const void* row, int matrices, simt::Site site) {
  if (simt::lane() < 8 * matrices) simt::check_shared(row, 16, "ldmatrix reads", site);
  return simt::gather(reinterpret_cast<uintptr_t>(row), site);
}

template <int kMatrices>
void load_matrices(unsigned (&registers)[kMatrices], const void* row,
                   simt::Site site = simt::here()) {
  static_assert(kMatrices == 2 || kMatrices == 4, "ldmatrix .x2 or .x4");
  const simt::Gathered rows = matrix_rows(row, kMatrices, site);
  const int group = simt::lane() / 4, place = simt::lane() % 4;
  for (int m = 0; m < kMatrices; ++m) {
    registers[m] = reinterpret_cast<const unsigned*>(rows.lane[8 * m + group])[place];
  }
}

template <int kMatrices>
void load_matrices_transposed(unsigned (&registers)[kMatrices], const void* row,
                              simt::Site site = simt::here()) {
  static_assert(kMatrices == 2 || kMatrices == 4, "ldmatrix .x2 or .x4");
  const simt::Gathered rows = matrix_rows(row, kMatrices, site);
  const int group = simt::lane() / 4, place = simt::lane() % 4;
  for (int m = 0; m < kMatrices; ++m) {
    const uint64_t* const first = rows.lane + 8 * m + 2 * place;
    const unsigned low = reinterpret_cast<const uint16_t*>(first[0])[group];
    const unsigned high = reinterpret_cast<const uint16_t*>(first[1])[group];
    registers[m] = low | high << 16;
  }
}

template <typename T>
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  simt::Site site = simt::here()) {
  static_assert(std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>, "16-bit formats only");
  const auto both = [](unsigned low, unsigned high) { return low | uint64_t{high} << 32; };
  // Registers of one row of `a`, and of one column of `b`: k below 8 in the low word, above in the
  // high one.
  const simt::Gathered upper = simt::gather(both(a[0], a[2]), site);
  const simt::Gathered lower = simt::gather(both(a[1], a[3]), site);
  const simt::Gathered columns = simt::gather(both(b[0], b[1]), site);
  const int group = simt::lane() / 4, place = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const uint64_t* const row = (i < 2 ? upper : lower).lane + 4 * group;
    const uint64_t* const column = columns.lane + 4 * (2 * place + i % 2);
    for (int word = 0; word < 8; ++word) {  // two elements each, in the order of k
      const int shift = word < 4 ? 0 : 32;
      float left[2], right[2];
      unpack_word(static_cast<T*>(nullptr), static_cast<unsigned>(row[word % 4] >> shift), left);
      unpack_word(static_cast<T*>(nullptr), static_cast<unsigned>(column[word % 4] >> shift),
                  right);
      d[i] += left[0] * right[0];
      d[i] += left[1] * right[1];
    }
  }
}

}  // namespace megachat
