// What rows need beyond common.h: tails, casts named by their type, and words of bf16 pairs.

#pragma once

#include "common.h"

namespace everstep {

// -- a row's tail: lanes beyond `left` read as zero and are not written

template <class T>
EVERSTEP_INLINE Vec load_left(const T* from, std::int64_t left) {
    return left >= kLanes ? load(from) : load_first(from, static_cast<int>(left));
}

template <class T>
EVERSTEP_INLINE void store_left(T* to, Vec x, std::int64_t left) {
    if (left >= kLanes)
        store(to, x);
    else
        store_first(to, x, static_cast<int>(left));
}

// T(x), kept as floats
template <class T>
EVERSTEP_INLINE Vec round_to(Vec x);
template <>
EVERSTEP_INLINE Vec round_to<float>(Vec x) {
    return x;
}
template <>
EVERSTEP_INLINE Vec round_to<bf16>(Vec x) {
    return round_bf16(x);
}

// e^x for x <= 0 as softmax needs it, within 2 ulp: cheaper than exp, as nothing overflows, and
// what is below e^-86 (4e-38, nothing beside the 1 of the largest score) is taken for e^-86.
EVERSTEP_INLINE Vec exp_share(Vec x) {
    const Native low = -86.0f - Native{}, shift = 12582912.0f - Native{};
    return each([&](int i) {
        const Native t = x.part[i] < low ? low : x.part[i];
        const Native shifted = fma(t, 1.44269504f - Native{}, shift);
        const Native n = shifted - shift;
        Native r = fma(n, -0.693359375f - Native{}, t);
        r = fma(n, 2.12194440e-4f - Native{}, r);
        Native p = 1.9875691500e-4f - Native{};
        p = fma(p, r, 1.3981999507e-3f - Native{});
        p = fma(p, r, 8.3334519073e-3f - Native{});
        p = fma(p, r, 4.1665795894e-2f - Native{});
        p = fma(p, r, 1.6666665459e-1f - Native{});
        p = fma(p, r, 5.0000001201e-1f - Native{});
        p = fma(p, r * r, r) + 1.0f;
        // n, in the low bits of `shifted`, goes to the exponent; the bits above it are shifted out
        return as_float(as_int(p) + (as_int(shifted) << 23));
    });
}

// Weights of a softmax: as store(), which treats subnormals otherwise (a bf16 product takes them
// for zero in any case).
EVERSTEP_INLINE void store_share(float* to, Vec x) { store(to, x); }
EVERSTEP_INLINE void store_share(bf16* to, Vec x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x.part[0]);
    std::memcpy(to, &half, sizeof half);
#else
    store(to, x);
#endif
}

// -- words of 32 bits: a float32; of bf16 two (the even element in the lower half) where the level
// multiplies pairs, else one as a float32

using Words = Vec;

// elements whose products are added together, in an order of their own, and how many are a word
template <class T>
constexpr int kPair = 4 / static_cast<int>(sizeof(T));
#if defined(__AVX512BF16__)
template <class T>
constexpr int kPerWord = kPair<T>;
#else
template <class T>
constexpr int kPerWord = 1;
#endif

EVERSTEP_INLINE Words load_words(const std::uint32_t* from) {
    return load(reinterpret_cast<const float*>(from));
}

EVERSTEP_INLINE Words set_words(std::uint32_t word) {
    return each([&](int) { return as_float(static_cast<std::int32_t>(word) + NativeInt{}); });
}

EVERSTEP_INLINE Words operator&(Words a, std::uint32_t mask) {
    return each([&](int i) { return as_float(as_int(a.part[i]) & static_cast<std::int32_t>(mask)); });
}

// acc + a·b per lane; of two bf16 the odd product is added first (as vdpbf16ps has it)
template <class T>
EVERSTEP_INLINE Vec add_product(Vec acc, Words a, Words b) {
#if defined(__AVX512BF16__)
    if constexpr (kPerWord<T> == 2)
        return Vec{{(Native)_mm512_dpbf16_ps((__m512)acc.part[0], (__m512bh)a.part[0],
                                             (__m512bh)b.part[0])}};
#endif
    return fma(a, b, acc);
}

}  // namespace everstep
