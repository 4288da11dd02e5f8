// What follows a product on its result: bias and ReLU; bias, residual and LayerNorm.
#pragma once

#include "vectors.h"

namespace megachat {

// Written so that NaN stays NaN.
inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }

template <class T>
void norm_row(const T* row, const T* weight, const T* bias, int64_t width, float epsilon, T* out) {
    Floats total = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        total += load_first(row + i, static_cast<int>(width - i));
    }
    const float mean = sum(total) / static_cast<float>(width);
    Floats squares = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Floats distance = load(row + i) - mean;
        squares += distance * distance;
    }
    float square = sum(squares);
    for (; i < width; ++i) {
        const float distance = load_first(row + i, 1)[0] - mean;
        square += distance * distance;
    }
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(width) + epsilon);
    for (i = 0; i < width; i += kLanes) {
        const int count = static_cast<int>(width - i);
        const Floats normal = (load_first(row + i, count) - mean) * scale;
        store_first(out + i, normal * load_first(weight + i, count) + load_first(bias + i, count),
                    count);
    }
}

// One token: total = residual + (x + bias), normed = its LayerNorm. `total` may be `residual`.
template <class T>
void add_and_norm_row(const T* x, const T* bias, const T* residual, const T* weight,
                      const T* norm_bias, T* total, T* normed, int64_t width, float epsilon) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const int count = static_cast<int>(width - i);
        // Training rounds after the bias and after the residual: the same here.
        const Floats biased = rounded_to<T>(load_first(x + i, count) + load_first(bias + i, count));
        store_first(total + i, load_first(residual + i, count) + biased, count);
    }
    norm_row(total, weight, norm_bias, width, epsilon, normed);
}

}  // namespace megachat
