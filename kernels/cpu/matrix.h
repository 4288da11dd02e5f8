// What products of both kinds share: the weight and its blocks.
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

}  // namespace megachat
