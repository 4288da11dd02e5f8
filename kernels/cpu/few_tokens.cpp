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

// What a call of `add_products` fetches meanwhile: its share of each row of the next block. Memory
// delivers more to several streams than to one; so one row of each group is fetched at a time, side
// by side. That asks for most lines more than once, which is faster than doing so sparingly.
class Ahead {
public:
    // While a part of a step reads a vector of three rows, as many bytes are to be fetched, from a
    // row of each of four groups: so many of each, if there is one pass.
    template <class T>
    static constexpr int64_t kPartBytes = kLanes * sizeof(T) * kRows / kGroups;

    // The share of the first call of `passes` over a block before `[kBlockRows][width]` at `next`.
    template <class T>
    Ahead(const T* next, int64_t row_stride, int64_t width, int64_t passes)
        : at_(reinterpret_cast<const char*>(next)),
          row_bytes_(row_stride * static_cast<int64_t>(sizeof(T))),
          advance_(kParts * kPartBytes<T> / passes),
          steps_((width / Inputs<T>::kStep + kRows - 1) / kRows),
          left_(steps_) {}

    // The share of another call.
    Ahead of_call(int64_t call) const {
        Ahead ahead = *this;
        ahead.at_ += call * steps_ * advance_;
        return ahead;
    }

    void fetch(int64_t offset) const {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
            __builtin_prefetch(at_ + g * kRows * row_bytes_ + offset, 0, 2);
        }
    }

    // After a step.
    void advance() {
        at_ += advance_;
        if (--left_ > 0) return;
        at_ += row_bytes_ - steps_ * advance_;
        left_ = steps_;
    }

private:
    const char* at_;
    int64_t row_bytes_;
    int64_t advance_;  // bytes of a row for each step
    int64_t steps_;    // for each of a group's rows
    int64_t left_;
};

// sums += the products of `Rows` rows with `Tokens` tokens over `width` inputs, or
// sums = them, of the first inputs.
template <class T, int Rows, int Tokens>
inline void add_products(const float* x, const T* weight, int64_t row_stride, int64_t width,
                         Ahead ahead, bool is_first, float* sums) {
    constexpr int64_t kStep = Inputs<T>::kStep;
    Floats total[Tokens * Rows] = {};
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) {
        ahead.fetch(0);
        add_part<T, 0, Rows, Tokens>(x, weight + i, row_stride, -1, total);
        // A step of bfloat16 reads half as much: one round is enough.
        if constexpr (std::is_same_v<T, float>) ahead.fetch(Ahead::kPartBytes<T>);
        add_part<T, 1, Rows, Tokens>(x, weight + i, row_stride, -1, total);
        ahead.advance();
        x += kParts * Tokens * kLanes;
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        add_part<T, 0, Rows, Tokens>(x, weight + i, row_stride, rest, total);
        add_part<T, 1, Rows, Tokens>(x, weight + i, row_stride, rest, total);
    }
    // Copies, so that the totals themselves stay in registers and never have an address.
    Floats done[Tokens * Rows];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens * Rows; ++t) done[t] = total[t];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            float* to = sums + Sums::place(t, r);
            store(to, is_first ? done[t * Rows + r] : load(to) + done[t * Rows + r]);
        }
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
    const Ahead block(next, row_stride, width, passes);
    // All passes over a group, then the next group: three rows stay in the first-level cache even
    // where rows lie a multiple of 4 KiB apart, of which it holds eight lines at a time.
    for (int64_t first = 0; first < rows; first += kRows) {
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t token = pass * kTokens;
            const int64_t count = std::min<int64_t>(kTokens, tokens - token);
            const Ahead ahead = block.of_call(first / kRows * passes + pass);
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
