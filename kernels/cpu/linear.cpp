// A product as a call.
#include "linear.h"

// out [tokens][rows] = x [tokens][tiles * width] times the weight, summed in float32, rounded once.
#define MEGACHAT_LINEAR(NAME, TYPE)                                                              \
    extern "C" void NAME(const TYPE* x, const TYPE* weight, TYPE* out, int64_t tokens,           \
                         int64_t tiles, int64_t rows, int64_t width, int64_t tile_stride,        \
                         int64_t row_stride, int threads) {                                      \
        const megachat::Matrix<TYPE> matrix{weight, tiles,       rows,                           \
                                            width,  tile_stride, row_stride};                    \
        megachat::together(threads, [&](megachat::Team& team) {                                  \
            megachat::multiply(team, x, tokens, matrix, out, rows,                               \
                               [](megachat::Floats sums, int64_t, int) { return sums; });        \
        });                                                                                      \
    }

MEGACHAT_LINEAR(megachat_tiled_linear_float32, float)
MEGACHAT_LINEAR(megachat_tiled_linear_bfloat16, megachat::BFloat16)
