// Products of many tokens: a vector holds neighbouring tokens, and nothing is added up across it.
//
// An element of the weight is read for up to four vectors and multiplied with each of them: half an
// instruction or less for each multiplication, where there are two vectors of tokens or more.
#pragma once

#include "matrix.h"

namespace megachat {

// How `multiply` computes products of many tokens. Inputs are laid out, for each block of inputs of
// each tile, pass by pass: `[width][vectors][kLanes]`, with zeros for tokens that are not there.
// Sums are `[rows][vectors][kLanes]`, a pass after the other.
template <class T>
struct ManyTokens {
    static constexpr int64_t kVectors = 4;  // of tokens in a pass at most

    static int64_t vectors(int64_t tokens) { return (tokens + kLanes - 1) / kLanes; }

    static int64_t input_floats(const Matrix<T>& weight, int64_t tokens) {
        return block_floats(tokens, weight.in());
    }

    static int64_t block_floats(int64_t tokens, int64_t width) {
        return width * vectors(tokens) * kLanes;
    }

    static int64_t sum_floats(int64_t tokens) { return block_floats(tokens, kBlockRows); }

    // Calls `work(first, count)` for the vectors of each pass. Passes are as equal as can be, so
    // that no vector is alone unless it is the only one.
    template <class Work>
    static void for_passes(int64_t tokens, const Work& work) {
        const int64_t all = vectors(tokens), passes = (all + kVectors - 1) / kVectors;
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t first = pass * all / passes;
            work(first, (pass + 1) * all / passes - first);
        }
    }

    static void lay_out(const T* x, int64_t tokens, const Matrix<T>& weight, float* to);

    // sums += the products of a block, `rows` <= kBlockRows rows by `width` <= kInputs inputs, with
    // all tokens, or sums = them for the first block of these rows; fetches the block at `next`
    // meanwhile.
    static void add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                          int64_t rows, int64_t width, const T* next, bool is_first, float* sums);

    template <class Finish>
    static void store_block(const float* sums, int64_t tokens, int64_t first, int64_t rows, T* out,
                            int64_t out_stride, const Finish& finish) {
        for_passes(tokens, [&](int64_t vector, int64_t count) {
            const float* from = sums + vector * kBlockRows * kLanes;
            for (int64_t v = 0; v < count; ++v) {
                const int64_t token = (vector + v) * kLanes;
                store_vector(from + v * kLanes, count * kLanes,
                             std::min<int64_t>(kLanes, tokens - token), first, rows,
                             out + token * out_stride + first, out_stride, finish);
            }
        });
    }

private:
    // The sums of a vector's tokens, each row `stride` after the one before it.
    template <class Finish>
    static void store_vector(const float* sums, int64_t stride, int64_t tokens, int64_t first,
                             int64_t rows, T* out, int64_t out_stride, const Finish& finish) {
        for (int64_t row = 0; row < rows; row += kLanes) {
            // The last ones once more with those before them, sooner than alone.
            if (rows >= kLanes) row = std::min(row, rows - kLanes);
            const int count = static_cast<int>(std::min<int64_t>(kLanes, rows - row));
            Floats by_token[kLanes] = {};
            for (int r = 0; r < count; ++r) by_token[r] = load(sums + (row + r) * stride);
            transpose(by_token);
            for (int64_t token = 0; token < tokens; ++token) {
                store_first(out + token * out_stride + row,
                            finish(by_token[token], first + row, count), count);
            }
        }
    }
};

}  // namespace megachat
