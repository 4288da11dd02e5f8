// Products of few tokens with a large weight, as a decode step has them: bound by reading weights.
//
// The weight stays as training and resharding store it, `[tiles][out][in / tiles]` with any strides
// of tiles and rows: its rows are the streams that the memory delivers best, so nothing is packed.
#include <algorithm>

#include "vectors.h"

namespace megachat {
namespace {

constexpr int kRows = 3;           // of the weight, read together
constexpr int kTokens = 4;         // 12 sums, 3 weights and an input fill 16 vector registers
constexpr int64_t kInputs = 1536;  // of a pass: the rows at hand stay in the first-level cache
constexpr int kAhead = 512;        // bytes between what is read and what is fetched

struct Product {
    const float* x;  // [tokens][tiles * width]
    int64_t tokens;
    int64_t tiles;
    int64_t out;
    int64_t width;  // inputs of a tile
    int64_t tile_stride;
    int64_t row_stride;
};

// Adds to sums[token][row] the products of `Rows` rows with `Tokens` tokens over `width` inputs.
template <class T, int Rows, int Tokens>
inline void add_products(const float* x, int64_t x_stride, const T* weight, int64_t row_stride,
                         int64_t width, float* sums, bool fetch) {
    Floats total[Rows][Tokens] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        Floats row[Rows];
        for (int r = 0; r < Rows; ++r) {
            const T* at = weight + r * row_stride + i;
            if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
            row[r] = load(at);
        }
        for (int t = 0; t < Tokens; ++t) {
            const Floats input = load(x + t * x_stride + i);
            for (int r = 0; r < Rows; ++r) total[r][t] += row[r] * input;
        }
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        for (int r = 0; r < Rows; ++r) {
            const Floats row = load_first(weight + r * row_stride + i, rest);
            for (int t = 0; t < Tokens; ++t) {
                total[r][t] += row * load_first(x + t * x_stride + i, rest);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < Tokens; ++t) sums[t * kRows + r] += sum(total[r][t]);
    }
}

template <class T, int Rows>
inline void add_tokens(const Product& product, const float* x, const T* weight, int64_t width,
                       float* sums) {
    const int64_t stride = product.tiles * product.width;
    int64_t token = 0;
    for (; token + kTokens <= product.tokens; token += kTokens) {
        add_products<T, Rows, kTokens>(x + token * stride, stride, weight, product.row_stride,
                                       width, sums + token * kRows, token == 0);
    }
    const float* rest = x + token * stride;
    float* to = sums + token * kRows;
    switch (product.tokens - token) {
        case 3:
            return add_products<T, Rows, 3>(rest, stride, weight, product.row_stride, width, to,
                                            token == 0);
        case 2:
            return add_products<T, Rows, 2>(rest, stride, weight, product.row_stride, width, to,
                                            token == 0);
        case 1:
            return add_products<T, Rows, 1>(rest, stride, weight, product.row_stride, width, to,
                                            token == 0);
    }
}

template <class T>
void multiply(const Product& product, const T* weight, T* out, int threads) {
    const int64_t groups = (product.out + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads)
    {
        float* sums = new float[product.tokens * kRows];
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = group * kRows;
            const int rows = static_cast<int>(std::min<int64_t>(kRows, product.out - first));
            std::fill(sums, sums + product.tokens * kRows, 0.0f);
            for (int64_t tile = 0; tile < product.tiles; ++tile) {
                for (int64_t i = 0; i < product.width; i += kInputs) {
                    const int64_t width = std::min(kInputs, product.width - i);
                    const float* x = product.x + tile * product.width + i;
                    const T* from =
                        weight + tile * product.tile_stride + first * product.row_stride + i;
                    if (rows == 3) add_tokens<T, 3>(product, x, from, width, sums);
                    if (rows == 2) add_tokens<T, 2>(product, x, from, width, sums);
                    if (rows == 1) add_tokens<T, 1>(product, x, from, width, sums);
                }
            }
            for (int64_t token = 0; token < product.tokens; ++token) {
                for (int row = 0; row < rows; ++row) {
                    store_first(out + token * product.out + first + row,
                                all(sums[token * kRows + row]), 1);
                }
            }
        }
        delete[] sums;
    }
}

}  // namespace
}  // namespace megachat

// out [tokens][out] = x [tokens][tiles * width] times the weight, summed in float32, rounded once.
#define MEGACHAT_LINEAR(NAME, TYPE)                                                              \
    extern "C" void NAME(const float* x, const TYPE* weight, TYPE* out, int64_t tokens,          \
                         int64_t tiles, int64_t rows, int64_t width, int64_t tile_stride,        \
                         int64_t row_stride, int threads) {                                      \
        megachat::multiply<TYPE>({x, tokens, tiles, rows, width, tile_stride, row_stride},       \
                                 weight, out, threads);                                          \
    }

MEGACHAT_LINEAR(megachat_tiled_linear_float32, float)
MEGACHAT_LINEAR(megachat_tiled_linear_bfloat16, megachat::BFloat16)
