// Keys and values in pages `[blocks][block_size][heads][dim]`: writing them, attending to them.
//
// A page is read once, front to back, for all heads of a thread's share: its tokens lie side by
// side, so the memory sees one long stream and not one short piece per token and head.
#pragma once

#include <algorithm>
#include <limits>

#include "team.h"
#include "vectors.h"

namespace megachat {

constexpr int kQueries = 4;  // of a prompt that share a pass over keys and values

struct Pages {
    int64_t block_size;
    int64_t heads;
    int64_t dim;

    int64_t token_stride() const { return heads * dim; }
    int64_t block_stride() const { return block_size * heads * dim; }
};

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Fetches the page that comes next, as much as a head of a token in each call. Memory delivers more
// to several streams than to one: the page's quarters come side by side, each in the order in which
// it lies in memory.
template <class T>
class Fetcher {
public:
    // Heads [0, count) of each token of the page at `page`; null fetches nothing.
    Fetcher(const T* page, const Pages& pages, int64_t count)
        : at_(page), quarter_(pages.block_size / kStreams * pages.token_stride()),
          rest_(pages.token_stride() - count * pages.dim), dim_(pages.dim),
          lines_((pages.dim + kLine - 1) / kLine), count_(count) {}

    void step() {
        if (!at_) return;
        for (int64_t line = call_ * lines_ / kStreams; line < (call_ + 1) * lines_ / kStreams;
             ++line) {
#pragma GCC unroll 4
            for (int stream = 0; stream < kStreams; ++stream) {
                __builtin_prefetch(at_ + stream * quarter_ + line * kLine);
            }
        }
        if (++call_ < kStreams) return;
        call_ = 0;
        at_ += dim_;
        if (++head_ < count_) return;
        head_ = 0;
        at_ += rest_;
    }

private:
    static constexpr int kStreams = 4;
    static constexpr int64_t kLine = kLineBytes / sizeof(T);

    const T* at_;
    int64_t quarter_;  // elements between the streams
    int64_t rest_;     // elements between the last head of a token and the first one of the next
    int64_t dim_;
    int64_t lines_;  // of a head
    int64_t count_;
    int64_t call_ = 0;  // of those for a head of each stream
    int64_t head_ = 0;
};

// scores[query][token] = query . key of `Tokens` tokens of a page. As many vectors as one has lanes
// are added up together.
template <class T, int Queries, int Tokens>
inline void score_tokens(const float* query, const T* keys, const Pages& pages, float* scores,
                         int64_t score_stride) {
    const int64_t width = padded(pages.dim), stride = pages.token_stride();
    Floats total[Queries * Tokens] = {};
    int64_t i = 0;
    for (; i + kLanes <= pages.dim; i += kLanes) {
#pragma GCC unroll 4
        for (int q = 0; q < Queries; ++q) {
            const Floats part = load(query + q * width + i);
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; ++t) {
                total[q * Tokens + t] += part * load(keys + t * stride + i);
            }
        }
    }
    if (i < pages.dim) {
        const int rest = static_cast<int>(pages.dim - i);
        for (int q = 0; q < Queries; ++q) {
            const Floats part = load(query + q * width + i);
            for (int t = 0; t < Tokens; ++t) {
                total[q * Tokens + t] += part * load_first(keys + t * stride + i, rest);
            }
        }
    }
    Floats ordered[Queries * Tokens];
    if constexpr (Queries * Tokens == kLanes) {
        // The sum of vector i ends up in lane `lane_of_sum(i)`, which is its own inverse.
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) ordered[lane_of_sum(t)] = total[t];
        float sums[kLanes];
        store(sums, sums_of<kLanes>(ordered));
        for (int q = 0; q < Queries; ++q) {
            std::copy(sums + q * Tokens, sums + (q + 1) * Tokens, scores + q * score_stride);
        }
    } else {
        for (int q = 0; q < Queries; ++q) {
            for (int t = 0; t < Tokens; ++t) {
                scores[q * score_stride + t] = sum(total[q * Tokens + t]);
            }
        }
    }
}

