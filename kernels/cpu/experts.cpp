// Routed experts: rows sorted by expert, each segment through gate-up and down, slots in order.
//
//   slot    0 1 2 3 …         token · K + k, as the router gave them
//   place   where the slot's row lies among the rows sorted by expert (stable)
//
// A row's bits: its two products (gemm.cpp) see that row alone, and its K outputs are added in the
// order of its slots, so neither the other tokens nor the order of experts can reach it.
#include "operations.h"

namespace everstep {

namespace {

struct PlaceTag;
struct StartTag;
struct RowTag;
struct HiddenTag;
struct OutTag;

// Sorts the slots by expert. starts has experts + 1 entries, places one per slot.
void sort_slots(const std::int64_t* ids, std::int64_t slots, std::int64_t experts,
                std::int64_t* starts, std::int64_t* places) {
    std::fill(starts, starts + experts + 1, 0);
    for (std::int64_t slot = 0; slot < slots; ++slot) ++starts[ids[slot] + 1];
    for (std::int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    for (std::int64_t slot = 0; slot < slots; ++slot) places[slot] = starts[ids[slot]]++;
    // each start has moved to the next one's place: move them back
    for (std::int64_t e = experts; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
}

// out = T(Σ_k float32(outputs[place of slot k]) · weights[k]) for one token
template <class T>
void add_slots(const T* outputs, const std::int64_t* places, const float* weights,
               std::int64_t slots, std::int64_t width, T* out) {
    for (std::int64_t h = 0; h < width; h += kLanes) {
        const int count = static_cast<int>(std::min<std::int64_t>(kLanes, width - h));
        Vec total = zero();
        for (std::int64_t k = 0; k < slots; ++k) {
            const T* row = outputs + places[k] * width + h;
            const Vec value = count == kLanes ? load(row) : load_first(row, count);
            const Vec product = value * set(weights[k]);
            total = k == 0 ? product : total + product;
        }
        if (count == kLanes)
            store(out + h, total);
        else
            store_first(out + h, total, count);
    }
}

template <class T>
void experts(const T* x, std::int64_t x_stride, const std::int64_t* ids, const float* weights,
             std::int64_t tokens, std::int64_t slots, std::int64_t num_experts,
             const Packed* const* gate_ups, const Packed* const* downs, T* out, int threads) {
    const std::int64_t hidden = gate_ups[0]->k, width = gate_ups[0]->n, rows = tokens * slots;
    std::int64_t* starts = scratch<std::int64_t, StartTag>(num_experts + 1);
    std::int64_t* places = scratch<std::int64_t, PlaceTag>(rows);
    T* sorted = scratch<T, RowTag>(rows * hidden);
    T* middle = scratch<T, HiddenTag>(rows * width);
    T* outputs = scratch<T, OutTag>(rows * hidden);
    sort_slots(ids, rows, num_experts, starts, places);
    parallel(tokens, threads, [&](std::int64_t token) {
        for (std::int64_t k = 0; k < slots; ++k)
            std::memcpy(sorted + places[token * slots + k] * hidden, x + token * x_stride,
                        sizeof(T) * static_cast<std::size_t>(hidden));
    });
    for (std::int64_t e = 0; e < num_experts; ++e) {
        const std::int64_t first = starts[e], count = starts[e + 1] - first;
        if (count == 0) continue;
        linear(*gate_ups[e], sorted + first * hidden, count, hidden, middle + first * width, width,
               kRounded, threads);
        linear(*downs[e], middle + first * width, count, width, outputs + first * hidden, hidden,
               kRounded, threads);
    }
    parallel(tokens, threads, [&](std::int64_t token) {
        add_slots(outputs, places + token * slots, weights + token * slots, slots, hidden,
                  out + token * hidden);
    });
}

}  // namespace

}  // namespace everstep

// x (tokens, hidden), ids and weights (tokens, slots), out (tokens, hidden); gate_ups and downs
// point to one weight per expert, all of one shape and type. Ids are within [0, num_experts).
EVERSTEP_API void everstep_experts(std::int32_t is_bf16, const void* x, std::int64_t x_stride,
                                   const std::int64_t* ids, const float* weights,
                                   std::int64_t tokens, std::int64_t slots,
                                   std::int64_t num_experts,
                                   const everstep::Packed* const* gate_ups,
                                   const everstep::Packed* const* downs, void* out,
                                   std::int32_t threads) {
    using namespace everstep;
    if (is_bf16)
        experts(static_cast<const bf16*>(x), x_stride, ids, weights, tokens, slots, num_experts,
                gate_ups, downs, static_cast<bf16*>(out), threads);
    else
        experts(static_cast<const float*>(x), x_stride, ids, weights, tokens, slots, num_experts,
                gate_ups, downs, static_cast<float*>(out), threads);
}
