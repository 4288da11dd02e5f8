// Adds the QKV bias, writes keys and values into their pages, and queries to a tensor of their own.
//
// A thread moves one 16-byte pack; everything is read and written once. Rounding is that of the
// plain addition: the sum in fp32, rounded once.
#include "../include/numeric.h"

namespace megachat {
namespace {

constexpr int kThreads = 128;

template <typename T>
struct AppendArguments {
  const T* qkv;          // [tokens, heads, 3, head_dim]: query, key, value of a head side by side
  const T* bias;         // [heads, 3, head_dim]
  T* query;              // [tokens, heads, head_dim]
  T* keys;               // [slots, heads, head_dim]
  T* values;             // [slots, heads, head_dim]
  const int64_t* slots;  // [tokens]
  int heads;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const AppendArguments<T> a) {
  constexpr int kHeadPacks = kHeadDim / kPack<T>;
  const int token = blockIdx.x;
  const int pack = blockIdx.y * kThreads + threadIdx.x;
  if (pack >= a.heads * 3 * kHeadPacks) return;
  const int head = pack / (3 * kHeadPacks);
  const int part = pack / kHeadPacks % 3;
  const int column = pack % kHeadPacks * kPack<T>;

  float sum[kPack<T>], bias[kPack<T>];
  const size_t row = static_cast<size_t>(token) * a.heads * 3 * kHeadDim;
  load_pack(a.qkv + row + pack * kPack<T>, sum);
  load_pack(a.bias + pack * kPack<T>, bias);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) sum[i] += bias[i];

  T* const out = part == 0 ? a.query : part == 1 ? a.keys : a.values;
  const size_t place = part == 0 ? static_cast<size_t>(token) : static_cast<size_t>(a.slots[token]);
  store_pack(out + (place * a.heads + head) * kHeadDim + column, sum);
}

template <typename T, int kHeadDim>
int launch(const AppendArguments<T>& arguments, int tokens, cudaStream_t stream) {
  const int packs = arguments.heads * 3 * kHeadDim / kPack<T>;
  const dim3 grid(tokens, (packs + kThreads - 1) / kThreads);
  MEGACHAT_LAUNCH((kv_append_kernel<T, kHeadDim>), grid, dim3(kThreads), 0, stream, arguments);
  return cudaGetLastError();
}

}  // namespace
}  // namespace megachat

// `format` is a megachat::Format; tensors are contiguous, aligned to 16 bytes, and of that format
// but for `slots`, int64, each `block x block_size + offset` of a token and no two equal. Returns a
// cudaError_t.
MEGACHAT_EXPORT int megachat_kv_append(int format, const void* qkv, const void* bias, void* query,
                                       void* keys, void* values, const int64_t* slots, int tokens,
                                       int heads, int head_dim, void* stream) {
  using namespace megachat;
  if (tokens < 0 || heads <= 0) return cudaErrorInvalidValue;
  for (const void* pointer : {qkv, bias, static_cast<const void*>(query),
                              static_cast<const void*>(keys), static_cast<const void*>(values)}) {
    if (!is_aligned(pointer)) return cudaErrorInvalidValue;
  }
  if (tokens == 0) return cudaSuccess;
  return dispatch_format(format, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AppendArguments<T> arguments{static_cast<const T*>(qkv),
                                       static_cast<const T*>(bias),
                                       static_cast<T*>(query),
                                       static_cast<T*>(keys),
                                       static_cast<T*>(values),
                                       slots,
                                       heads};
    return dispatch_head_dim(head_dim, [&](auto size) {
      return launch<T, decltype(size)::value>(arguments, tokens, static_cast<cudaStream_t>(stream));
    });
  });
}
