// One token a row from logits: temperature, forbidden tokens, the largest or a draw, log-prob.
//
// A draw is a race of groups of neighbouring tokens and then one within the winner, each with noise
// from a counter-based generator: see megachat/ops/sample.py, which defines the result. The logits
// are read once; what is looked at again, the winning group, is still in a cache.
#include <algorithm>
#include <limits>

#include "team.h"
#include "vectors.h"

namespace megachat {
namespace {

constexpr int64_t kGroup = 128;  // tokens; `GROUP_TOKENS` of the Python side
constexpr float kImpossible = -std::numeric_limits<float>::infinity();

struct Rules {
    const int64_t* suppressed;  // columns
    const int64_t* stops;       // columns that are forbidden before `min_new_tokens`
    int64_t num_suppressed;
    int64_t num_stops;
    int64_t min_new_tokens;
    int64_t first_group;  // of this rank's slice of the vocabulary
    float temperature;    // 0: the largest
};

// Philox 4x32-10, of which one row and stream use consecutive numbers.
class Noise {
public:
    Noise(int64_t key, int64_t position, int64_t stream)
        : key_(static_cast<uint64_t>(key)),
          position_(static_cast<uint32_t>(position)),
          stream_(static_cast<uint32_t>(stream)) {}

    // Standard Gumbel noise number `index`.
    double gumbel(int64_t index) {
        if (index / 4 != block_) fill(index / 4);
        const double uniform = (words_[index % 4] + 0.5) * 0x1p-32;
        return -std::log(-std::log(uniform));
    }

private:
    void fill(int64_t block) {
        block_ = block;
        uint32_t c[4] = {static_cast<uint32_t>(block), stream_, position_, 0};
        uint32_t k0 = static_cast<uint32_t>(key_), k1 = static_cast<uint32_t>(key_ >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
            const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0,
                                      static_cast<uint32_t>(p1),
                                      static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1,
                                      static_cast<uint32_t>(p0)};
            std::memcpy(c, next, sizeof c);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        std::memcpy(words_, c, sizeof c);
    }

    uint64_t key_;
    uint32_t position_, stream_;
    int64_t block_ = -1;
    uint32_t words_[4];
};

// The logarithm of a sum of exponentials in two parts: the largest exponent, and the sum over it.
struct Mass {
    float top = kImpossible;
    float sum = 0.0f;

    float log() const { return top == kImpossible ? top : top + std::log(sum); }
};

// Of `count` numbers, a multiple of the vector's lanes. NaN among them is in the sum: a largest
// number passes over it unless it came first, so impossible numbers behind it do not hide it.
inline Mass mass_of(const float* x, int64_t count) {
    Floats top = load(x);
    for (int64_t i = kLanes; i < count; i += kLanes) top = larger(load(x + i), top);
    Mass mass;
    mass.top = largest(top);
    if (mass.top == kImpossible) return mass;
    Floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) total += exp_of_negative(load(x + i) - mass.top);
    mass.sum = sum(total);
    return mass;
}

// One row of logits, seen group by group.
template <class T>
class Row {
public:
    Row(const T* logits, int64_t columns, int64_t position, const Rules& rules)
        : logits_(logits), columns_(columns), rules_(rules) {
        is_early_ = position + 1 < rules.min_new_tokens;
    }

    int64_t groups() const { return (columns_ + kGroup - 1) / kGroup; }

    // The scaled logits of a group, padded with what is impossible.
    void scaled(int64_t group, float* to) const {
        const int64_t start = group * kGroup, count = std::min(kGroup, columns_ - start);
        const float temperature = rules_.temperature > 0.0f ? rules_.temperature : 1.0f;
        for (int64_t i = 0; i < kGroup; i += kLanes) {
            if (i + kLanes <= count) {
                store(to + i, load(logits_ + start + i) / temperature);
                continue;
            }
            Floats last = all(kImpossible);
            for (int64_t lane = 0; i + lane < count; ++lane) {
                last[lane] = load_first(logits_ + start + i + lane, 1)[0] / temperature;
            }
            store(to + i, last);
        }
    }

    // Makes the forbidden ones of a group impossible; returns whether there are any.
    bool forbid(int64_t group, float* x) const {
        bool any = strike(rules_.suppressed, rules_.num_suppressed, group, x);
        if (is_early_) any |= strike(rules_.stops, rules_.num_stops, group, x);
        return any;
    }

private:
    static bool strike(const int64_t* columns, int64_t count, int64_t group, float* x) {
        bool any = false;
        for (int64_t i = 0; i < count; ++i) {
            if (columns[i] / kGroup != group) continue;
            x[columns[i] % kGroup] = kImpossible;
            any = true;
        }
        return any;
    }

