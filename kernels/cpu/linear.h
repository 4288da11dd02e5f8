// Products of few tokens with a large weight, as a decode step has them: bound by reading weights.
//
// The weight stays as training and resharding store it, `[tiles][out][in / tiles]` with any strides
// of tiles and rows. The inputs, which are small, are laid out by each thread for itself in the
// order in which they will be read. A block of the weight, some rows by some inputs, lies in the
// first-level cache while all tokens pass over it and the next block is on its way from memory:
// fetching is spread evenly over the arithmetic, so that neither waits for the other.
#pragma once

#include <algorithm>

#include "team.h"
#include "vectors.h"

namespace megachat {

constexpr int kRows = 3;          // of the weight, read together
constexpr int kTokens = 4;        // 12 sums, 3 weights and an input fill 16 vector registers
constexpr int kGroups = 4;        // of rows in a block
constexpr int64_t kInputs = 384;  // of a block
constexpr int64_t kBlockRows = kRows * kGroups;

// Vectors for the sums of `kRows` rows and `kTokens` tokens.
constexpr int kSumVectors = (kRows * kTokens + kLanes - 1) / kLanes;

// The sums of a block for all tokens: for each `kTokens` tokens, for each `kRows` rows, token by
// token the sum of each row, in the lanes that `lane_of_sum` says.
struct Sums {
    static int64_t floats(int64_t tokens) {
        return (tokens + kTokens - 1) / kTokens * kGroups * kSumVectors * kLanes;
    }

    static int64_t place(int64_t pass, int64_t group) {
        return (pass * kGroups + group) * kSumVectors * kLanes;
    }

    // Those of one token, row by row.
    static void of_token(const float* sums, int64_t token, int64_t rows, float* to) {
        for (int64_t first = 0; first < rows; first += kRows) {
            const int64_t count = std::min<int64_t>(kRows, rows - first);
            const float* from = sums + place(token / kTokens, first / kRows);
            for (int64_t row = 0; row < count; ++row) {
                const int i = static_cast<int>(token % kTokens * count + row);
                to[first + row] = from[i / kLanes * kLanes + lane_of_sum(i % kLanes)];
            }
        }
    }
};

// A weight `[tiles][out][width]`; `width` inputs a tile, strides in elements.
template <class T>
struct Matrix {
    const T* data;
    int64_t tiles;
    int64_t out;
    int64_t width;
    int64_t tile_stride;
    int64_t row_stride;

    int64_t in() const { return tiles * width; }
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

// sums += the products of a block, `rows` <= kBlockRows rows by `width` <= kInputs
// inputs, with all tokens; fetches the block at `next` meanwhile.
template <class T>
void add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride, int64_t rows,
               int64_t width, const T* next, float* sums);

// A phase of a team: out `[tokens][out_stride]` = x `[tokens][in]` times the weight, summed in
// float32. `finish(sums, row, count)` turns the sums of `count` rows of the weight from
// `row` on into what is stored.
template <class T, class Finish>
void multiply(Team& team, const T* x, int64_t tokens, const Matrix<T>& weight, T* out,
              int64_t out_stride, const Finish& finish) {
    // Chunks so small that the threads end together, so large that taking one costs nothing.
    const int64_t blocks = (weight.out + kBlockRows - 1) / kBlockRows;
    const int64_t chunk = std::clamp<int64_t>(blocks / (team.threads() * 16), 1, 8);
    const int64_t chunks = (blocks + chunk - 1) / chunk;
    const int64_t size = Inputs<T>::floats(weight, tokens);
    float* const inputs = workspace(size + Sums::floats(tokens));
    float* const sums = inputs + size;
    bool is_laid_out = false;
    for (int64_t mine = team.take(), following; mine < chunks; mine = following) {
        following = team.take();
        if (!is_laid_out) Inputs<T>::lay_out(x, tokens, weight, inputs);
        is_laid_out = true;
        const int64_t end = std::min(weight.out, (mine + 1) * chunk * kBlockRows);
        for (int64_t first = mine * chunk * kBlockRows; first < end; first += kBlockRows) {
            const int64_t rows = std::min(kBlockRows, end - first);
            int64_t next_row = first + kBlockRows;
            if (next_row >= end) next_row = following < chunks ? following * chunk * kBlockRows : first;
            std::fill(sums, sums + Sums::floats(tokens), 0.0f);
            const float* part = inputs;
            for (int64_t tile = 0; tile < weight.tiles; ++tile) {
                const T* base = weight.data + tile * weight.tile_stride;
                for (int64_t i = 0; i < weight.width; i += kInputs) {
                    const int64_t width = std::min(kInputs, weight.width - i);
                    const T* next = base + first * weight.row_stride + i + kInputs;
                    if (i + kInputs >= weight.width) {
                        next = tile + 1 < weight.tiles
                                   ? base + weight.tile_stride + first * weight.row_stride
                                   : weight.data + next_row * weight.row_stride;
                    }
                    add_block(part, tokens, base + first * weight.row_stride + i,
                              weight.row_stride, rows, width, next, sums);
                    part += tokens * Inputs<T>::padded(width);
                }
            }
            for (int64_t token = 0; token < tokens; ++token) {
                float of_token[kBlockRows];
                Sums::of_token(sums, token, rows, of_token);
                T* to = out + token * out_stride + first;
                for (int64_t row = 0; row < rows; row += kLanes) {
                    const int count = static_cast<int>(rows - row);
                    store_first(to + row, finish(load_first(of_token + row, count), first + row, count),
                                count);
                }
            }
        }
    }
    team.meet();
}

}  // namespace megachat
