// Sixteen float32 lanes, and exp over them: the same order of additions at every level.
//
// A `Lanes` is one zmm, two ymm or four 16-byte vectors, whichever the level has. Every sum over a
// row keeps sixteen lanes and ends in `sum_lanes`, so the order of additions is written here and
// does not follow the width of the machine's vectors. Levels differ in the last bit only where one
// fuses a product with its sum and the other cannot.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace everstep {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define EVERSTEP_LANES_512 1
constexpr int PARTS = 1;
#elif defined(__AVX2__) && defined(__FMA__)
#define EVERSTEP_LANES_256 1
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif

constexpr int LANES = 16;
constexpr int PART = LANES / PARTS;

typedef float FloatPart __attribute__((vector_size(PART * 4)));
typedef int32_t IntPart __attribute__((vector_size(PART * 4)));
typedef uint32_t WordPart __attribute__((vector_size(PART * 4)));

#define EVERSTEP_INLINE inline __attribute__((always_inline))
#define EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; ++i)

// float32 lanes
struct Lanes {
    FloatPart part[PARTS];
};

// 32-bit words: two bf16 each, or integers
struct Words {
    WordPart part[PARTS];
};

EVERSTEP_INLINE Lanes fill(float value) {
    Lanes out;
    EACH_PART out.part[i] = FloatPart{} + value;
    return out;
}

EVERSTEP_INLINE Words fill_words(uint32_t value) {
    Words out;
    EACH_PART out.part[i] = WordPart{} + value;
    return out;
}

EVERSTEP_INLINE Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

EVERSTEP_INLINE void store(float* to, const Lanes& value) { std::memcpy(to, &value, sizeof value); }

EVERSTEP_INLINE Words load_words(const void* from) {
    Words out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

EVERSTEP_INLINE void store_words(void* to, const Words& value) {
    std::memcpy(to, &value, sizeof value);
}

EVERSTEP_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    Lanes out;
    EACH_PART out.part[i] = a.part[i] + b.part[i];
    return out;
}

EVERSTEP_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    Lanes out;
    EACH_PART out.part[i] = a.part[i] - b.part[i];
    return out;
}

EVERSTEP_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes out;
    EACH_PART out.part[i] = a.part[i] * b.part[i];
    return out;
}

EVERSTEP_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
    Lanes out;
    EACH_PART out.part[i] = a.part[i] / b.part[i];
    return out;
}

// the larger; b where a is NaN
EVERSTEP_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
    Lanes out;
    EACH_PART out.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
    return out;
}

// a·b + c, rounded once where the level can
EVERSTEP_INLINE Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes out;
#if defined(EVERSTEP_LANES_512)
    out.part[0] = (FloatPart)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(EVERSTEP_LANES_256)
    EACH_PART out.part[i] =
        (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
    EACH_PART out.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
    return out;
}

// -- bf16: the upper half of a float32

// the odd elements of sixteen pairs
EVERSTEP_INLINE Lanes upper(const Words& pairs) {
    Lanes out;
    EACH_PART out.part[i] = (FloatPart)(pairs.part[i] & 0xFFFF0000u);
    return out;
}

// the even elements of sixteen pairs
EVERSTEP_INLINE Lanes lower(const Words& pairs) {
    Lanes out;
    EACH_PART out.part[i] = (FloatPart)(pairs.part[i] << 16);
    return out;
}

// round to nearest even, NaN stays NaN; the bf16 is in the upper half of each word
EVERSTEP_INLINE Words rounded_words(const Lanes& value) {
    Words out;
    EACH_PART {
        WordPart bits = (WordPart)value.part[i];
        WordPart up = bits + 0x7FFFu + ((bits >> 16) & 1u);
        IntPart is_number = value.part[i] == value.part[i];
        out.part[i] = is_number ? up : (bits | 0x00400000u);
    }
    return out;
}

EVERSTEP_INLINE Lanes rounded_to_bf16(const Lanes& value) {
    Words words = rounded_words(value);
    Lanes out;
    EACH_PART out.part[i] = (FloatPart)(words.part[i] & 0xFFFF0000u);
    return out;
}

EVERSTEP_INLINE float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

EVERSTEP_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)((bits | 0x00400000u) >> 16);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

