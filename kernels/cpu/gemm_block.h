// The block of a packed product: some rows × some column tiles, their sums in registers over all of
// K, and what becomes of the sums. gemm.cpp says which blocks make up a product.
#pragma once

#include <type_traits>

#include "fp8.h"
#include "gemm.h"

namespace everstep {

#if defined(__AVX512F__)
constexpr int kMaxSums = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kMaxSums = 6;  // of 16 registers, two each
#else
constexpr int kMaxSums = 4;  // NEON: of 32 registers, four each
#endif
constexpr int kDirectSums = 16;  // where the tables of FP8 codes take registers too
constexpr int kDirectTiles = 2;  // likewise
constexpr int kMaxRows = 32;
constexpr int kMaxTiles = 4;
constexpr int kAheadBytes = 1024;

// What a block's sums are left in, before bias, SwiGLU and rounding: rows of kSumsStride.
constexpr int kSumsStride = kMaxTiles * kLanes;
struct Sums {
    alignas(64) float at[kMaxRows * kSumsStride];
};

// -- the loops: how a step of K is loaded and multiplied

struct Float32 {
    using X = float;
    using XPart = Vec;
    using WPart = Vec;
    static constexpr int kStep = 1;
    static constexpr int kParts = 1;
    static constexpr int kStepBytes = kLanes * 4;
    static constexpr int kSums = kMaxSums;
    static constexpr int kTiles = kMaxTiles;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        return load(reinterpret_cast<const float*>(w));
    }
    static EVERSTEP_INLINE XPart row(const X* x, int) { return set(*x); }
    static EVERSTEP_INLINE XPart last(const X* x, int) { return set(*x); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, WPart w) { return fma(x, w, sum); }
    static EVERSTEP_INLINE WPart part_of(WPart w, int) { return w; }
};

#if defined(__AVX512BF16__)

struct PairsDot {
    using X = bf16;
    using XPart = __m512i;
    using WPart = __m512i;
    static constexpr int kStep = 2;
    static constexpr int kParts = 1;
    static constexpr int kStepBytes = kLanes * 2 * 2;
    static constexpr int kSums = kMaxSums;
    static constexpr int kTiles = kMaxTiles;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        return _mm512_loadu_si512(w);
    }
    static EVERSTEP_INLINE XPart row(const X* x, int) {
        std::int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    // an odd K: the pair's second half is not read
    static EVERSTEP_INLINE XPart last(const X* x, int) { return _mm512_set1_epi32(*x); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, WPart w) {
        return Vec{{(Native)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)x, (__m512bh)w)}};
    }
    static EVERSTEP_INLINE WPart part_of(WPart w, int) { return w; }
};
using Bf16 = PairsDot;

template <class D>
struct Fp8Dot : PairsDot {
    static constexpr int kStepBytes = kLanes * 2;
    static constexpr int kSums = kDirectSums;
    static constexpr int kTiles = kDirectTiles;
    using Decoder = D;

    static EVERSTEP_INLINE WPart weight(const D& decoder, const char* w) { return decoder.words(w); }
};

#else

struct PairsExpanded {
    // rows were expanded to float32, and padded to an even length
    using X = float;
    using XPart = Vec;
    using WPart = Vec;  // words of two bf16
    static constexpr int kStep = 2;
    static constexpr int kParts = 2;
    static constexpr int kStepBytes = kLanes * 2 * 2;
    static constexpr int kSums = kMaxSums;
    static constexpr int kTiles = kMaxTiles;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        return load(reinterpret_cast<const float*>(w));
    }
    static EVERSTEP_INLINE XPart row(const X* x, int part) { return set(x[part]); }
    static EVERSTEP_INLINE XPart last(const X* x, int part) { return row(x, part); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, Vec w) { return fma(x, w, sum); }
    static EVERSTEP_INLINE Vec part_of(WPart w, int part) { return part == 0 ? even_of(w) : odd_of(w); }
};
using Bf16 = PairsExpanded;

template <class D>
struct Fp8Expanded : PairsExpanded {
    using WPart = typename D::Parts;
    static constexpr int kStepBytes = kLanes * 2;
    static constexpr int kTiles = kDirectTiles;
    using Decoder = D;

    static EVERSTEP_INLINE WPart weight(const D& decoder, const char* w) { return decoder.parts(w); }
    static EVERSTEP_INLINE Vec part_of(WPart w, int part) { return part == 0 ? even_of(w) : odd_of(w); }
};

#endif

template <class F>
constexpr bool kIsFp8 = !std::is_same_v<typename F::Decoder, NoDecoder>;

