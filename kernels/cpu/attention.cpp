// Writing keys and values into pages, and attention to them, each as a call of its own.
#include "attention.h"

namespace megachat {
namespace {

template <class T>
void append(const T* qkv, const T* bias, T* keys, T* values, const int64_t* slots, int64_t tokens,
            int64_t heads, int64_t dim, T* query, int threads) {
    const int64_t width = heads * dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        append_heads(qkv + token * 3 * width, bias, keys + slots[token] * width,
                     values + slots[token] * width, query + token * width, dim, 0, heads);
    }
}

}  // namespace
}  // namespace megachat

#define MEGACHAT_ATTENTION(SUFFIX, TYPE)                                                          \
    extern "C" void megachat_kv_append_##SUFFIX(                                                  \
        const TYPE* qkv, const TYPE* bias, TYPE* keys, TYPE* values, const int64_t* slots,        \
        TYPE* query, int64_t tokens, int64_t heads, int64_t dim, int threads) {                   \
        megachat::append(qkv, bias, keys, values, slots, tokens, heads, dim, query, threads);     \
    }                                                                                             \
    extern "C" void megachat_paged_attention_decode_##SUFFIX(                                     \
        const TYPE* query, const TYPE* keys, const TYPE* values, const int32_t* tables,           \
        const int64_t* lengths, TYPE* out, int64_t table_stride, int64_t rows,                    \
        int64_t block_size, int64_t heads, int64_t dim, int threads) {                            \
        megachat::together(threads, [&](megachat::Team& team) {                                   \
            megachat::decode(team, query, keys, values, {tables, table_stride, lengths, rows},    \
                             {block_size, heads, dim}, out, [](int64_t, int64_t, int64_t) {});    \
        });                                                                                       \
    }                                                                                             \
    extern "C" void megachat_paged_attention_prefill_##SUFFIX(                                    \
        const TYPE* query, const TYPE* keys, const TYPE* values, const int32_t* tables,           \
        const int64_t* starts, const int64_t* offsets, TYPE* out, int64_t table_stride,           \
        int64_t chunks, int64_t block_size, int64_t heads, int64_t dim, int threads) {            \
        megachat::prefill(query, keys, values, tables, table_stride, starts, offsets, chunks,     \
                          {block_size, heads, dim}, out, threads);                                \
    }

MEGACHAT_ATTENTION(float32, float)
MEGACHAT_ATTENTION(bfloat16, megachat::BFloat16)
