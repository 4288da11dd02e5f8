// The arithmetic of products of many tokens.
#include "many_tokens.h"

namespace megachat {
namespace {

constexpr int kAtOnce = 12;  // sums: with a few weights and an input they fill 16 vector registers
constexpr int kStep = 16;    // inputs between two rounds of fetching

// What a pass over a block fetches meanwhile: its share of the next block's rows.
struct Ahead {
    const char* at;
    int64_t row_bytes;
    int64_t advance;  // bytes for each step along a row
};

// Elements of some rows, each in all lanes. Three rows share a pointer, or addresses would take
// more registers than there are.
template <int Rows>
class Elements {
public:
    Elements(const float* weight, int64_t row_stride) : stride_(row_stride) {
        for (int group = 0; group < kGroups; ++group) at_[group] = weight + group * 3 * row_stride;
    }

    Floats operator()(int row) const { return all(at_[row / 3][row % 3 * stride_]); }

    void advance() {
        for (const float*& at : at_) ++at;
    }

private:
    static constexpr int kGroups = (Rows + 2) / 3;

    const float* at_[kGroups];
    int64_t stride_;
};

// total[row][vector] += the products of the next input of all tokens. A call here would put the
// totals into memory.
template <int Vectors, int Rows>
__attribute__((always_inline)) inline void add_input(const float*& x, Elements<Rows>& elements,
                                                     Floats (&total)[Rows][Vectors]) {
    // Whichever are fewer stay in registers, the others come one at a time.
    if constexpr (Rows <= Vectors) {
        Floats some[Rows];
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) some[r] = elements(r);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const Floats tokens = load(x + v * kLanes);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) multiply_add(total[r][v], some[r], tokens);
        }
    } else {
        Floats tokens[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tokens[v] = load(x + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const Floats one = elements(r);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) multiply_add(total[r][v], one, tokens[v]);
        }
    }
    x += Vectors * kLanes;
    elements.advance();
}

// sums += the products of `Rows` rows with a pass's tokens over `width` inputs, or
// sums = them, of the first inputs.
template <int Vectors, int Rows>
inline void add_products(const float* x, const float* weight, int64_t row_stride, int64_t width,
                         const Ahead& ahead, bool is_first, float* sums) {
    Floats total[Rows][Vectors] = {};
    Elements<Rows> elements(weight, row_stride);
    const char* fetch = ahead.at;
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) __builtin_prefetch(fetch + r * ahead.row_bytes);
        fetch += ahead.advance;
#pragma GCC unroll 2
        for (int k = 0; k < kStep; ++k) add_input(x, elements, total);
    }
    for (; i < width; ++i) add_input(x, elements, total);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            float* to = sums + (r * Vectors + v) * kLanes;
            store(to, is_first ? total[r][v] : load(to) + total[r][v]);
        }
    }
}

// A pass over a block.
template <int Vectors>
inline void add_rows(const float* x, const float* weight, int64_t row_stride, int64_t rows,
                     int64_t width, const Ahead& ahead, bool is_first, float* sums) {
    constexpr int64_t kTogether = kAtOnce / Vectors;
    int64_t row = 0;
    const auto ahead_of = [&](int64_t r) {
        return Ahead{ahead.at + r * ahead.row_bytes, ahead.row_bytes, ahead.advance};
    };
    for (; row + kTogether <= rows; row += kTogether) {
        add_products<Vectors, kTogether>(x, weight + row * row_stride, row_stride, width,
                                         ahead_of(row), is_first, sums + row * Vectors * kLanes);
    }
    for (; row < rows; ++row) {
        add_products<Vectors, 1>(x, weight + row * row_stride, row_stride, width, ahead_of(row),
                                 is_first, sums + row * Vectors * kLanes);
    }
}

// A block in float32: `weight` itself, or a copy in `widened`, which costs less than to widen each
// element as it is spread.
struct Block {
    const float* weight;
    int64_t row_stride;

    static Block of(const float* weight, int64_t row_stride, int64_t, int64_t, float*) {
        return {weight, row_stride};
    }

    static Block of(const BFloat16* weight, int64_t row_stride, int64_t rows, int64_t width,
                    float* widened) {
        for (int64_t row = 0; row < rows; ++row) {
            const BFloat16* from = weight + row * row_stride;
            float* to = widened + row * kInputs;
            for (int64_t i = 0; i < width; i += kLanes) {
                const int count = static_cast<int>(width - i);
                store_first(to + i, load_first(from + i, count), count);
            }
        }
        return {widened, kInputs};
    }
};

// x `[tokens][stride]` to `[width][kLanes]` with `step` floats between two inputs.
template <class T>
inline void lay_out_vector(const T* x, int64_t stride, int64_t tokens, int64_t width, int64_t step,
                           float* to) {
    for (int64_t i = 0; i < width; i += kLanes) {
        Floats by_input[kLanes] = {};
        const int count = static_cast<int>(std::min<int64_t>(kLanes, width - i));
        for (int64_t t = 0; t < tokens; ++t) by_input[t] = load_first(x + t * stride + i, count);
        transpose(by_input);
        for (int k = 0; k < count; ++k) store(to + (i + k) * step, by_input[k]);
    }
}

}  // namespace

template <class T>
void ManyTokens<T>::lay_out(const T* x, int64_t tokens, const Matrix<T>& weight, float* to) {
    for (int64_t tile = 0; tile < weight.tiles; ++tile) {
        for (int64_t start = 0; start < weight.width; start += kInputs) {
            const int64_t width = std::min(kInputs, weight.width - start);
            const T* from = x + tile * weight.width + start;
            for_passes(tokens, [&](int64_t first, int64_t count) {
                for (int64_t v = 0; v < count; ++v) {
                    const int64_t token = (first + v) * kLanes;
                    lay_out_vector(from + token * weight.in(), weight.in(),
                                   std::min<int64_t>(kLanes, tokens - token), width,
                                   count * kLanes, to + v * kLanes);
                }
                to += width * count * kLanes;
            });
        }
    }
}

template <class T>
void ManyTokens<T>::add_block(const float* x, int64_t tokens, const T* weight, int64_t row_stride,
                              int64_t rows, int64_t width, const T* next, bool is_first,
                              float* sums) {
    constexpr int64_t kBytes = sizeof(T);
    const int64_t passes = (vectors(tokens) + kVectors - 1) / kVectors;
    const int64_t share = width * kBytes / passes;
    Ahead ahead{reinterpret_cast<const char*>(next), row_stride * kBytes, kStep * kBytes / passes};
    alignas(64) float widened[std::is_same_v<T, float> ? 1 : kBlockRows * kInputs];
    const Block block = Block::of(weight, row_stride, rows, width, widened);
    for_passes(tokens, [&](int64_t first, int64_t count) {
        float* to = sums + first * kBlockRows * kLanes;
        const float* from = x + first * width * kLanes;
        switch (count) {  // never 1: that many tokens are few
            case 2:
                add_rows<2>(from, block.weight, block.row_stride, rows, width, ahead, is_first,
                            to);
                break;
            case 3:
                add_rows<3>(from, block.weight, block.row_stride, rows, width, ahead, is_first,
                            to);
                break;
            default:
                add_rows<4>(from, block.weight, block.row_stride, rows, width, ahead, is_first,
                            to);
        }
        ahead.at += share;
    });
}

template struct ManyTokens<float>;
template struct ManyTokens<BFloat16>;

}  // namespace megachat
