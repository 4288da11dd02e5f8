// Log-probability and entropy of given tokens from a slice of the vocabulary's logits, and their
// gradient: what kernels/cuda/token_logprobs.cu computes, with the same four numbers a token.
//
// Forward reads a row twice, the second time from a cache; backward reads and writes it once.
// Nothing of the size of the logits is made in float32.
#include <algorithm>
#include <limits>

#include "vectors.h"

namespace megachat {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kImpossible = -std::numeric_limits<float>::infinity();
// The lowest shifted logit that is kept apart: exp of it is 0, and it times 0 is 0, where the -inf
// of a padded column times 0 would be NaN.
constexpr float kNegligible = -1e4f;
constexpr int64_t kSpan = 1024;  // columns that are added up in float32

// The value, if it is not negligible; NaN stays NaN.
inline Floats keep_apart(Floats shifted) {
    return shifted < all(kNegligible) ? all(kNegligible) : shifted;
}

// Columns from `i` on, and what is impossible behind the row's end.
template <class T>
inline Floats columns_of(const T* row, int64_t i, int64_t width) {
    if (i + kLanes <= width) return load(row + i);
    Floats last = all(kImpossible);
    for (int64_t lane = 0; i + lane < width; ++lane) last[lane] = load_first(row + i + lane, 1)[0];
    return last;
}

template <class T>
inline float element(const T* row, int64_t column) {
    return load_first(row + column, 1)[0];
}

// The column of a target in this slice, or -1.
inline int64_t column_of(int64_t target, int64_t vocab_start, int64_t width) {
    const int64_t column = target - vocab_start;
    return column >= 0 && column < width ? column : -1;
}

// A NaN among the logits may be passed over here; it shows in the sums.
template <class T>
float largest_of(const T* row, int64_t width) {
    Floats top = all(kLowest);
    for (int64_t i = 0; i < width; i += kLanes) top = larger(columns_of(row, i, width), top);
    return largest(top);
}

template <class T>
void forward(const T* logits, const int64_t* targets, float* statistics, int64_t tokens,
             int64_t width, int64_t vocab_start, float temperature, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        const T* row = logits + token * width;
        // That of padding alone may overflow when it is scaled, and infinities have no difference.
        const float maximum = std::max(largest_of(row, width) / temperature, kLowest);
        double total = 0.0, weighted = 0.0;
        for (int64_t start = 0; start < width; start += kSpan) {
            const int64_t end = std::min(start + kSpan, width);
            Floats weights = {}, products = {};
            for (int64_t i = start; i < end; i += kLanes) {
                const Floats x = columns_of(row, i, width) / temperature;
                const Floats shifted = keep_apart(x - maximum);
                const Floats weight = exp_of_negative(shifted);
                weights += weight;
                products += weight * shifted;
            }
            total += sum(weights);
            weighted += sum(products);
        }
        const int64_t column = column_of(targets[token], vocab_start, width);
        statistics[token] = maximum;
        statistics[tokens + token] = static_cast<float>(total);
        statistics[2 * tokens + token] = static_cast<float>(weighted);
        statistics[3 * tokens + token] = column < 0 ? 0.0f : element(row, column) / temperature;
    }
}

// Of a token: what its columns have in common.
struct Slopes {
    float logsumexp, entropy, of_logprob, of_entropy, temperature;

    // -p (g + h (log p + entropy)) / temperature.
    Floats gradient(Floats logits) const {
        const Floats log_p = keep_apart(logits / temperature - logsumexp);
        const Floats slope = of_logprob + of_entropy * (log_p + entropy);
        return -exp_of_negative(log_p) * slope / temperature;
    }
};

template <class T>
void backward(const T* logits, const int64_t* targets, const float* logsumexp,
              const float* entropy, const float* grad_logprobs, const float* grad_entropy,
              T* gradient, int64_t tokens, int64_t width, int64_t vocab_start, float temperature,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        const T* row = logits + token * width;
        T* out = gradient + token * width;
        const Slopes slopes{logsumexp[token], entropy[token],
                            grad_logprobs != nullptr ? grad_logprobs[token] : 0.0f,
                            grad_entropy != nullptr ? grad_entropy[token] : 0.0f, temperature};
        for (int64_t i = 0; i < width; i += kLanes) {
            const Floats x = slopes.gradient(columns_of(row, i, width));
            store_first(out + i, x, static_cast<int>(std::min<int64_t>(kLanes, width - i)));
        }
        const int64_t column = column_of(targets[token], vocab_start, width);
        if (column < 0) continue;
        const Floats x = slopes.gradient(all(element(row, column)));
        store_first(out + column, x + slopes.of_logprob / temperature, 1);
    }
}

}  // namespace
}  // namespace megachat

#define MEGACHAT_TOKEN_LOGPROBS(SUFFIX, TYPE)                                                      \
    extern "C" void megachat_token_logprobs_forward_##SUFFIX(                                      \
        const TYPE* logits, const int64_t* targets, float* statistics, int64_t tokens,             \
        int64_t width, int64_t vocab_start, float temperature, int threads) {                      \
        megachat::forward(logits, targets, statistics, tokens, width, vocab_start, temperature,    \
                          threads);                                                                \
    }                                                                                              \
    extern "C" void megachat_token_logprobs_backward_##SUFFIX(                                     \
        const TYPE* logits, const int64_t* targets, const float* logsumexp, const float* entropy,  \
        const float* grad_logprobs, const float* grad_entropy, TYPE* gradient, int64_t tokens,     \
        int64_t width, int64_t vocab_start, float temperature, int threads) {                      \
        megachat::backward(logits, targets, logsumexp, entropy, grad_logprobs, grad_entropy,       \
                           gradient, tokens, width, vocab_start, temperature, threads);            \
    }

MEGACHAT_TOKEN_LOGPROBS(float32, float)
MEGACHAT_TOKEN_LOGPROBS(bfloat16, megachat::BFloat16)
