// One step of the model in one call: packed tokens in, hidden states and logits out.
//
// engine/model/model.py is the readable definition. The functions called here are those that it calls one
// by one through ctypes, in the same order on the same numbers, so the bits are the same; what is
// saved is some ten calls, allocations and checks per layer and step.
//
//     embed ▸ per layer: norm ▸ qkv ▸ place_qkv ▸ attention ▸ dense ▸ add + norm ▸ MLP or
//     router + experts (+ shared) ▸ add + the next norm ▸ ... ▸ rows that are wanted ▸ head
//
// Everything is checked before anything is written; nothing is allocated here.

#include <initializer_list>

#include "mathfun.h"
#include "operations.h"

using namespace everstep;
using std::int32_t;
using std::int64_t;

namespace {

// kernels/native_step.py lays out the next three structs, and says how large it takes them to be

// norms T; a dense layer has no router, one without QK norm no query_norm and key_norm
struct Layer {
    const void *input_norm, *post_norm, *query_norm, *key_norm;
    const Packed *qkv, *dense;
    const Packed *gate_up, *down;  // the dense MLP, or the shared expert; null: none
    const Packed* router;
    const float* bias;
    const Packed *const *gate_ups, *const *downs;  // one per expert
    void *keys, *values;  // (blocks · block_size, kv_heads, dim) T
};

struct Model {
    int64_t model_bytes, layer_bytes, step_bytes;
    int64_t num_layers, hidden, heads, kv_heads, dim;
    int64_t vocab, half, num_positions;  // rotary tables: (num_positions, half)
    int64_t experts, top_k, groups, top_groups;
    int64_t num_blocks, block_size;
    const void *embedding, *norm;  // (vocab, hidden) T, (hidden,) T
    const Packed* head;
    const float *cos, *sin;
    const Layer* layers;
    float eps, scaling, scale;
    int32_t is_bf16, rounds;  // rounds: the tables are T, and the rotation is rounded to it
};

struct Step {
    int64_t tokens, rollouts, wanted;
    const int64_t* ids;  // (tokens,)
    // (rollouts,): packed row of the first token, its position, how many there are, where the block
    // table begins in `blocks` and how long it is
    const int64_t *first_row, *start, *length, *table, *table_length;
    const int32_t* blocks;
    const int64_t* wanted_rows;  // (wanted,) packed rows whose logits are wanted
    void* memory;                // as many bytes as everstep_step_memory says, aligned to 64
    void* hidden;                // (tokens, hidden) T, out: after the last norm
    float* logits;               // (wanted, vocab), out
    std::uint8_t *bad_tokens, *bad_logits;  // (tokens,), (wanted,), out: 1 where not finite
    int64_t* route_ids;      // (MoE layers, tokens, top_k), out; null: nobody asks
    float* route_weights;    // likewise
    int64_t threads;
};

// below this a second thread costs more than it gives
constexpr int64_t kAlone = 64 * 1024;

// what is wrong with a step, as kernels/native_step.py words it
enum Wrong : int64_t {
    kLayout = -1,
    kId = -2,
    kShortTable = -3,
    kBlock = -4,
    kPosition = -5,
    kRows = -6,
};

// -- memory: one piece after another, each aligned

class Memory {
public:
    explicit Memory(void* base) : base_(static_cast<char*>(base)) {}

