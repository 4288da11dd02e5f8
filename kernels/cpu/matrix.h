// What products of both kinds share: the weight, its blocks, what becomes of finished sums.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace megachat {

constexpr int64_t kInputs = 384;    // of a block
constexpr int64_t kBlockRows = 12;  // of a block: a multiple of those that are read together

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

// What a pass over a block fetches meanwhile: its share of the next block's rows.
struct Ahead {
    const char* at;
    int64_t row_bytes;
    int64_t advance;  // bytes for each step along a row
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

}  // namespace megachat