EVERSTEP_INLINE Lanes load(const uint16_t* from) {
    Lanes out;
#if defined(EVERSTEP_LANES_512)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    out.part[0] = (FloatPart)_mm512_slli_epi32(wide, 16);
#else
    float wide[LANES];
    for (int i = 0; i < LANES; ++i) wide[i] = widen(from[i]);
    out = load(wide);
#endif
    return out;
}

EVERSTEP_INLINE void store(uint16_t* to, const Lanes& value) {
    Words words = rounded_words(value);
#if defined(EVERSTEP_LANES_512)
    __m512i upper_halves = _mm512_srli_epi32((__m512i)words.part[0], 16);
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(upper_halves));
#else
    uint32_t each[LANES];
    store_words(each, words);
    for (int i = 0; i < LANES; ++i) to[i] = (uint16_t)(each[i] >> 16);
#endif
}

// -- a row's tail: the missing lanes read as zero and are not written

template <class T>
EVERSTEP_INLINE Lanes load(const T* from, int64_t left) {
    if (left >= LANES) return load(from);
    T some[LANES] = {};
    std::memcpy(some, from, (size_t)left * sizeof(T));
    return load(some);
}

template <class T>
EVERSTEP_INLINE void store(T* to, const Lanes& value, int64_t left) {
    if (left >= LANES) return store(to, value);
    T some[LANES];
    store(some, value);
    std::memcpy(to, some, (size_t)left * sizeof(T));
}

// T(value) as float32
template <class T>
EVERSTEP_INLINE Lanes rounded(const Lanes& value);
template <>
EVERSTEP_INLINE Lanes rounded<float>(const Lanes& value) {
    return value;
}
template <>
EVERSTEP_INLINE Lanes rounded<uint16_t>(const Lanes& value) {
    return rounded_to_bf16(value);
}

// -- over the lanes of one vector

// fold the upper half onto the lower: lane i + lane i+8, then +4, +2, +1
EVERSTEP_INLINE float sum_lanes(const Lanes& value) {
    float x[LANES];
    store(x, value);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

EVERSTEP_INLINE float largest_lane(const Lanes& value) {
    float x[LANES];
    store(x, value);
    float best = x[0];
    for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// -- exp

// e^x to 1 unit in the last place (measured over all of float32: tests), exact at 0; zero below
// -104, infinite above 88.8, NaN stays NaN
EVERSTEP_INLINE Lanes exp(Lanes x) {
    Lanes out;
    EACH_PART {
        FloatPart v = x.part[i];
        v = v < -105.0f ? FloatPart{} - 105.0f : v;
        v = v > 89.0f ? FloatPart{} + 89.0f : v;
        x.part[i] = v;
    }
    // x = n·ln 2 + r, |r| <= ln 2 / 2; adding 1.5·2^23 rounds to an integer
    const Lanes shift = fill(12582912.0f);
    Lanes turned = fused(x, fill(1.44269504088896341f), shift);
    Lanes n = turned - shift;
    Lanes r = fused(n, fill(-0.693359375f), x);
    r = fused(n, fill(2.12194440e-4f), r);
    Lanes p = fill(1.9875691500e-4f);
    p = fused(p, r, fill(1.3981999507e-3f));
    p = fused(p, r, fill(8.3334519073e-3f));
    p = fused(p, r, fill(4.1665795894e-2f));
    p = fused(p, r, fill(1.6666665459e-1f));
    p = fused(p, r, fill(5.0000001201e-1f));
    p = fused(p * r, r, r) + fill(1.0f);
    // times 2^n in two steps, since 2^n alone may be no normal number
    EACH_PART {
        IntPart whole = (IntPart)turned.part[i] - 0x4B400000;
        IntPart first = whole >> 1;
        IntPart second = whole - first;
        FloatPart a = (FloatPart)((first + 127) << 23);
        FloatPart b = (FloatPart)((second + 127) << 23);
        out.part[i] = p.part[i] * a * b;
    }
    return out;
}

EVERSTEP_INLINE float exp(float x) {
    Lanes value = exp(fill(x));
    return value.part[0][0];
}

// 1/(1+e^-x)
EVERSTEP_INLINE Lanes sigmoid(const Lanes& x) {
    return fill(1.0f) / (fill(1.0f) + exp(fill(0.0f) - x));
}

}  // namespace everstep
