// A whole decode step in one parallel region, or the part of it between two all-reduces.
//
// A tensor group must add its ranks' partial sums up once for the embedding and twice a layer.
// Between these points lie the segments of a step: segment 0 looks the tokens up; for each layer,
// one ends in its attention's projection and the next one in its feed-forward block; the last one
// makes logits. What a segment leaves for the all-reduce is in `partial`. One rank runs them all in
// one call.
#include <limits>

#include "attention.h"
#include "epilogues.h"
#include "linear.h"

namespace megachat {
namespace {

template <class T>
struct Layer {
    Matrix<T> qkv, proj, fc1, fc2;
    const T* qkv_bias;
    const T* proj_bias;
    const T* fc1_bias;
    const T* fc2_bias;
    const T* norm1_weight;
    const T* norm1_bias;
    const T* norm2_weight;
    const T* norm2_bias;
    T* keys;
    T* values;
};

template <class T>
struct Model {
    Matrix<T> words;
    Matrix<T> project_in;   // data is null where the embedding is as wide as the model
    Matrix<T> project_out;  // likewise
    const T* positions;
    const T* final_weight;  // null in post-LN
    const T* final_bias;
    const Layer<T>* layers;
    int64_t num_layers;
    int64_t norm_first;
    int64_t hidden;
    int64_t heads;  // of this rank
    int64_t head_dim;
    int64_t block_size;
    int64_t vocab_start;
    int64_t vocab;  // columns of logits that mean something
    int64_t position_offset;
    double epsilon;
};

// What the step reads and writes; all activations of one rank, `[rows][...]`.
template <class T>
struct Step {
    const int64_t* tokens;
    const int64_t* positions;
    const int64_t* slots;
    const int32_t* tables;
    const int64_t* lengths;
    T* logits;
    T* partial;  // [rows][hidden], or [rows][embed_dim] of the embedding
    T* hidden;
    T* normed;
    T* qkv;
    T* query;
    T* mixed;
    T* inner;
    int64_t table_stride;
    int64_t rows;
};

template <class T>
class Decoder {
public:
    Decoder(Team& team, const Model<T>& model, const Step<T>& step)
        : team_(team), model_(model), step_(step) {}

    void run(int64_t segment) {
        const int64_t layer = (segment - 1) / 2;
        if (segment == 0) return look_up();
        if (layer == model_.num_layers) return finish();
        if (segment % 2) return attend(layer);
        feed_forward(layer);
    }

private:
    // Calls `work(row)` for all rows, as a phase.
    template <class Work>
    void for_rows(const Work& work) {
        for (int64_t row = team_.take(); row < step_.rows; row = team_.take()) work(row);
        team_.meet();
    }

    void product(const T* x, const Matrix<T>& weight, T* out) {
        multiply(team_, x, step_.rows, weight, out, weight.out,
                 [](Floats sums, int64_t, int) { return sums; });
    }

    void look_up() {
        const int64_t width = model_.words.width;
        for_rows([&](int64_t row) {
            const int64_t word = step_.tokens[row] - model_.vocab_start;
            T* to = step_.partial + row * width;
            if (word >= 0 && word < model_.words.out) {
                std::memcpy(to, model_.words.data + word * model_.words.row_stride,
                            width * sizeof(T));
            } else {
                std::memset(to, 0, width * sizeof(T));
            }
        });
    }

    // Words, projected to the model's width, and positions; normalised for the first layer.
    void embed() {
        const T* words = step_.partial;
        if (model_.project_in.data) {
            product(step_.partial, model_.project_in, step_.normed);
            words = step_.normed;
        }
        const int64_t width = model_.hidden;
        const Layer<T>& first = model_.layers[0];
        for_rows([&](int64_t row) {
            const T* position =
                model_.positions + (step_.positions[row] + model_.position_offset) * width;
            T* hidden = step_.hidden + row * width;
            for (int64_t i = 0; i < width; i += kLanes) {
                const int count = static_cast<int>(width - i);
                store_first(hidden + i,
                            load_first(words + row * width + i, count) +
                                load_first(position + i, count),
                            count);
            }
            T* normed = step_.normed + row * width;
            if (model_.norm_first) {
                norm_row(hidden, first.norm1_weight, first.norm1_bias, width, epsilon(), normed);
            } else {
                std::memcpy(normed, hidden, width * sizeof(T));
            }
        });
    }

