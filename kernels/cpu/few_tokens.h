// Products of few tokens: a vector holds neighbouring inputs, its sums are added up at the end.
//
// An instruction reads a vector of the weight or multiplies one, for up to four tokens at a time.
#pragma once

#include "matrix.h"

namespace megachat {

constexpr int kRows = 3;    // of the weight, read together
constexpr int kTokens = 4;  // 12 sums, 3 weights and an input fill 16 vector registers
constexpr int kGroups = kBlockRows / kRows;

// Vectors for the sums of `kRows` rows and `kTokens` tokens.
constexpr int kSumVectors = (kRows * kTokens + kLanes - 1) / kLanes;

// Where the sum of row r of token t is among them: at `of[t * rows + r]`.
struct SumLanes {
    int of[kRows * kTokens];

    constexpr SumLanes() : of() {
        for (int i = 0; i < kRows * kTokens; ++i) {
            of[i] = i / kLanes * kLanes + lane_of_sum(i % kLanes);
        }
    }
};

constexpr SumLanes kLane;

// The sums of a block for all tokens: for each `kTokens` tokens, for each `kRows` rows, the
// sum of each row and token.
class Sums {
public:
    static int64_t floats(int64_t tokens) {
        return (tokens + kTokens - 1) / kTokens * kGroups * kSumVectors * kLanes;
    }

    static constexpr int64_t place(int64_t pass, int64_t group) {
        return (pass * kGroups + group) * kSumVectors * kLanes;
    }

    // Those of the tokens of a pass, to[token][row].
    static void of_pass(const float* sums, int64_t pass, int64_t tokens, int64_t rows, float* to) {
        const float* from = sums + place(pass, 0);
        if (tokens == kTokens && rows == kBlockRows) return of_full_pass(from, to);
        for (int64_t first = 0; first < rows; first += kRows) {
            const int64_t count = std::min<int64_t>(kRows, rows - first);
            for (int64_t token = 0; token < tokens; ++token) {
                for (int64_t row = 0; row < count; ++row) {
                    to[token * kBlockRows + first + row] =
                        from[place(0, first / kRows) + kLane.of[token * count + row]];
                }
            }
        }
    }

private:
    static void of_full_pass(const float* from, float* to) {
#pragma GCC unroll 4
        for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
            for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) {
                    to[token * kBlockRows + group * kRows + row] =
                        from[place(0, group) + kLane.of[token * kRows + row]];
                }
            }
        }
    }
};

// How a thread lays out its inputs: for each block of inputs of each tile, for each `kTokens`
// tokens, part by part of the block, a vector of each token. Zeros fill the last part up.
template <class T>
struct Inputs {
    static constexpr int64_t kStep = kLanes * kParts<T>;

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
                if constexpr (kParts<T> == 2) {
                    lay_out_part<1>(from, static_cast<int>(width - i),
                                    to + (count + token) * kLanes);
                }
            }
            to += count * kParts<T> * kLanes;
        }
        return to;
    }

    template <int Part>
    static void lay_out_part(const T* from, int count, float* to) {
        store(to, count >= kStep ? load_part<Part>(from) : load_first_part<Part>(from, count));
    }
};

// What `finish` makes of one token's sums of `rows` rows from `first` on.
template <class T, class Finish>
inline void store_rows(const float* sums, int64_t first, int64_t rows, T* to,
                       const Finish& finish) {
    for (int64_t row = 0; row < rows; row += kLanes) {
        // The last ones once more with those before them, sooner than alone.
        if (rows >= kLanes) row = std::min(row, rows - kLanes);
        const int count = static_cast<int>(rows - row);
        store_first(to + row, finish(load_first(sums + row, count), first + row, count), count);
    }
}

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

    static void add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                          int64_t rows, int64_t width, const T* next, float* sums);

    template <class Finish>
    static void store_block(const float* sums, int64_t tokens, int64_t first, int64_t rows, T* out,
                            int64_t out_stride, const Finish& finish) {
        for (int64_t token = 0; token < tokens; token += kTokens) {
            const int64_t count = std::min<int64_t>(kTokens, tokens - token);
            float results[kTokens * kBlockRows];
            Sums::of_pass(sums, token / kTokens, count, rows, results);
            for (int64_t t = 0; t < count; ++t) {
                store_rows(results + t * kBlockRows, first, rows,
                           out + (token + t) * out_stride + first, finish);
            }
        }
    }
};

}  // namespace megachat