// The sums of kRows rows × kTiles column tiles, over all of K.
template <class F, int kRows, int kTiles>
void block(const typename F::X* x, std::int64_t x_stride, const char* w, std::int64_t tile_bytes,
           const float* scale, std::int64_t scale_stride, std::int64_t k, float* out) {
    Vec sums[kRows][kTiles];
    for (auto& row : sums)
        for (Vec& sum : row) sum = zero();
    const std::int64_t steps = k / F::kStep;
    const std::int64_t rounds_of_own = steps - kAheadBytes / F::kStepBytes;
    typename F::WPart parts[kTiles];
    typename F::Decoder decoders[kTiles];
    for (std::int64_t step = 0; step < steps;) {
        const std::int64_t end = kIsFp8<F> ? std::min(steps, step + kScaleSteps) : steps;
#pragma GCC unroll 8
        for (int tile = 0; tile < kTiles; ++tile)
            decoders[tile].start(scale + tile * scale_stride, step / kScaleSteps);
        for (; step < end; ++step) {
            // ahead in this tile, then in the tile that the next block of columns begins with
            const std::int64_t jump = step < rounds_of_own ? 0 : (kTiles - 1) * tile_bytes;
#pragma GCC unroll 8
            for (int tile = 0; tile < kTiles; ++tile) {
                const char* from = w + tile * tile_bytes + step * F::kStepBytes;
                __builtin_prefetch(from + kAheadBytes + jump);
                parts[tile] = F::weight(decoders[tile], from);
            }
#pragma GCC unroll 2
            for (int part = 0; part < F::kParts; ++part) {
                decltype(F::part_of(parts[0], part)) halves[kTiles];
#pragma GCC unroll 8
                for (int tile = 0; tile < kTiles; ++tile) halves[tile] = F::part_of(parts[tile], part);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    const auto value = F::row(x + row * x_stride + step * F::kStep, part);
#pragma GCC unroll 8
                    for (int tile = 0; tile < kTiles; ++tile)
                        sums[row][tile] = F::multiply(sums[row][tile], value, halves[tile]);
                }
            }
        }
    }
    if (k % F::kStep != 0) {
#pragma GCC unroll 8
        for (int tile = 0; tile < kTiles; ++tile) {
            decoders[tile].start(scale + tile * scale_stride, steps / kScaleSteps);
            parts[tile] =
                F::weight(decoders[tile], w + tile * tile_bytes + steps * F::kStepBytes);
        }
#pragma GCC unroll 2
        for (int part = 0; part < F::kParts; ++part) {
            decltype(F::part_of(parts[0], part)) halves[kTiles];
#pragma GCC unroll 8
            for (int tile = 0; tile < kTiles; ++tile) halves[tile] = F::part_of(parts[tile], part);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const auto value = F::last(x + row * x_stride + steps * F::kStep, part);
#pragma GCC unroll 8
                for (int tile = 0; tile < kTiles; ++tile)
                    sums[row][tile] = F::multiply(sums[row][tile], value, halves[tile]);
            }
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int tile = 0; tile < kTiles; ++tile)
            store(out + row * kSumsStride + tile * kLanes, sums[row][tile]);
}

template <class F>
using Block = void (*)(const typename F::X*, std::int64_t, const char*, std::int64_t, const float*,
                       std::int64_t, std::int64_t, float*);

constexpr int max_rows(int tiles, int sums = kMaxSums) {
    return std::min(8, std::max(1, sums / tiles));
}

template <class F, int kTiles, int kRows = max_rows(kTiles, F::kSums)>
Block<F> pick_rows(int rows) {
    if constexpr (kRows > 1)
        if (rows < kRows) return pick_rows<F, kTiles, kRows - 1>(rows);
    return block<F, kRows, kTiles>;
}

template <class F>
Block<F> pick(int rows, int tiles) {
    if (tiles == 1) return pick_rows<F, 1>(rows);
    if constexpr (F::kTiles == 2) return pick_rows<F, 2>(rows);
    switch (tiles) {
        case 2: return pick_rows<F, 2>(rows);
        case 3: return pick_rows<F, 3>(rows);
        default: return pick_rows<F, 4>(rows);
    }
}

// -- what becomes of the sums

struct Sink {
    void* y;
    std::int64_t stride;
    Output output;

    EVERSTEP_INLINE void put(const Packed& w, std::int64_t row, std::int64_t column, Vec value) const {
        const auto count = static_cast<int>(std::min<std::int64_t>(kLanes, w.n - column));
        const std::int64_t at = row * stride + column;
        if (w.format == kFloat32 || output == kFloat)
            write(static_cast<float*>(y) + at, value, count);
        else
            write(static_cast<bf16*>(y) + at, value, count);
    }

    void finish(const Packed& w, std::int64_t row, int rows, std::int64_t tile, int tiles,
                const float* sums) const {
        for (int r = 0; r < rows; ++r) {
            for (int t = 0; t < tiles; t += w.is_pair ? 2 : 1) {
                Vec value = biased(w, tile + t, load(sums + r * kSumsStride + t * kLanes));
                if (w.is_pair) {
                    const Vec up = biased(w, tile + t + 1, load(sums + r * kSumsStride + (t + 1) * kLanes));
                    value = w.format == kFloat32 ? value * sigmoid(value) * up : swiglu(value, up);
                }
                put(w, row + r, (tile + t) / (w.is_pair ? 2 : 1) * kLanes, value);
            }
        }
    }

  private:
    template <class T>
    static EVERSTEP_INLINE void write(T* to, Vec value, int count) {
        if (count == kLanes)
            store(to, value);
        else
            store_first(to, value, count);
    }

    static EVERSTEP_INLINE Vec biased(const Packed& w, std::int64_t tile, Vec sums) {
        return w.bias ? sums + load(w.bias + tile * kLanes) : sums;
    }

    // T(T(silu(T(gate))) · T(up)); `put` rounds the last
    static EVERSTEP_INLINE Vec swiglu(Vec gate, Vec up) {
        gate = round_bf16(gate);
        return round_bf16(gate * sigmoid(gate)) * round_bf16(up);
    }
};

}  // namespace everstep
