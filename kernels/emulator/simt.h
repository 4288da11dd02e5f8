// The CUDA subset that the kernels use, on the CPU: names, types and intrinsics. For tests only.
//
// Every CUDA thread is a fiber. A fiber switches only at barriers, warp collectives, atomics and
// flags, in an order that the test picks (`simt_set_order`). Misuse ends the launch:
// `cudaGetLastError()` then returns `cudaErrorLaunchFailure` and `simt_error()` says what, where
// and which thread. What is not here does not compile, so a kernel cannot use what is not modelled.
//
// A launch has finished when its launcher returns, and its blocks ran one after another. Between
// `simt_defer` and `simt_synchronize`, launches queue up on their streams instead; then the streams
// run at once, each as a device of its own, with all blocks of its current launch resident.
// With `simt_set_patience` other processes are devices, too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

// ---- Types ---------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

using cudaStream_t = void*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

// ---- Conversions and arithmetic ------------------------------------------------------------

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __half2float(__half value) {
  _Float16 half;
  memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
}
inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half result;
  memcpy(&result.bits, &half, sizeof(half));
  return result;
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// ---- The machine ---------------------------------------------------------------------------

namespace simt {

constexpr int kWarpSize = 32;

// Where in the source a barrier, a collective or an atomic stands.
struct Site {
  const char* file;
  int line;
};

struct ThreadIndices {
  dim3 thread, block, block_size, grid_size;
};
extern ThreadIndices indices;  // of the running fiber

// The place of a call, as the default of a function's last parameter.
inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// `body` is what each thread does.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            std::function<void()> body);
unsigned char* dynamic_shared();
cudaError_t take_last_error();

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
// Every lane of the mask hands in a value and gets that of lane `source`.
uint64_t exchange(unsigned mask, uint64_t value, int source, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
// Another thread may run here.
void interleave();
int lane();
// Ends the launch with a report of the running thread.
[[noreturn]] void fail(const std::string& what, Site site);

// What the lanes of a whole warp have handed in.
struct Gathered {
  uint64_t lane[kWarpSize];
};
Gathered gather(uint64_t value, Site site);
// Ends the launch unless an access of so many bytes is aligned and within shared memory.
void check_shared(const void* address, size_t bytes, const char* what, Site site);

// 16 bytes under way to shared memory, zeros if `global` is null. async_copy.h moves them.
struct AsyncCopy {
  uint4* shared;
  const uint4* global;
};
void begin_copy(AsyncCopy copy);
void commit_copies();
// The next copy to land while more than `pending` groups of this thread are under way.
bool take_copy(int pending, AsyncCopy* copy);

// Other threads run before this one looks at a flag again; where none does anything but look, the
// launch ends.
void poll(Site site);
// Something was written that others may poll for.
void note_progress();

// Lane that a shuffle reads: itself where the wanted one lies outside its segment of `width`.
inline int shuffle_source(int wanted, int width) {
  const int segment = lane() & ~(width - 1);
  return wanted >= segment && wanted < segment + width ? wanted : lane();
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                   size_t shared_bytes, void* stream, Arguments... arguments) {
  std::tuple<Parameters...> given{static_cast<Parameters>(arguments)...};
  launch(name, grid, block, shared_bytes, stream,
         [kernel, given = std::move(given)] { std::apply(kernel, given); });
}

template <typename T>
T atomic_update(T* address, T operand, T (*combine)(T, T)) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA has 32- and 64-bit atomics");
  interleave();
  note_progress();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = combine(before, operand);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

}  // namespace simt

#define SIMT_SITE (simt::Site{__FILE__, __LINE__})

#define threadIdx (simt::indices.thread)
#define blockIdx (simt::indices.block)
#define blockDim (simt::indices.block_size)
#define gridDim (simt::indices.grid_size)

#define __syncthreads() simt::block_barrier(SIMT_SITE)
#define __syncwarp(mask) simt::warp_barrier(mask, SIMT_SITE)
#define __ballot_sync(mask, predicate) simt::ballot(mask, predicate, SIMT_SITE)
#define __shfl_sync(mask, value, source, width)                                            \
  simt::shuffle(mask, value, (simt::lane() & ~((width) - 1)) + ((source) & ((width) - 1)), \
                SIMT_SITE)
#define __shfl_xor_sync(mask, value, bits, width) \
  simt::shuffle(mask, value, simt::shuffle_source(simt::lane() ^ (bits), width), SIMT_SITE)
#define __shfl_down_sync(mask, value, delta, width) \
  simt::shuffle(mask, value, simt::shuffle_source(simt::lane() + (delta), width), SIMT_SITE)
#define __shfl_up_sync(mask, value, delta, width) \
  simt::shuffle(mask, value, simt::shuffle_source(simt::lane() - (delta), width), SIMT_SITE)

template <typename T>
T atomicAdd(T* address, T operand) {
  return simt::atomic_update<T>(address, operand, [](T a, T b) -> T { return a + b; });
}
template <typename T>
T atomicMax(T* address, T operand) {
  return simt::atomic_update<T>(address, operand, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T atomicOr(T* address, T operand) {
  return simt::atomic_update<T>(address, operand, [](T a, T b) { return a | b; });
}
template <typename T>
T atomicExch(T* address, T operand) {
  return simt::atomic_update<T>(address, operand, [](T, T b) { return b; });
}

inline cudaError_t cudaGetLastError() { return simt::take_last_error(); }

extern "C" {
// How threads and blocks take turns.
enum simt_order { simt_forward = 0, simt_reverse = 1, simt_random = 2 };
__attribute__((visibility("default"))) void simt_set_order(int order, unsigned seed);
// Flags may lie in memory that other processes write. From now on all blocks of a launch are
// resident, and where its threads only poll, it leaves the processor to others and looks again,
// until none of them has set a flag for so many milliseconds. 0, as at first: nobody else writes.
__attribute__((visibility("default"))) void simt_set_patience(int milliseconds);
// What ended the last launch that failed, one line; "" if none has since `simt_set_order`.
__attribute__((visibility("default"))) const char* simt_error();
// From now on launches wait for `simt_synchronize`, which runs those of different streams at once:
// each stream's one after another, with all its blocks, and no stream waits for another.
__attribute__((visibility("default"))) void simt_defer();
// Returns a cudaError_t, that of the whole.
__attribute__((visibility("default"))) int simt_synchronize();
}
