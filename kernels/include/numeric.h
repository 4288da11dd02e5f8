// The one place for number formats in kernels: 16-byte packs of them, to fp32 and back.
#pragma once

#include <type_traits>

#include "device.h"

namespace megachat {

// Formats as callers name them; the numbers are part of the launchers' interface.
enum class Format : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

// Elements in one 16-byte access, the widest a thread can make.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// What a 32-bit word holds, as fp32.
__device__ __forceinline__ void unpack_word(const float*, unsigned word, float* out) {
  out[0] = __uint_as_float(word);
}
__device__ __forceinline__ void unpack_word(const Bfloat16*, unsigned word, float* out) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(const Float16*, unsigned word, float* out) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

// fp32 values as a 32-bit word, rounded to nearest even.
__device__ __forceinline__ unsigned pack_word(const float*, const float* in) {
  return __float_as_uint(in[0]);
}
__device__ __forceinline__ unsigned pack_word(const Bfloat16*, const float* in) {
  const unsigned low = __bfloat16_as_ushort(__float2bfloat16_rn(in[0]));
  const unsigned high = __bfloat16_as_ushort(__float2bfloat16_rn(in[1]));
  return low | high << 16;
}
__device__ __forceinline__ unsigned pack_word(const Float16*, const float* in) {
  const unsigned low = __half_as_ushort(__float2half_rn(in[0]));
  const unsigned high = __half_as_ushort(__float2half_rn(in[1]));
  return low | high << 16;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(value)) << 16);
}
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_float(float value, Bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void from_float(float value, Float16* out) {
  *out = __float2half_rn(value);
}

// One 16-byte read; `address` is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 load_raw(const T* address) {
  return *reinterpret_cast<const uint4*>(address);
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 raw, float (&out)[kPack<T>]) {
  constexpr int kPerWord = kPack<T> / 4;
  const T* format = nullptr;
  unpack_word(format, raw.x, out);
  unpack_word(format, raw.y, out + kPerWord);
  unpack_word(format, raw.z, out + 2 * kPerWord);
  unpack_word(format, raw.w, out + 3 * kPerWord);
}

template <typename T>
__device__ __forceinline__ void load_pack(const T* address, float (&out)[kPack<T>]) {
  unpack<T>(load_raw(address), out);
}

// One 16-byte write; `address` is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void store_pack(T* address, const float (&in)[kPack<T>]) {
  constexpr int kPerWord = kPack<T> / 4;
  const T* format = nullptr;
  *reinterpret_cast<uint4*>(address) =
      make_uint4(pack_word(format, in), pack_word(format, in + kPerWord),
                 pack_word(format, in + 2 * kPerWord), pack_word(format, in + 3 * kPerWord));
}

// Rounds to the format and back.
template <typename T>
__device__ __forceinline__ void round_pack(float (&values)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    T rounded;
    from_float(values[i], &rounded);
    values[i] = to_float(rounded);
  }
}

// max(value, 0), but NaN stays NaN.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls `run` with a null pointer of the format's type; its result is the launcher's.
template <typename Run>
int dispatch_format(int format, Run run) {
  switch (static_cast<Format>(format)) {
    case Format::kFloat32:
      return run(static_cast<float*>(nullptr));
    case Format::kBfloat16:
      return run(static_cast<Bfloat16*>(nullptr));
    case Format::kFloat16:
      return run(static_cast<Float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Calls `run` with the head size as a constant: those of the OPT family, and 96.
template <typename Run>
int dispatch_head_dim(int head_dim, Run run) {
  switch (head_dim) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 80:
      return run(std::integral_constant<int, 80>{});
    case 96:
      return run(std::integral_constant<int, 96>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace megachat
