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

// Rows [first, first + rows) of a product, rows <= kBlockRows; fetches the first block of row
// `next_row` towards the end. `inputs` are laid out, `sums` is memory for `Sums`.
template <class T, class Finish>
void multiply_rows(const float* inputs, int64_t tokens, const Matrix<T>& weight, int64_t first,
                   int64_t rows, int64_t next_row, float* sums, T* out, int64_t out_stride,
                   const Finish& finish) {
    std::fill(sums, sums + Sums::floats(tokens), 0.0f);
    for (int64_t tile = 0; tile < weight.tiles; ++tile) {
        const T* row = weight.data + tile * weight.tile_stride + first * weight.row_stride;
        for (int64_t i = 0; i < weight.width; i += kInputs) {
            const int64_t width = std::min(kInputs, weight.width - i);
            const T* next = row + i + kInputs;
            if (i + kInputs >= weight.width) {
                next = tile + 1 < weight.tiles ? row + weight.tile_stride
                                               : weight.data + next_row * weight.row_stride;
            }
            add_block(inputs, tokens, row + i, weight.row_stride, rows, width, next, sums);
            inputs += tokens * Inputs<T>::padded(width);
        }
    }
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

// A phase of a team: out `[tokens][out_stride]` = x `[tokens][in]` times the weight, summed in
// float32. `finish(sums, row, count)` turns the sums of `count` rows of the weight from `row` on
// into what is stored.
template <class T, class Finish>
void multiply(Team& team, const T* x, int64_t tokens, const Matrix<T>& weight, T* out,
              int64_t out_stride, const Finish& finish) {
    // Chunks so small that the threads end together, so large that taking one costs nothing.
    const int64_t blocks = (weight.out + kBlockRows - 1) / kBlockRows;
    const int64_t size = std::clamp<int64_t>(blocks / (team.threads() * 32), 1, 8) * kBlockRows;
    const int64_t chunks = tokens > 0 ? (weight.out + size - 1) / size : 0;
    const int64_t floats = Inputs<T>::floats(weight, tokens);
    float* const inputs = workspace(floats + Sums::floats(tokens));
    float* const sums = inputs + floats;
    bool is_laid_out = false;
    for (int64_t mine = team.take(), following; mine < chunks; mine = following) {
        // Taken early, so that it can be fetched; but towards the end nobody sits on two chunks.
        const bool is_early = mine + 2 * team.threads() < chunks;
        following = is_early ? team.take() : chunks;
        if (!is_laid_out) Inputs<T>::lay_out(x, tokens, weight, inputs);
        is_laid_out = true;
        const int64_t end = std::min(weight.out, (mine + 1) * size);
        for (int64_t first = mine * size; first < end; first += kBlockRows) {
            const int64_t after = first + kBlockRows < end ? first + kBlockRows : following * size;
            multiply_rows(inputs, tokens, weight, first, std::min(kBlockRows, end - first),
                          std::min(after, weight.out - 1), sums, out, out_stride, finish);
        }
        if (!is_early) following = team.take();
    }
    team.meet();
}

}  // namespace megachat
