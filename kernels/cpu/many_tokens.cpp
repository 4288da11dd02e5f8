// The arithmetic of products of many tokens.
#include "many_tokens.h"

namespace megachat {
namespace {

constexpr int kAtOnce = 12;  // sums: with a few weights and an input they fill 16 vector registers
constexpr int64_t kLine = 64;  // bytes that are fetched at once

// Elements of some rows, each in all lanes. Three rows share a pointer, or addresses would take more
// registers than there are.
template <class T, int Rows>
class Elements {
public:
    Elements(const T* weight, int64_t row_stride) : stride_(row_stride) {
        for (int group = 0; group < kGroups; ++group) at_[group] = weight + group * 3 * row_stride;
    }

    void advance(int count) {
        for (const T*& at : at_) at += count;
    }

    // Element `Part` of the `kParts` that come next.
    template <int Part>
    Floats broadcast(int row) const {
        const T* from = at_[row / 3] + row % 3 * stride_;
        if constexpr (std::is_same_v<T, float>) {
            return all(*from);
        } else {
            uint32_t pair;  // read together, since a single one takes more instructions to spread
            std::memcpy(&pair, from, sizeof pair);
            const Words pairs = pair - Words{};
            return (Floats)(Part == 0 ? pairs << 16 : pairs & 0xffff0000u);
        }
    }

    // The next element, behind which nothing may be read.
    Floats broadcast_last(int row) const {
        T padded[kParts<T>] = {at_[row / 3][row % 3 * stride_]};
        return Elements<T, 1>(padded, 0).template broadcast<0>(0);
    }

private:
    static constexpr int kGroups = (Rows + 2) / 3;

    const T* at_[kGroups];
    int64_t stride_;
};

// total[row][vector] += an input of all tokens times `element(row)`.
template <int Vectors, int Rows, class Element>
__attribute__((always_inline)) inline void add_input(const float* x, const Element& element, Floats (&total)[Rows][Vectors]) {
    // Whichever are fewer stay in registers, the others come one at a time.
    if constexpr (Rows <= Vectors) {
        Floats elements[Rows];
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) elements[r] = element(r);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const Floats tokens = load(x + v * kLanes);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) multiply_add(total[r][v], elements[r], tokens);
        }
    } else {
        Floats tokens[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tokens[v] = load(x + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const Floats one = element(r);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) multiply_add(total[r][v], one, tokens[v]);
        }
    }
}

// The `kParts` inputs that come next. A call here would put the totals into memory.
template <class T, int Vectors, int Rows>
__attribute__((always_inline)) inline void add_next(const float*& x, Elements<T, Rows>& elements,
                                                    Floats (&total)[Rows][Vectors]) {
    add_input(x, [&](int r) { return elements.template broadcast<0>(r); }, total);
    x += Vectors * kLanes;
    if constexpr (kParts<T> == 2) {
        add_input(x, [&](int r) { return elements.template broadcast<1>(r); }, total);
        x += Vectors * kLanes;
    }
    elements.advance(kParts<T>);
}

// sums += the products of `Rows` rows with a pass's tokens over `width` inputs.
template <class T, int Vectors, int Rows>
inline void add_products(const float* x, const T* weight, int64_t row_stride, int64_t width,
                         const Ahead& ahead, float* sums) {
    constexpr int64_t kStep = kLine / sizeof(T);
    Floats total[Rows][Vectors] = {};
    Elements<T, Rows> elements(weight, row_stride);
    const char* fetch = ahead.at;
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) __builtin_prefetch(fetch + r * ahead.row_bytes);
        fetch += ahead.advance;
#pragma GCC unroll 2
        for (int k = 0; k < kStep; k += kParts<T>) add_next(x, elements, total);
    }
    for (; i + kParts<T> <= width; i += kParts<T>) add_next(x, elements, total);
    if (i < width) add_input(x, [&](int r) { return elements.broadcast_last(r); }, total);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            float* to = sums + (r * Vectors + v) * kLanes;
            store(to, load(to) + total[r][v]);
        }
    }
}

// A pass over a block.
template <class T, int Vectors>
inline void add_rows(const float* x, const T* weight, int64_t row_stride, int64_t rows,
                     int64_t width, Ahead ahead, float* sums) {
    constexpr int64_t kTogether = kAtOnce / Vectors;
    int64_t row = 0;
    const auto ahead_of = [&](int64_t r) {
        return Ahead{ahead.at + r * ahead.row_bytes, ahead.row_bytes, ahead.advance};
    };
    for (; row + kTogether <= rows; row += kTogether) {
        add_products<T, Vectors, kTogether>(x, weight + row * row_stride, row_stride, width,
                                            ahead_of(row), sums + row * Vectors * kLanes);
    }
    for (; row < rows; ++row) {
        add_products<T, Vectors, 1>(x, weight + row * row_stride, row_stride, width, ahead_of(row),
                                    sums + row * Vectors * kLanes);
    }
}

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
                              int64_t rows, int64_t width, const T* next, float* sums) {
    const int64_t passes = (vectors(tokens) + kVectors - 1) / kVectors;
    const int64_t share = width * static_cast<int64_t>(sizeof(T)) / passes;
    Ahead ahead{reinterpret_cast<const char*>(next), row_stride * static_cast<int64_t>(sizeof(T)),
                kLine / passes};
    for_passes(tokens, [&](int64_t first, int64_t count) {
        float* to = sums + first * kBlockRows * kLanes;
        const float* from = x + first * width * kLanes;
        switch (count) {  // never 1: that many tokens are few
            case 2:
                add_rows<T, 2>(from, weight, row_stride, rows, width, ahead, to);
                break;
            case 3:
                add_rows<T, 3>(from, weight, row_stride, rows, width, ahead, to);
                break;
            default:
                add_rows<T, 4>(from, weight, row_stride, rows, width, ahead, to);
        }
        ahead.at += share;
    });
}

template struct ManyTokens<float>;
template struct ManyTokens<BFloat16>;

}  // namespace megachat