    // Ends a block: `partial` is its product, summed over the tensor group.
    void add_and_norm(const T* bias, const T* weight, const T* norm_bias) {
        const int64_t width = model_.hidden;
        for_rows([&](int64_t row) {
            T* hidden = step_.hidden + row * width;
            T* normed = step_.normed + row * width;
            add_and_norm_row(step_.partial + row * width, bias, hidden, weight, norm_bias, hidden,
                             normed, width, epsilon());
            if (!model_.norm_first) std::memcpy(hidden, normed, width * sizeof(T));
        });
    }

    // Ends the feed-forward block of a layer.
    void end_layer(int64_t number) {
        const Layer<T>& layer = model_.layers[number];
        if (!model_.norm_first) {
            return add_and_norm(layer.fc2_bias, layer.norm2_weight, layer.norm2_bias);
        }
        if (number + 1 == model_.num_layers) {
            return add_and_norm(layer.fc2_bias, model_.final_weight, model_.final_bias);
        }
        const Layer<T>& next = model_.layers[number + 1];
        add_and_norm(layer.fc2_bias, next.norm1_weight, next.norm1_bias);
    }

    void attend(int64_t number) {
        if (number == 0) {
            embed();
        } else {
            end_layer(number - 1);
        }
        const Layer<T>& layer = model_.layers[number];
        const int64_t dim = model_.head_dim, width = model_.heads * dim;
        product(step_.normed, layer.qkv, step_.qkv);
        // A row attends to its own new token and to no other's: no need to meet in between.
        decode(team_, step_.query, layer.keys, layer.values,
               Rows{step_.tables, step_.table_stride, step_.lengths, step_.rows},
               Pages{model_.block_size, model_.heads, dim}, step_.mixed,
               [&](int64_t row, int64_t first, int64_t count) {
                   append_heads(step_.qkv + row * 3 * width, layer.qkv_bias,
                                layer.keys + step_.slots[row] * width,
                                layer.values + step_.slots[row] * width,
                                step_.query + row * width, dim, first, count);
               });
        product(step_.mixed, layer.proj, step_.partial);
    }

    void feed_forward(int64_t number) {
        const Layer<T>& layer = model_.layers[number];
        const bool first = model_.norm_first;
        add_and_norm(layer.proj_bias, first ? layer.norm2_weight : layer.norm1_weight,
                     first ? layer.norm2_bias : layer.norm1_bias);
        multiply(team_, step_.normed, step_.rows, layer.fc1, step_.inner, layer.fc1.out,
                 [&](Floats sums, int64_t row, int count) {
                     return relu(rounded_to<T>(sums) + load_first(layer.fc1_bias + row, count));
                 });
        product(step_.inner, layer.fc2, step_.partial);
    }

    void finish() {
        end_layer(model_.num_layers - 1);
        const T* last = step_.normed;
        if (model_.project_out.data) {
            product(last, model_.project_out, step_.partial);
            last = step_.partial;
        }
        product(last, model_.words, step_.logits);
        T lowest;  // number of the dtype
        if constexpr (std::is_same_v<T, float>) {
            lowest = std::numeric_limits<float>::lowest();
        } else {
            lowest.bits = 0xff7f;
        }
        for_rows([&](int64_t row) {
            T* logits = step_.logits + row * model_.words.out;
            std::fill(logits + model_.vocab, logits + model_.words.out, lowest);
        });
    }

    float epsilon() const { return static_cast<float>(model_.epsilon); }

    Team& team_;
    const Model<T>& model_;
    const Step<T>& step_;
};

template <class T>
void decode_step(const Model<T>& model, const Step<T>& step, int64_t first, int64_t last,
                 int threads) {
    together(threads, [&](Team& team) {
        Decoder<T> decoder(team, model, step);
        for (int64_t segment = first; segment < last; ++segment) decoder.run(segment);
    });
}

}  // namespace
}  // namespace megachat

// Runs segments [first, last) of a step.
#define MEGACHAT_DECODE_STEP(SUFFIX, TYPE)                                                       \
    extern "C" void megachat_decode_step_##SUFFIX(const megachat::Model<TYPE>* model,            \
                                                  const megachat::Step<TYPE>* step,              \
                                                  int64_t first, int64_t last, int threads) {    \
        megachat::decode_step(*model, *step, first, last, threads);                              \
    }

MEGACHAT_DECODE_STEP(float32, float)
MEGACHAT_DECODE_STEP(bfloat16, megachat::BFloat16)
