// The arithmetic of products of few tokens.
#include "few_tokens.h"

namespace megachat {
namespace {

// total[token][row] += one part of `Rows` rows times that of `Tokens` tokens, x `[token][lanes]`.
// At the end of the rows only `rest` elements of them are left.
template <class T, int Part, int Rows, int Tokens>
inline void add_part(const float* x, const T* weight, int64_t row_stride, int rest,
                     Floats (&total)[Tokens * Rows]) {
    Floats row[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
        const T* at = weight + r * row_stride;
        row[r] = rest < 0 ? load_part<Part>(at) : load_first_part<Part>(at, rest);
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
        const Floats input = load(x + (Part * Tokens + t) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) multiply_add(total[t * Rows + r], row[r], input);
    }
}

// sums += the products of `Rows` rows with `Tokens` tokens over `width` inputs.
template <class T, int Rows, int Tokens>
inline void add_products(const float* x, const T* weight, int64_t row_stride, int64_t width,
                         const Ahead& ahead, float* sums) {
    constexpr int64_t kStep = Inputs<T>::kStep;
    Floats total[Tokens * Rows] = {};
    const char* fetch = ahead.at;
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) __builtin_prefetch(fetch + r * ahead.row_bytes, 0, 2);
        fetch += ahead.advance;
        add_part<T, 0, Rows, Tokens>(x, weight + i, row_stride, -1, total);
        if constexpr (kParts<T> == 2) {
            add_part<T, 1, Rows, Tokens>(x, weight + i, row_stride, -1, total);
        }
        x += kParts<T> * Tokens * kLanes;
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        add_part<T, 0, Rows, Tokens>(x, weight + i, row_stride, rest, total);
        if constexpr (kParts<T> == 2) {
            add_part<T, 1, Rows, Tokens>(x, weight + i, row_stride, rest, total);
        }
    }
    // Copies, so that the totals themselves are never looked at in memory.
    Floats done[Tokens * Rows];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens * Rows; ++t) done[t] = total[t];
    constexpr int kFull = Tokens * Rows / kLanes, kRest = Tokens * Rows % kLanes;
    for (int v = 0; v < kFull; ++v) {
        float* to = sums + v * kLanes;
        store(to, load(to) + sums_of<kLanes>(done + v * kLanes));
    }
    if constexpr (kRest > 0) {
        float* to = sums + kFull * kLanes;
        store(to, load(to) + sums_of<kRest>(done + kFull * kLanes));
    }
}

template <class T, int Rows>
inline void add_tokens(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                       int64_t width, const Ahead& ahead, float* sums) {
    switch (tokens) {
        case 1:
            return add_products<T, Rows, 1>(x, weight, row_stride, width, ahead, sums);
        case 2:
            return add_products<T, Rows, 2>(x, weight, row_stride, width, ahead, sums);
        case 3:
            return add_products<T, Rows, 3>(x, weight, row_stride, width, ahead, sums);
        default:
            return add_products<T, Rows, kTokens>(x, weight, row_stride, width, ahead, sums);
    }
}

}  // namespace

template <class T>
void FewTokens<T>::add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                             int64_t rows, int64_t width, const T* next, float* sums) {
    const int64_t passes = (tokens + kTokens - 1) / kTokens;
    const int64_t part = Inputs<T>::padded(width) * kTokens;
    const int64_t share = width * static_cast<int64_t>(sizeof(T)) / passes;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t token = pass * kTokens;
        const int64_t count = std::min<int64_t>(kTokens, tokens - token);
        for (int64_t first = 0; first < rows; first += kRows) {
            const Ahead ahead{reinterpret_cast<const char*>(next + first * row_stride) +
                                  pass * share,
                              row_stride * static_cast<int64_t>(sizeof(T)),
                              kLanes * static_cast<int64_t>(sizeof(float)) / passes};
            const T* from = weight + first * row_stride;
            float* to = sums + Sums::place(pass, first / kRows);
            switch (rows - first) {
                case 1:
                    add_tokens<T, 1>(x + pass * part, count, from, row_stride, width, ahead, to);
                    break;
                case 2:
                    add_tokens<T, 2>(x + pass * part, count, from, row_stride, width, ahead, to);
                    break;
                default:
                    add_tokens<T, kRows>(x + pass * part, count, from, row_stride, width, ahead,
                                         to);
            }
        }
    }
}

template struct FewTokens<float>;
template struct FewTokens<BFloat16>;

}  // namespace megachat