    template <class T = char>
    T* take(int64_t count, int64_t size = sizeof(T)) {
        char* here = base_ + used_;
        used_ += round_up(count * size, 64);
        return reinterpret_cast<T*>(here);
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

struct Buffers {
    int64_t *positions, *slots;
    void *x, *y, *out, *qkv, *q, *attended, *middle, *shared, *rows;
    float *wide, *scores, *route_weights;
    int64_t* route_ids;
};

int64_t widest_mlp(const Model& model) {
    int64_t width = 0;
    for (int64_t i = 0; i < model.num_layers; ++i)
        if (model.layers[i].gate_up) width = std::max(width, model.layers[i].gate_up->n);
    return width;
}

Buffers lay_out(const Model& model, int64_t tokens, int64_t wanted, Memory& memory) {
    const int64_t size = model.is_bf16 ? 2 : 4, heads = model.heads, kv_heads = model.kv_heads;
    Buffers b{};
    b.positions = memory.take<int64_t>(tokens);
    b.slots = memory.take<int64_t>(tokens);
    for (void** rows : {&b.x, &b.y, &b.out, &b.shared}) *rows = memory.take(tokens * model.hidden, size);
    b.rows = memory.take(wanted * model.hidden, size);
    b.qkv = memory.take(tokens * (heads + 2 * kv_heads) * model.dim, size);
    for (void** rows : {&b.q, &b.attended}) *rows = memory.take(tokens * heads * model.dim, size);
    b.middle = memory.take(tokens * widest_mlp(model), size);
    b.wide = memory.take<float>(model.is_bf16 ? tokens * model.hidden : 0);
    b.scores = memory.take<float>(tokens * model.experts);
    b.route_ids = memory.take<int64_t>(tokens * model.top_k);
    b.route_weights = memory.take<float>(tokens * model.top_k);
    return b;
}

// -- before the first layer

int64_t find_wrong(const Model& model, const Step& step) {
    for (int64_t t = 0; t < step.tokens; ++t)
        if (step.ids[t] < 0 || step.ids[t] >= model.vocab) return kId;
    int64_t rows = 0;
    for (int64_t i = 0; i < step.rollouts; ++i) {
        const int64_t end = step.start[i] + step.length[i];
        if (step.first_row[i] != rows || step.length[i] < 0) return kRows;
        rows += step.length[i];
        if (step.start[i] < 0 || end > model.num_positions) return kPosition;
        const int64_t blocks = ceil_div(end, model.block_size);
        if (blocks > step.table_length[i]) return kShortTable;
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t block = step.blocks[step.table[i] + b];
            if (block < 0 || block >= model.num_blocks) return kBlock;
        }
    }
    if (rows != step.tokens) return kRows;
    for (int64_t r = 0; r < step.wanted; ++r)
        if (step.wanted_rows[r] < 0 || step.wanted_rows[r] >= rows) return kRows;
    return 0;
}

// where each token stands in its rollout, and in the caches
void place_tokens(const Model& model, const Step& step, const Buffers& b) {
    for (int64_t i = 0; i < step.rollouts; ++i) {
        const int32_t* blocks = step.blocks + step.table[i];
        for (int64_t j = 0; j < step.length[i]; ++j) {
            const int64_t position = step.start[i] + j, row = step.first_row[i] + j;
            b.positions[row] = position;
            b.slots[row] = blocks[position / model.block_size] * model.block_size +
                           position % model.block_size;
        }
    }
}

// rows of a matrix, one after another
void gather(const void* from, const int64_t* rows, int64_t count, int64_t bytes, void* to) {
    for (int64_t r = 0; r < count; ++r)
        std::memcpy(static_cast<char*>(to) + r * bytes,
                    static_cast<const char*>(from) + rows[r] * bytes, static_cast<size_t>(bytes));
}

// function(first, end) over shares of `count` elements; few of them stay on this thread
template <class Function>
void share_out(int64_t count, int threads, const Function& function) {
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, count / kAlone));
    parallel(shares, static_cast<int>(shares), [&](int64_t share) {
        function(count * share / shares, count * (share + 1) / shares);
    });
}

// -- a layer

struct Pass {
    const Model& model;
    const Step& step;
    const Buffers& b;
    int threads;

    void product(const Packed& w, const void* x, void* y) const {
        linear(w, x, step.tokens, w.k, y, w.n, kRounded, threads);
    }

    // b.y → b.out
    void attend(const Layer& layer) const {
        const int64_t heads = model.heads, kv_heads = model.kv_heads, dim = model.dim;
        product(*layer.qkv, b.y, b.qkv);
        everstep_place_qkv(model.is_bf16, b.qkv, layer.qkv->n, step.tokens, heads, kv_heads, dim,
                           layer.query_norm, layer.key_norm, model.eps, model.cos, model.sin, model.half, model.rounds, b.positions, b.slots, b.q,
                           layer.keys, layer.values, kv_heads * dim, threads);
        everstep_attention(model.is_bf16, b.q, layer.keys, layer.values, b.attended, heads, kv_heads,
                           dim, heads * dim, kv_heads * dim, step.rollouts, step.first_row,
                           step.start, step.length, step.table, step.blocks, model.block_size,
                           model.scale, threads);
        product(*layer.dense, b.attended, b.out);
    }

    void mlp(const Layer& layer, void* to) const {
        product(*layer.gate_up, b.y, b.middle);
        product(*layer.down, b.middle, to);
    }

    // b.y in float32, which the router wants
    const float* widened() const {
        if (!model.is_bf16) return static_cast<const float*>(b.y);
        const bf16* y = static_cast<const bf16*>(b.y);
        const int64_t count = step.tokens * model.hidden;
        share_out(count, threads, [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; ++i) b.wide[i] = to_float(y[i]);
        });
        return b.wide;
    }

    // b.y → b.out
    void mix(const Layer& layer, int64_t* ids, float* weights) const {
        linear(*layer.router, widened(), step.tokens, model.hidden, b.scores, model.experts,
               kRounded, threads);
        everstep_route(b.scores, model.experts, layer.bias, step.tokens, model.experts, model.top_k,
                       model.groups, model.top_groups, model.scaling, 0, ids, weights, threads);
        everstep_experts(model.is_bf16, b.y, model.hidden, ids, weights, step.tokens, model.top_k,
                         model.experts, layer.gate_ups, layer.downs, b.out, threads);
        if (layer.gate_up) {
            mlp(layer, b.shared);
            everstep_add(model.is_bf16, b.out, b.shared, b.out, step.tokens, model.hidden, threads);
        }
    }

    // x += out, then its norm
    void add_and_norm(const void* weight, void* to) const {
        everstep_add_rms_norm(model.is_bf16, b.x, b.out, weight, b.x, to, step.tokens, model.hidden,
                              model.eps, threads);
    }
};