// scores[query][token] = query . key of `tokens` tokens of a page; the fetcher steps once a token.
template <class T, int Queries>
inline void score_page(const float* query, const T* keys, const Pages& pages, int64_t tokens,
                       float* scores, int64_t score_stride, Fetcher<T>& fetcher) {
    constexpr int kTogether = std::max(1, kLanes / Queries);
    int64_t token = 0;
    for (; token + kTogether <= tokens; token += kTogether) {
        for (int i = 0; i < kTogether; ++i) fetcher.step();
        score_tokens<T, Queries, kTogether>(query, keys + token * pages.token_stride(), pages,
                                            scores + token, score_stride);
    }
    for (; token < tokens; ++token) {
        fetcher.step();
        score_tokens<T, Queries, 1>(query, keys + token * pages.token_stride(), pages,
                                    scores + token, score_stride);
    }
}

// mixed[query] += scores[query][token] * value of `Parts` vectors at `i`.
template <class T, int Queries, int Parts>
inline void mix_parts(const float* scores, int64_t score_stride, const T* values, int64_t stride,
                      int64_t tokens, float* mixed, int64_t width) {
    Floats total[Queries][Parts];
    for (int q = 0; q < Queries; ++q) {
        for (int p = 0; p < Parts; ++p) total[q][p] = load(mixed + q * width + p * kLanes);
    }
    for (int64_t token = 0; token < tokens; ++token) {
        for (int p = 0; p < Parts; ++p) {
            const Floats part = load(values + token * stride + p * kLanes);
            for (int q = 0; q < Queries; ++q) {
                total[q][p] += part * all(scores[q * score_stride + token]);
            }
        }
    }
    for (int q = 0; q < Queries; ++q) {
        for (int p = 0; p < Parts; ++p) store(mixed + q * width + p * kLanes, total[q][p]);
    }
}

// mixed[query] += the values of a page times their scores.
template <class T, int Queries>
inline void mix_page(const float* scores, int64_t score_stride, const T* values,
                     const Pages& pages, int64_t tokens, float* mixed, Fetcher<T>& fetcher) {
    constexpr int kParts = 8 / Queries;
    const int64_t width = padded(pages.dim), stride = pages.token_stride();
    for (int64_t token = 0; token < tokens; ++token) fetcher.step();
    int64_t i = 0;
    for (; i + kParts * kLanes <= pages.dim; i += kParts * kLanes) {
        mix_parts<T, Queries, kParts>(scores, score_stride, values + i, stride, tokens, mixed + i,
                                      width);
    }
    for (; i + kLanes <= pages.dim; i += kLanes) {
        mix_parts<T, Queries, 1>(scores, score_stride, values + i, stride, tokens, mixed + i,
                                 width);
    }
    if (i == pages.dim) return;
    for (int64_t token = 0; token < tokens; ++token) {
        const int rest = static_cast<int>(pages.dim - i);
        const Floats part = load_first(values + token * stride + i, rest);
        for (int q = 0; q < Queries; ++q) {
            float* to = mixed + q * width + i;
            store(to, load(to) + part * all(scores[q * score_stride + token]));
        }
    }
}

// Scores to exp(score - largest) in place; returns their sum. Behind `count` lies padding.
inline float exponentiate(float* scores, int64_t count) {
    for (int64_t i = count; i < padded(count); ++i) {
        scores[i] = -std::numeric_limits<float>::infinity();
    }
    Floats top = load(scores);
    for (int64_t i = kLanes; i < count; i += kLanes) top = larger(top, load(scores + i));
    const Floats shift = all(largest(top));
    Floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats weight = exp_of_negative(load(scores + i) - shift);
        store(scores + i, weight);
        total += weight;
    }
    return sum(total);
}

template <class T>
inline void load_query(const T* query, int64_t dim, float* to) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < dim; i += kLanes) {
        store(to + i, load_first(query + i, static_cast<int>(dim - i)) * scale);
    }
}

