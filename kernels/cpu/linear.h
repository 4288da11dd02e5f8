// Products of the tokens of a step with a large weight, which stays as training and resharding
// store it: `[tiles][out][in / tiles]` with any strides of tiles and rows.
//
// Reading the weight bounds products of few tokens, arithmetic those of many: there are two ways to
// compute a block of the weight. Either way each thread lays out the inputs, which are small, for
// itself in the order in which they will be read; a block of the weight, some rows by some inputs,
// lies in a cache while all tokens pass over it, and the next block is on its way from memory:
// fetching is spread evenly over the arithmetic, so that neither waits for the other.
#pragma once

#include "few_tokens.h"
#include "many_tokens.h"
#include "team.h"

namespace megachat {

// Tokens from which on vectors of them are the faster way, though the last one is not full.
constexpr int64_t kMany = kLanes + kLanes / 2;

// Rows [first, first + rows) of a product, rows <= kBlockRows; fetches the first block of row
// `next_row` towards the end. `inputs` are laid out, `sums` is memory.
template <class Way, class T, class Finish>
void multiply_rows(const float* inputs, int64_t tokens, const Matrix<T>& weight, int64_t first,
                   int64_t rows, int64_t next_row, float* sums, T* out, int64_t out_stride,
                   const Finish& finish) {
    for (int64_t tile = 0; tile < weight.tiles; ++tile) {
        const T* row = weight.data + tile * weight.tile_stride + first * weight.row_stride;
        for (int64_t i = 0; i < weight.width; i += kInputs) {
            const int64_t width = std::min(kInputs, weight.width - i);
            const T* next = row + i + kInputs;
            if (i + kInputs >= weight.width) {
                next = tile + 1 < weight.tiles ? row + weight.tile_stride
                                               : weight.data + next_row * weight.row_stride;
            }
            Way::add_block(inputs, tokens, row + i, weight.row_stride, rows, width, next,
                           tile == 0 && i == 0, sums);
            inputs += Way::block_floats(tokens, width);
        }
    }
    Way::store_block(sums, tokens, first, rows, out, out_stride, finish);
}

template <class Way, class T, class Finish>
void multiply_by(Team& team, const T* x, int64_t tokens, const Matrix<T>& weight, T* out,
                 int64_t out_stride, const Finish& finish) {
    // Chunks so small that the threads end together, so large that taking one costs nothing.
    const int64_t blocks = (weight.out + kBlockRows - 1) / kBlockRows;
    const int64_t size = std::clamp<int64_t>(blocks / (team.threads() * 32), 1, 8) * kBlockRows;
    const int64_t chunks = tokens > 0 ? (weight.out + size - 1) / size : 0;
    const int64_t floats = Way::input_floats(weight, tokens);
    float* const inputs = workspace(floats + Way::sum_floats(tokens));
    float* const sums = inputs + floats;
    bool is_laid_out = false;
    for (int64_t mine = team.take(), following; mine < chunks; mine = following) {
        // Taken early, so that it can be fetched; but towards the end nobody sits on two chunks.
        const bool is_early = mine + 2 * team.threads() < chunks;
        following = is_early ? team.take() : chunks;
        if (!is_laid_out) Way::lay_out(x, tokens, weight, inputs);
        is_laid_out = true;
        const int64_t end = std::min(weight.out, (mine + 1) * size);
        for (int64_t first = mine * size; first < end; first += kBlockRows) {
            const int64_t after = first + kBlockRows < end ? first + kBlockRows : following * size;
            multiply_rows<Way>(inputs, tokens, weight, first, std::min(kBlockRows, end - first),
                               std::min(after, weight.out - 1), sums, out, out_stride, finish);
        }
        if (!is_early) following = team.take();
    }
    team.meet();
}

// A phase of a team: out `[tokens][out_stride]` = x `[tokens][in]` times the weight, summed in
// float32. `finish(sums, row, count)` turns the sums of `count` rows of the weight from `row` on
// into what is stored.
template <class T, class Finish>
void multiply(Team& team, const T* x, int64_t tokens, const Matrix<T>& weight, T* out,
              int64_t out_stride, const Finish& finish) {
    if (tokens < kMany) {
        multiply_by<FewTokens<T>>(team, x, tokens, weight, out, out_stride, finish);
    } else {
        multiply_by<ManyTokens<T>>(team, x, tokens, weight, out, out_stride, finish);
    }
}

}  // namespace megachat
