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

// One vector's bytes of `Rows` rows times those of `Tokens` tokens.
template <class T, int Rows, int Tokens>
__attribute__((always_inline)) inline void add_step(const float*& x, const T* weight,
                                                    int64_t row_stride,
                                                    Floats (&total)[Tokens * Rows]) {
    add_part<T, 0, Rows, Tokens>(x, weight, row_stride, -1, total);
    if constexpr (kParts<T> == 2) {
        add_part<T, 1, Rows, Tokens>(x, weight, row_stride, -1, total);
    }
    x += kParts<T> * Tokens * kLanes;
}

// What a call of `add_products` fetches meanwhile: its share of each row of the next block. Memory
// delivers more to several streams than to one; so one row of each group is fetched at a time, side
// by side. That asks for most lines more than once, which is faster than doing so sparingly.
class Ahead {
public:
    // The share of call `call` of those for `passes` over a block `[kBlockRows][width]` at `next`.
    template <class T>
    static Ahead of(const T* next, int64_t row_stride, int64_t width, int64_t passes,
                    int64_t call) {
        Ahead ahead;
        ahead.row_bytes_ = row_stride * static_cast<int64_t>(sizeof(T));
        // A step reads a vector of three rows, and all calls together fetch four groups of three.
        ahead.advance_ = kLanes * static_cast<int64_t>(sizeof(float)) * kRows / kGroups / passes;
        ahead.pairs_ = (width / (2 * Inputs<T>::kStep) + kRows - 1) / kRows;
        ahead.left_ = ahead.pairs_;
        ahead.at_ = reinterpret_cast<const char*>(next) + call * 2 * ahead.pairs_ * ahead.advance_;
        return ahead;
    }

    template <int Step>
    void fetch() const {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
            __builtin_prefetch(at_ + Step * advance_ + g * kRows * row_bytes_, 0, 2);
        }
    }

    // After two steps.
    void advance() {
        at_ += 2 * advance_;
        if (--left_ > 0) return;
        at_ += row_bytes_ - 2 * pairs_ * advance_;
        left_ = pairs_;
    }

private:
    const char* at_;
    int64_t row_bytes_;
    int64_t advance_;  // bytes of a row for each step
    int64_t pairs_;    // of steps for each of a group's rows
    int64_t left_;
};

// sums += the products of `Rows` rows with `Tokens` tokens over `width` inputs.
template <class T, int Rows, int Tokens>
inline void add_products(const float* x, const T* weight, int64_t row_stride, int64_t width,
                         Ahead ahead, bool is_first, float* sums) {
    constexpr int64_t kStep = Inputs<T>::kStep;
    Floats total[Tokens * Rows] = {};
    if (!is_first) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) total[t * Rows + r] = load(sums + Sums::place(t, r));
        }
    }
    int64_t i = 0;
    for (; i + 2 * kStep <= width; i += 2 * kStep) {
        ahead.fetch<0>();
        add_step<T, Rows, Tokens>(x, weight + i, row_stride, total);
        ahead.fetch<1>();
        add_step<T, Rows, Tokens>(x, weight + i + kStep, row_stride, total);
        ahead.advance();
    }
    for (; i + kStep <= width; i += kStep) {
        add_step<T, Rows, Tokens>(x, weight + i, row_stride, total);
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        add_part<T, 0, Rows, Tokens>(x, weight + i, row_stride, rest, total);
        if constexpr (kParts<T> == 2) {
            add_part<T, 1, Rows, Tokens>(x, weight + i, row_stride, rest, total);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) store(sums + Sums::place(t, r), total[t * Rows + r]);
    }
}

template <class T, int Rows>
inline void add_tokens(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                       int64_t width, const Ahead& ahead, bool is_first, float* sums) {
    switch (tokens) {
        case 1:
            return add_products<T, Rows, 1>(x, weight, row_stride, width, ahead, is_first, sums);
        case 2:
            return add_products<T, Rows, 2>(x, weight, row_stride, width, ahead, is_first, sums);
        case 3:
            return add_products<T, Rows, 3>(x, weight, row_stride, width, ahead, is_first, sums);
        default:
            return add_products<T, Rows, kTokens>(x, weight, row_stride, width, ahead, is_first,
                                                  sums);
    }
}

}  // namespace

template <class T>
void FewTokens<T>::add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                             int64_t rows, int64_t width, const T* next, bool is_first,
                             float* sums) {
    const int64_t passes = (tokens + kTokens - 1) / kTokens;
    const int64_t part = Inputs<T>::padded(width) * kTokens;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t token = pass * kTokens;
        const int64_t count = std::min<int64_t>(kTokens, tokens - token);
        for (int64_t first = 0; first < rows; first += kRows) {
            const Ahead ahead =
                Ahead::of(next, row_stride, width, passes, pass * kGroups + first / kRows);
            const T* from = weight + first * row_stride;
            float* to = sums + Sums::place(token, first);
            switch (rows - first) {
                case 1:
                    add_tokens<T, 1>(x + pass * part, count, from, row_stride, width, ahead,
                                     is_first, to);
                    break;
                case 2:
                    add_tokens<T, 2>(x + pass * part, count, from, row_stride, width, ahead,
                                     is_first, to);
                    break;
                default:
                    add_tokens<T, kRows>(x + pass * part, count, from, row_stride, width, ahead,
                                         is_first, to);
            }
        }
    }
}

template struct FewTokens<float>;
template struct FewTokens<BFloat16>;

}  // namespace megachat