// -- after the last layer

// No element with all bits of the exponent set.
template <class T>
bool is_finite(const T* row, int64_t width) {
    using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
    constexpr Bits kExponent = sizeof(T) == 2 ? 0x7f80u : static_cast<Bits>(0x7f800000u);
    Bits found = 0;
    for (int64_t i = 0; i < width; ++i) {
        Bits bits;
        std::memcpy(&bits, row + i, sizeof bits);
        found |= static_cast<Bits>((bits & kExponent) == kExponent);
    }
    return found == 0;
}

template <class T>
int64_t mark_bad(const T* x, int64_t rows, int64_t width, std::uint8_t* bad, int threads) {
    const int64_t shares = rows * width < kAlone ? 1 : std::min<int64_t>(rows, threads);
    parallel(shares, threads, [&](int64_t share) {
        for (int64_t r = rows * share / shares; r < rows * (share + 1) / shares; ++r)
            bad[r] = !is_finite(x + r * width, width);
    });
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) count += bad[r];
    return count;
}

void run(const Model& model, const Step& step, const Buffers& b, int threads) {
    const Pass pass{model, step, b, threads};
    const int64_t row_bytes = model.hidden * (model.is_bf16 ? 2 : 4);
    place_tokens(model, step, b);
    gather(model.embedding, step.ids, step.tokens, row_bytes, b.x);
    everstep_rms_norm(model.is_bf16, b.x, model.hidden, model.layers[0].input_norm, b.y, step.tokens,
                      model.hidden, model.eps, threads);
    int64_t moe = 0;
    for (int64_t i = 0; i < model.num_layers; ++i) {
        const Layer& layer = model.layers[i];
        pass.attend(layer);
        pass.add_and_norm(layer.post_norm, b.y);
        if (layer.router) {
            const int64_t at = moe++ * step.tokens * model.top_k;
            pass.mix(layer, step.route_ids ? step.route_ids + at : b.route_ids,
                     step.route_ids ? step.route_weights + at : b.route_weights);
        } else {
            pass.mlp(layer, b.out);
        }
        const bool is_last = i + 1 == model.num_layers;
        pass.add_and_norm(is_last ? model.norm : model.layers[i + 1].input_norm,
                          is_last ? step.hidden : b.y);
    }
    gather(step.hidden, step.wanted_rows, step.wanted, row_bytes, b.rows);
    linear(*model.head, b.rows, step.wanted, model.hidden, step.logits, model.vocab, kFloat, threads);
}

}  // namespace

// Bytes of memory that a step of so many tokens and wanted rows works in.
EVERSTEP_API int64_t everstep_step_memory(const void* model, int64_t tokens, int64_t wanted) {
    Memory memory(nullptr);
    lay_out(*static_cast<const Model*>(model), tokens, wanted, memory);
    return memory.used();
}

// Runs a step. Returns how many of its tokens and wanted rows are not finite; or, below zero, what is
// wrong with it (`Wrong`): nothing was written then. layers ≥ 1, tokens ≥ 1.
EVERSTEP_API int64_t everstep_step(const void* described, const void* given) {
    const Model& model = *static_cast<const Model*>(described);
    const Step& step = *static_cast<const Step*>(given);
    if (model.model_bytes != sizeof(Model) || model.layer_bytes != sizeof(Layer) ||
        model.step_bytes != sizeof(Step))
        return kLayout;
    const int64_t wrong = find_wrong(model, step);
    if (wrong < 0) return wrong;
    Memory memory(step.memory);
    const Buffers buffers = lay_out(model, step.tokens, step.wanted, memory);
    const auto threads = static_cast<int>(step.threads);
    run(model, step, buffers, threads);
    const int64_t bad =
        model.is_bf16 ? mark_bad(static_cast<const bf16*>(step.hidden), step.tokens, model.hidden,
                                 step.bad_tokens, threads)
                      : mark_bad(static_cast<const float*>(step.hidden), step.tokens, model.hidden,
                                 step.bad_tokens, threads);
    return bad + mark_bad(step.logits, step.wanted, model.vocab, step.bad_logits, threads);
}
