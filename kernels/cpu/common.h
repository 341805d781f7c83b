// What every kernel file shares: sixteen floats at a time, bf16, exp, threads, scratch memory.
//
// The sources of this folder are compiled once per level (kernels/native_build.py holds the flags):
//
//   level     a Vec is             bf16 products                     multiply-add
//   amx       1 register of 16     tiles of 16 rows (gemm.cpp)       fused
//   avx512    1 register of 16     pairs, vdpbf16ps                  fused
//   avx2      2 registers of 8     expanded to float32               fused
//   portable  4 registers of 4     expanded to float32               fused where the machine has it
//
// Bits are ours to define: no -ffast-math, no contraction; a sum is a chain or a fixed tree that
// the code spells out. An operation on a Vec acts on each lane alone, so a lane's bits depend on
// neither its place nor its neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "pool.h"

// a function that Python calls: plain C names, nothing thrown
#define EVERSTEP_API extern "C" __attribute__((visibility("default")))
#define EVERSTEP_INLINE inline __attribute__((always_inline))

namespace everstep {

using bf16 = std::uint16_t;  // the bits of a bfloat16

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

typedef float Native __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t NativeInt __attribute__((vector_size(kWidth * 4)));

// Sixteen floats.
struct Vec {
    Native part[kParts];
};

EVERSTEP_INLINE NativeInt as_int(Native x) { return (NativeInt)x; }
EVERSTEP_INLINE Native as_float(NativeInt x) { return (Native)x; }

// function(part) for each register; written out, since the compiler keeps in registers only what it
// never saw indexed by a variable
template <class Function>
EVERSTEP_INLINE Vec each(Function function) {
    if constexpr (kParts == 1)
        return Vec{{function(0)}};
    else if constexpr (kParts == 2)
        return Vec{{function(0), function(1)}};
    else
        return Vec{{function(0), function(1), function(2), function(3)}};
}

EVERSTEP_INLINE Vec set(float x) {
    return each([&](int) { return x - Native{}; });
}

EVERSTEP_INLINE Vec zero() {
    return each([](int) { return Native{}; });
}

EVERSTEP_INLINE Vec load(const float* from) {
    return each([&](int i) {
        Native part;
        std::memcpy(&part, from + i * kWidth, sizeof part);
        return part;
    });
}

EVERSTEP_INLINE void store(float* to, Vec x) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) std::memcpy(to + i * kWidth, &x.part[i], sizeof(Native));
}

// The first `count` lanes only; memory beyond is neither read nor written.
EVERSTEP_INLINE Vec load_first(const float* from, int count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, from, sizeof(float) * static_cast<std::size_t>(count));
    return load(lanes);
}

EVERSTEP_INLINE void store_first(float* to, Vec x, int count) {
    float lanes[kLanes];
    store(lanes, x);
    std::memcpy(to, lanes, sizeof(float) * static_cast<std::size_t>(count));
}

EVERSTEP_INLINE Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
}
EVERSTEP_INLINE Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
}
EVERSTEP_INLINE Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
}
EVERSTEP_INLINE Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
}
// NaN in `a` stays
EVERSTEP_INLINE Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] < b.part[i] ? b.part[i] : a.part[i]; });
}
EVERSTEP_INLINE Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.part[i] > b.part[i] ? b.part[i] : a.part[i]; });
}

// a·b + c, rounded once; twice at the portable level of machines without the instruction
// (std::fma is a function call there).
EVERSTEP_INLINE Native fma(Native a, Native b, Native c) {
#if defined(__AVX512F__)
    return (Native)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    Native out;
    for (int i = 0; i < kWidth; ++i) out[i] = std::fma(a[i], b[i], c[i]);
    return out;
#else
    return a * b + c;
#endif
}

EVERSTEP_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}

