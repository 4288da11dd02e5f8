// Products of few tokens: a vector holds neighbouring inputs, its sums are added up at the end.
//
// An instruction reads a vector of the weight or multiplies one, for up to four tokens at a time.
#pragma once

#include "matrix.h"

namespace megachat {

constexpr int kRows = 3;    // of the weight, read together: a group
constexpr int kTokens = 4;  // 12 sums, 3 weights and an input fill 16 vector registers
constexpr int kGroups = kBlockRows / kRows;

// The sums of a block, `[tokens][kBlockRows]` vectors, each of which is added up in the end.
class Sums {
public:
    static constexpr int64_t floats(int64_t tokens) { return place(tokens, 0); }

    static constexpr int64_t place(int64_t token, int64_t row) {
        return (token * kBlockRows + row) * kLanes;
    }

    // Those of a token's rows [row, row + count), count <= kLanes, a row in a lane.
    static Floats of(const float* sums, int64_t token, int64_t row, int count) {
        const float* from = sums + place(token, row);
        Floats parts[kLanes] = {};
        // The sum of vector i ends up in lane `lane_of_sum(i)`, which is its own inverse.
        if (count == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) parts[lane_of_sum(i)] = load(from + i * kLanes);
        } else {
            for (int i = 0; i < count; ++i) parts[lane_of_sum(i)] = load(from + i * kLanes);
        }
        return sums_of<kLanes>(parts);
    }
};

// How a thread lays out its inputs: for each block of inputs of each tile, for each `kTokens`
// tokens, part by part of the block, a vector of each token. Zeros fill the last part up.
template <class T>
struct Inputs {
    static constexpr int64_t kStep = kLanes * kParts;

    static int64_t padded(int64_t width) { return (width + kStep - 1) / kStep * kStep; }

    static int64_t floats(const Matrix<T>& weight, int64_t tokens) {
        return weight.tiles * tokens * (weight.width / kInputs * padded(kInputs) +
                                        padded(weight.width % kInputs));
    }

    // x `[tokens][in]`, in the weight's order of tiles.
    static void lay_out(const T* x, int64_t tokens, const Matrix<T>& weight, float* to) {
        for (int64_t tile = 0; tile < weight.tiles; ++tile) {
            for (int64_t start = 0; start < weight.width; start += kInputs) {
                const int64_t width = std::min(kInputs, weight.width - start);
                const T* from = x + tile * weight.width + start;
                for (int64_t token = 0; token < tokens; token += kTokens) {
                    const int64_t count = std::min<int64_t>(kTokens, tokens - token);
                    to = lay_out_some(from + token * weight.in(), weight.in(), count, width, to);
                }
            }
        }
    }

private:
    static float* lay_out_some(const T* x, int64_t stride, int64_t count, int64_t width,
                               float* to) {
        for (int64_t i = 0; i < width; i += kStep) {
            for (int64_t token = 0; token < count; ++token) {
                const T* from = x + token * stride + i;
                lay_out_part<0>(from, static_cast<int>(width - i), to + token * kLanes);
                lay_out_part<1>(from, static_cast<int>(width - i), to + (count + token) * kLanes);
            }
            to += count * kParts * kLanes;
        }
        return to;
    }

    template <int Part>
    static void lay_out_part(const T* from, int count, float* to) {
        store(to, count >= kStep ? load_part<Part>(from) : load_first_part<Part>(from, count));
    }
};

// How `multiply` computes products of few tokens.
template <class T>
struct FewTokens {
    static int64_t input_floats(const Matrix<T>& weight, int64_t tokens) {
        return Inputs<T>::floats(weight, tokens);
    }

    static int64_t block_floats(int64_t tokens, int64_t width) {
        return tokens * Inputs<T>::padded(width);
    }

    static int64_t sum_floats(int64_t tokens) { return Sums::floats(tokens); }

    static void lay_out(const T* x, int64_t tokens, const Matrix<T>& weight, float* to) {
        Inputs<T>::lay_out(x, tokens, weight, to);
    }

    // As that of `ManyTokens`.
    static void add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                          int64_t rows, int64_t width, const T* next, bool is_first, float* sums);

    template <class Finish>
    static void store_block(const float* sums, int64_t tokens, int64_t first, int64_t rows, T* out,
                            int64_t out_stride, const Finish& finish) {
        if (rows == kBlockRows) {  // the compiler then knows how many, and leaves branches out
            store_rows(sums, tokens, first, kBlockRows, out, out_stride, finish);
        } else {
            store_rows(sums, tokens, first, rows, out, out_stride, finish);
        }
    }

private:
    template <class Finish>
    __attribute__((always_inline)) static void store_rows(const float* sums, int64_t tokens,
                                                          int64_t first, int64_t rows, T* out,
                                                          int64_t out_stride,
                                                          const Finish& finish) {
        for (int64_t token = 0; token < tokens; ++token) {
#pragma GCC unroll 3
            for (int64_t row = 0; row < rows; row += kLanes) {
                // The last ones once more with those before them, sooner than alone.
                if (rows >= kLanes) row = std::min(row, rows - kLanes);
                const int count = static_cast<int>(std::min<int64_t>(kLanes, rows - row));
                store_first(out + token * out_stride + first + row,
                            finish(Sums::of(sums, token, row, count), first + row, count), count);
            }
        }
    }
};

}  // namespace megachat
