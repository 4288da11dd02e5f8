// What follows a product on its result: bias and ReLU; bias, residual and LayerNorm.
#include "vectors.h"

namespace megachat {
namespace {

template <class T>
void bias_relu(const T* x, const T* bias, T* out, int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int count = static_cast<int>(width - i);
            const Floats y = load_first(x + token * width + i, count) + load_first(bias + i, count);
            // Written so that NaN stays NaN.
            store_first(out + token * width + i, y < 0.0f ? Floats{} : y, count);
        }
    }
}

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

template <class T>
void bias_residual_layer_norm(const T* x, const T* bias, const T* residual, const T* weight,
                              const T* norm_bias, T* total, T* normed, int64_t tokens,
                              int64_t width, float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t row = token * width;
        for (int64_t i = 0; i < width; i += kLanes) {
            const int count = static_cast<int>(width - i);
            // Training rounds after the bias and after the residual: the same here.
            const Floats biased =
                rounded_to<T>(load_first(x + row + i, count) + load_first(bias + i, count));
            store_first(total + row + i, load_first(residual + row + i, count) + biased, count);
        }
        norm_row(total + row, weight, norm_bias, width, epsilon, normed + row);
    }
}

}  // namespace
}  // namespace megachat

#define MEGACHAT_EPILOGUES(SUFFIX, TYPE)                                                          \
    extern "C" void megachat_bias_relu_##SUFFIX(const TYPE* x, const TYPE* bias, TYPE* out,       \
                                                int64_t tokens, int64_t width, int threads) {     \
        megachat::bias_relu(x, bias, out, tokens, width, threads);                                \
    }                                                                                             \
    extern "C" void megachat_bias_residual_layer_norm_##SUFFIX(                                   \
        const TYPE* x, const TYPE* bias, const TYPE* residual, const TYPE* weight,                \
        const TYPE* norm_bias, TYPE* total, TYPE* normed, int64_t tokens, int64_t width,          \
        float epsilon, int threads) {                                                             \
        megachat::bias_residual_layer_norm(x, bias, residual, weight, norm_bias, total, normed,   \
                                           tokens, width, epsilon, threads);                      \
    }

MEGACHAT_EPILOGUES(float32, float)
MEGACHAT_EPILOGUES(bfloat16, megachat::BFloat16)