EVERSTEP_INLINE float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The sum of the lanes by halves: 16 → 8 → 4 → 2 → 1, lane i with lane i + half.
EVERSTEP_INLINE float sum_lanes(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

EVERSTEP_INLINE float max_lanes(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    float best = lanes[0];
    for (int i = 1; i < kLanes; ++i) best = best < lanes[i] ? lanes[i] : best;
    return best;
}

// -- bf16

EVERSTEP_INLINE float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// To nearest, ties to even; NaN to a quiet NaN.
EVERSTEP_INLINE bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Each lane rounded to a bf16 value, kept as a float. The same rounding at every level.
EVERSTEP_INLINE Vec round_bf16(Vec x) {
    return each([&](int i) {
        const NativeInt bits = as_int(x.part[i]);
        const NativeInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
        const NativeInt quiet = (bits | 0x400000) & ~0xffff;
        return as_float((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    });
}

EVERSTEP_INLINE Vec load(const bf16* from) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vec{{(Native)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}};
#elif defined(__AVX2__)
    return each([&](int i) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
        return (Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    });
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(from[i]);
    return load(lanes);
#endif
}

EVERSTEP_INLINE Vec load_first(const bf16* from, int count) {
    bf16 lanes[kLanes] = {};
    std::memcpy(lanes, from, sizeof(bf16) * static_cast<std::size_t>(count));
    return load(lanes);
}

// Rounds, then stores.
EVERSTEP_INLINE void store(bf16* to, Vec x) {
    const Vec rounded = round_bf16(x);
#if defined(__AVX512F__)
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512((__m512)rounded.part[0]), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
#elif defined(__AVX2__)
    const __m256i low = _mm256_srli_epi32((__m256i)rounded.part[0], 16);
    const __m256i high = _mm256_srli_epi32((__m256i)rounded.part[1], 16);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
#else
    std::uint32_t lanes[kLanes];
    std::memcpy(lanes, &rounded, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<bf16>(lanes[i] >> 16);
#endif
}

EVERSTEP_INLINE void store_first(bf16* to, Vec x, int count) {
    bf16 lanes[kLanes];
    store(lanes, x);
    std::memcpy(to, lanes, sizeof(bf16) * static_cast<std::size_t>(count));
}

// -- e^x, within 2 ulp (tests/kernels/test_native_gemm.py); inf above 88.73, 0 below -103.98

EVERSTEP_INLINE Vec exp(Vec x) {
    const Native high = 89.0f - Native{}, low = -104.0f - Native{};
    // adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits
    const Native shift = 12582912.0f - Native{};
    return each([&](int i) {
        Native t = x.part[i];
        t = t > high ? high : t;
        t = t < low ? low : t;
        const Native shifted = fma(t, 1.44269504f - Native{}, shift);
        const Native n = shifted - shift;
        // ln 2 in two parts, the first with 9 bits: n · 0.693359375 is exact
        Native r = fma(n, -0.693359375f - Native{}, t);
        r = fma(n, 2.12194440e-4f - Native{}, r);
        Native p = 1.9875691500e-4f - Native{};
        p = fma(p, r, 1.3981999507e-3f - Native{});
        p = fma(p, r, 8.3334519073e-3f - Native{});
        p = fma(p, r, 4.1665795894e-2f - Native{});
        p = fma(p, r, 1.6666665459e-1f - Native{});
        p = fma(p, r, 5.0000001201e-1f - Native{});
        p = fma(p, r * r, r) + 1.0f;
        // 2^n in two factors, so that neither overflows nor is subnormal
        const NativeInt exponent = as_int(shifted) - 0x4b400000;
        const NativeInt half = exponent >> 1;
        const Native first = as_float((half + 127) << 23);
        const Native second = as_float((exponent - half + 127) << 23);
        return p * first * second;
    });
}

// 1 / (1 + e^-x), as kernels/activation.py spells it
EVERSTEP_INLINE Vec sigmoid(Vec x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

// -- threads

// Calls function(task) for each task in [0, tasks), on up to `threads` threads. Which thread runs
// a task never changes what it computes: tasks write disjoint outputs and share no sum. A thread
// that is done with a task takes the next, so there may be many, of different sizes (pool.h).
template <class Function>
inline void parallel(std::int64_t tasks, int threads, const Function& function) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (std::int64_t task = 0; task < tasks; ++task) function(task);
        return;
    }
    share_tasks(
        tasks, threads,
        [](const void* context, std::int64_t task) { (*static_cast<const Function*>(context))(task); },
        &function);
}

// -- memory

// Memory of one thread that grows and is used again; aligned to 64 bytes. `Tag` keeps the buffers
// of different uses apart: each use declares a struct of its own.
template <class T, class Tag>
inline T* scratch(std::int64_t count) {
    struct Buffer {
        void* data = nullptr;
        std::size_t bytes = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    if (bytes > buffer.bytes) {
        std::free(buffer.data);
        buffer.data = std::aligned_alloc(64, bytes);
        buffer.bytes = buffer.data ? bytes : 0;
        // out of memory: nothing sensible can follow, and nothing may be thrown into Python
        if (!buffer.data) std::abort();
    }
    return static_cast<T*>(buffer.data);
}

inline std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace everstep
