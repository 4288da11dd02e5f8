// The one place for tensor cores: 16-bit tiles from shared memory, and their product in fp32.
//
// A tile is spread over the registers of a whole warp, which calls these together. With
// group = lane / 4 and place = lane % 4, a register holds the two elements
//   a[r], 16 x 16:  row group + 8 (r % 2), columns 2 place + 8 (r / 2) and the next
//   b[r], 16 x 8:   rows 2 place + 8 r and the next, column group
//   d[i], 16 x 8:   row group + 8 (i / 2), column 2 place + i % 2         (fp32, one element)
//
//   load_matrices(registers, row)             as many 8 x 8 matrices as registers, 2 or 4: lane
//                                             8 m + i names row i of matrix m, 16 bytes, aligned
//   load_matrices_transposed(registers, row)  the same, of the transposed matrices
//   multiply_add<T>(d, a, b)                  d += a b
//
// `a` of a row-major tile is load_matrices of its four quarters in the order of the registers; `b`
// of a row-major [n, k] tile is load_matrices, of a row-major [k, n] tile the transposed one.
#pragma once

#include "numeric.h"

#ifdef __CUDACC__

namespace megachat {

__device__ __forceinline__ void load_matrices(unsigned (&registers)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&registers)[2], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&registers)[4],
                                                         const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&registers)[2],
                                                         const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  static_assert(std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>, "16-bit formats only");
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace megachat

#else
#include "../emulator/tensor_core.h"
#endif
