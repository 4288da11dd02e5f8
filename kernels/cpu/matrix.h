// What products of both kinds share: the weight, its blocks, what is fetched meanwhile.
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

}  // namespace megachat