template <class T>
inline void store_mixed(const float* mixed, float total, int64_t dim, T* out) {
    const float scale = 1.0f / total;
    for (int64_t i = 0; i < dim; i += kLanes) {
        store_first(out + i, load(mixed + i) * scale, static_cast<int>(dim - i));
    }
}

// One row's heads [first, first + count): all of its pages for the keys, then for the values.
template <class T>
void decode_heads(const T* query, const T* keys, const T* values, const int32_t* table,
                  int64_t length, const Pages& pages, int64_t first, int64_t count, T* out) {
    const int64_t dim = pages.dim, width = padded(dim), stride = padded(length);
    float* queries = workspace(count * (2 * width + stride));
    float* mixed = queries + count * width;
    float* scores = mixed + count * width;
    for (int64_t h = 0; h < count; ++h) {
        load_query(query + (first + h) * dim, dim, queries + h * width);
    }
    std::fill(mixed, mixed + count * width, 0.0f);
    const int64_t blocks = (length + pages.block_size - 1) / pages.block_size;
    const auto page_of = [&](const T* of, int64_t block) {
        return of + table[block] * pages.block_stride() + first * dim;
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * pages.block_size;
        const int64_t tokens = std::min(pages.block_size, length - start);
        const T* page = page_of(keys, block);
        const T* next = block + 1 < blocks ? page_of(keys, block + 1) : page_of(values, 0);
        Fetcher<T> fetcher(next, pages, count);
        for (int64_t h = 0; h < count; ++h) {
            score_page<T, 1>(queries + h * width, page + h * dim, pages, tokens,
                             scores + h * stride + start, stride, fetcher);
        }
    }
    float* totals = queries;  // the queries have done their work
    for (int64_t h = 0; h < count; ++h) totals[h] = exponentiate(scores + h * stride, length);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * pages.block_size;
        const int64_t tokens = std::min(pages.block_size, length - start);
        const T* page = page_of(values, block);
        Fetcher<T> fetcher(block + 1 < blocks ? page_of(values, block + 1) : nullptr, pages, count);
        for (int64_t h = 0; h < count; ++h) {
            mix_page<T, 1>(scores + h * stride + start, stride, page + h * dim, pages, tokens,
                           mixed + h * width, fetcher);
        }
    }
    for (int64_t h = 0; h < count; ++h) {
        store_mixed(mixed + h * width, totals[h], dim, out + (first + h) * dim);
    }
}

// The rows of a decode step: one new token each.
struct Rows {
    const int32_t* tables;
    int64_t table_stride;
    const int64_t* lengths;
    int64_t count;
};

// A phase of a team: `before(row, first, count)` and attention for all heads of all rows.
template <class T, class Before>
void decode(Team& team, const T* query, const T* keys, const T* values, const Rows& rows,
            const Pages& pages, T* out, const Before& before) {
    // Fewer rows than threads leave threads without work: then the heads of a row are shared out as
    // well, no finer than that: whole rows are read faster, since their pages lie in one piece.
    const int64_t some = std::max<int64_t>(1, rows.count);
    const int64_t wanted = (team.threads() + some - 1) / some;
    const int64_t share = std::max<int64_t>(1, pages.heads / std::min(wanted, pages.heads));
    const int64_t shares = (pages.heads + share - 1) / share;
    const int64_t row_stride = pages.heads * pages.dim;
    for (int64_t item = team.take(); item < rows.count * shares; item = team.take()) {
        const int64_t row = item / shares, first = item % shares * share;
        const int64_t count = std::min(share, pages.heads - first);
        T* to = out + row * row_stride;
        before(row, first, count);
        if (rows.lengths[row] > 0) {
            decode_heads(query + row * row_stride, keys, values,
                         rows.tables + row * rows.table_stride, rows.lengths[row], pages, first,
                         count, to);
        } else {
            std::memset(to + first * pages.dim, 0, count * pages.dim * sizeof(T));
        }
    }
    team.meet();
}