    const T* logits_;
    int64_t columns_;
    const Rules& rules_;
    bool is_early_;
};

struct Choice {
    int64_t column;
    double score;
    float chosen;
    float total;
};

// Where a number is found first.
inline int64_t index_of(const float* x, float value) {
    for (int64_t i = 0; i < kGroup; ++i) {
        if (x[i] == value) return i;
    }
    return 0;
}

template <class T>
Choice choose(const Row<T>& row, int64_t key, int64_t position, const Rules& rules) {
    float x[kGroup];
    const int64_t groups = row.groups(), padded = (groups + kLanes - 1) / kLanes * kLanes;
    float* const tops = workspace(2 * padded);  // of every group, whatever is forbidden
    float* const sums = tops + padded;
    std::fill(tops, tops + padded, kImpossible);
    std::fill(sums, sums + padded, 0.0f);
    Choice best{0, -std::numeric_limits<double>::infinity(), 0.0f, 0.0f};
    int64_t winner = 0;
    Noise noise(key, position, 0);
    for (int64_t group = 0; group < groups; ++group) {
        row.scaled(group, x);
        Mass mass = mass_of(x, kGroup);
        tops[group] = mass.top;
        sums[group] = mass.sum;
        if (row.forbid(group, x)) mass = mass_of(x, kGroup);
        double score = mass.top;
        if (rules.temperature > 0.0f) {
            score = double{mass.log()} + noise.gumbel(rules.first_group + group);
        }
        if (score > best.score) {
            best.score = score;
            winner = group;
            if (rules.temperature == 0.0f) best.column = index_of(x, mass.top);
        }
    }
    row.scaled(winner, x);
    float plain[kGroup];
    std::memcpy(plain, x, sizeof x);
    row.forbid(winner, x);
    if (rules.temperature > 0.0f) {
        Noise inner(key, position, 1 + rules.first_group + winner);
        double top = -std::numeric_limits<double>::infinity();
        for (int64_t i = 0; i < kGroup; ++i) {
            if (x[i] == kImpossible) continue;
            const double score = double{x[i]} + inner.gumbel(i);
            if (score > top) {
                top = score;
                best.column = i;
            }
        }
    }
    best.chosen = plain[best.column];
    best.column += winner * kGroup;
    Floats top = all(kImpossible);
    for (int64_t i = 0; i < padded; i += kLanes) top = larger(top, load(tops + i));
    const float largest_top = largest(top);
    Floats total = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
        total += exp_of_negative(load(tops + i) - largest_top) * load(sums + i);
    }
    best.total = largest_top + std::log(sum(total));
    return best;
}

template <class T>
void sample(const T* logits, int64_t stride, int64_t rows, int64_t columns, const int64_t* keys,
            const int64_t* positions, const Rules& rules, double* parts, int threads) {
    together(threads, [&](Team& team) {
        for (int64_t row = team.take(); row < rows; row = team.take()) {
            const Row<T> here(logits + row * stride, columns, positions[row], rules);
            const Choice choice = choose(here, keys[row], positions[row], rules);
            parts[row] = choice.score;
            parts[rows + row] = static_cast<double>(rules.first_group * kGroup + choice.column);
            parts[2 * rows + row] = choice.chosen;
            parts[3 * rows + row] = choice.total;
        }
    });
}

}  // namespace
}  // namespace megachat

#define MEGACHAT_SAMPLE(SUFFIX, TYPE)                                                             \
    extern "C" void megachat_sample_##SUFFIX(                                                     \
        const TYPE* logits, const int64_t* keys, const int64_t* positions,                        \
        const int64_t* suppressed, const int64_t* stops, double* parts, int64_t stride,           \
        int64_t rows, int64_t columns, int64_t num_suppressed, int64_t num_stops,                 \
        int64_t min_new_tokens, int64_t first_group, float temperature, int threads) {            \
        megachat::sample(logits, stride, rows, columns, keys, positions,                          \
                         {suppressed, stops, num_suppressed, num_stops, min_new_tokens,           \
                          first_group, temperature},                                              \
                         parts, threads);                                                         \
    }

MEGACHAT_SAMPLE(float32, float)
MEGACHAT_SAMPLE(bfloat16, megachat::BFloat16)
