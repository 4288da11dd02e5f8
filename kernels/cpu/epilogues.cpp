// Bias and ReLU, and bias, residual and LayerNorm, each as a call of its own.
#include "epilogues.h"

namespace megachat {
namespace {

template <class T>
void bias_relu(const T* x, const T* bias, T* out, int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int count = static_cast<int>(width - i);
            const Floats y = load_first(x + token * width + i, count) + load_first(bias + i, count);
            store_first(out + token * width + i, relu(y), count);
        }
    }
}

template <class T>
void bias_residual_layer_norm(const T* x, const T* bias, const T* residual, const T* weight,
                              const T* norm_bias, T* total, T* normed, int64_t tokens,
                              int64_t width, float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t row = token * width;
        add_and_norm_row(x + row, bias, residual + row, weight, norm_bias, total + row,
                         normed + row, width, epsilon);
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