// `Queries` neighbouring tokens of a prompt, one head; the first sees `visible` tokens.
template <class T, int Queries>
void prefill_head(const T* query, const T* keys, const T* values, const int32_t* table,
                  int64_t visible, const Pages& pages, T* out) {
    const int64_t dim = pages.dim, width = padded(dim), row_stride = pages.heads * dim;
    const int64_t length = visible + Queries - 1, stride = padded(length);
    float* queries = workspace(Queries * (2 * width + stride));
    float* mixed = queries + Queries * width;
    float* scores = mixed + Queries * width;
    for (int q = 0; q < Queries; ++q) load_query(query + q * row_stride, dim, queries + q * width);
    std::fill(mixed, mixed + Queries * width, 0.0f);
    Fetcher<T> nothing(nullptr, pages, 1);  // neighbouring groups of queries read the same pages
    for (int64_t start = 0; start < length; start += pages.block_size) {
        const int64_t tokens = std::min(pages.block_size, length - start);
        const T* page = keys + table[start / pages.block_size] * pages.block_stride();
        score_page<T, Queries>(queries, page, pages, tokens, scores + start, stride, nothing);
    }
    float totals[Queries];
    for (int q = 0; q < Queries; ++q) {
        totals[q] = exponentiate(scores + q * stride, visible + q);
        std::fill(scores + q * stride + visible + q, scores + (q + 1) * stride, 0.0f);
    }
    for (int64_t start = 0; start < length; start += pages.block_size) {
        const int64_t tokens = std::min(pages.block_size, length - start);
        const T* page = values + table[start / pages.block_size] * pages.block_stride();
        mix_page<T, Queries>(scores + start, stride, page, pages, tokens, mixed, nothing);
    }
    for (int q = 0; q < Queries; ++q) {
        store_mixed(mixed + q * width, totals[q], dim, out + q * row_stride);
    }
}

template <class T>
void prefill(const T* query, const T* keys, const T* values, const int32_t* tables,
             int64_t table_stride, const int64_t* starts, const int64_t* offsets, int64_t chunks,
             const Pages& pages, T* out, int threads) {
    const int64_t row_stride = pages.heads * pages.dim;
#pragma omp parallel num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t count = offsets[chunk + 1] - offsets[chunk];
        const int64_t groups = (count + kQueries - 1) / kQueries;
        const int32_t* table = tables + chunk * table_stride;
        // Heads outside, so that neighbouring groups find the head's keys in the cache.
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t item = 0; item < pages.heads * groups; ++item) {
            const int64_t head = item / groups, group = item % groups * kQueries;
            const int64_t at = (offsets[chunk] + group) * row_stride + head * pages.dim;
            const T* k = keys + head * pages.dim;
            const T* v = values + head * pages.dim;
            const int64_t visible = starts[chunk] + group + 1;
            const int64_t queries = std::min<int64_t>(kQueries, count - group);
            if (queries == kQueries) {
                prefill_head<T, kQueries>(query + at, k, v, table, visible, pages, out + at);
                continue;
            }
            for (int64_t q = 0; q < queries; ++q) {
                const int64_t here = at + q * row_stride;
                prefill_head<T, 1>(query + here, k, v, table, visible + q, pages, out + here);
            }
        }
    }
}

// One token's heads [first, first + count): adds the bias, stores keys and values, and the query.
template <class T>
inline void append_heads(const T* qkv, const T* bias, T* keys, T* values, T* query, int64_t dim,
                         int64_t first, int64_t count) {
    T* const parts[3] = {query, keys, values};
    for (int64_t head = first; head < first + count; ++head) {
        for (int part = 0; part < 3; ++part) {
            const int64_t from = (head * 3 + part) * dim;
            for (int64_t i = 0; i < dim; i += kLanes) {
                const int rest = static_cast<int>(dim - i);
                store_first(parts[part] + head * dim + i,
                            load_first(qkv + from + i, rest) + load_first(bias + from + i, rest),
                            rest);
            }
        }
    }
}

}  // namespace megachat
