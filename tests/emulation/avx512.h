// AVX-512 and its bf16 instructions for processors with AVX2 alone: those that kernels/cpu uses.
//
// Put before every source of a build for AVX2 (`-include`), it makes the very code of the levels
// avx512 and amx compile, and run, on this machine. Sixteen floats are still one `__m512`; the
// compiler splits plain arithmetic on it. Each function is the operation of its name in Intel's
// Intrinsics Guide, lane by lane; tests/emulation/test_instructions.py holds them to a model in numpy,
// and to the processor where it has them. An intrinsic that is missing here does not compile.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512BF16__ 1
// two registers hold what would be one (kernels/cpu/limits.cpp)
#define EVERSTEP_KEEP(vector) asm volatile("" : "+m"(vector))

#define INLINED inline __attribute__((always_inline))
// not inlined: sources that use one in hundreds of places compile in seconds, not minutes
#define EMULATED inline __attribute__((noinline))

namespace emulated {

// V of function(0), function(1), ... as elements E
template <class V, class E, class Function>
INLINED V lanes(Function function) {
    E out[sizeof(V) / sizeof(E)];
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(E)); ++i) out[i] = static_cast<E>(function(i));
    V whole;
    std::memcpy(&whole, out, sizeof whole);
    return whole;
}

// a vector's elements, to be indexed
template <class E, class V>
struct Elements {
    E at[sizeof(V) / sizeof(E)];

    explicit INLINED Elements(V whole) { std::memcpy(at, &whole, sizeof at); }
    INLINED E operator[](int i) const { return at[i]; }
};

template <class E, class V>
INLINED Elements<E, V> elements(V whole) {
    return Elements<E, V>(whole);
}

// the halves of a 512-bit vector, as 256-bit ones
template <class Half, class V>
INLINED Half half(V whole, int which) {
    Half out;
    std::memcpy(&out, reinterpret_cast<const char*>(&whole) + which * 32, sizeof out);
    return out;
}

template <class V, class Half>
INLINED V join(Half low, Half high) {
    V whole;
    std::memcpy(&whole, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&whole) + 32, &high, sizeof high);
    return whole;
}

template <class V>
INLINED V read(const void* from) {
    V whole;
    std::memcpy(&whole, from, sizeof whole);
    return whole;
}

// -- floats

EMULATED __m512 set1_ps(float x) { return lanes<__m512, float>([&](int) { return x; }); }
EMULATED __m512 setzero_ps() { return __m512{}; }
EMULATED __m512 loadu_ps(const void* from) { return read<__m512>(from); }
EMULATED __m512 add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED float cvtss_f32(__m512 a) { return a[0]; }

EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto part = [&](int i) {
        return _mm256_fmadd_ps(half<__m256>(a, i), half<__m256>(b, i), half<__m256>(c, i));
    };
    return join<__m512>(part(0), part(1));
}

EMULATED __m512 cvtph_ps(__m256i a) {
    return join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                        _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

EMULATED __m512 permutexvar_ps(__m512i index, __m512 a) {
    const auto from = elements<float>(a);
    const auto places = elements<std::uint32_t>(index);
    return lanes<__m512, float>([&](int i) { return from[static_cast<int>(places[i] & 15)]; });
}

template <int kOperation>
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
    const auto part = [&](int i) {
        const __m256 is = _mm256_cmp_ps(half<__m256>(a, i), half<__m256>(b, i), kOperation);
        return static_cast<unsigned>(_mm256_movemask_ps(is));
    };
    return static_cast<__mmask16>(part(0) | part(1) << 8);
}

// -- doubles

EMULATED __m512d setzero_pd() { return __m512d{}; }
EMULATED __m512d add_pd(__m512d a, __m512d b) { return a + b; }
EMULATED void storeu_pd(void* to, __m512d a) { std::memcpy(to, &a, sizeof a); }
EMULATED __m512d cvtps_pd(__m256 a) {
    return join<__m512d>(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                         _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}

// -- the same bits under another type; what a cast leaves undefined holds rubbish

EMULATED __m512i castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512 castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m256 castps512_ps256(__m512 a) { return half<__m256>(a, 0); }
EMULATED __m512i castsi128_si512(__m128i a) {
    __m512i whole;
    std::memset(&whole, 0xA5, sizeof whole);
    std::memcpy(&whole, &a, sizeof a);
    return whole;
}
template <int kPart>
EMULATED __m256 extractf32x8_ps(__m512 a) {
    return half<__m256>(a, kPart);
}

// -- integers

EMULATED __m512i loadu_si512(const void* from) { return read<__m512i>(from); }
EMULATED void storeu_si512(void* to, __m512i a) { std::memcpy(to, &a, sizeof a); }
EMULATED __m512i set1_epi32(int x) { return lanes<__m512i, std::int32_t>([&](int) { return x; }); }
EMULATED __m512i set1_epi16(short x) { return lanes<__m512i, std::int16_t>([&](int) { return x; }); }

// the last argument is lane 0
template <class... Lanes>
EMULATED __m512i set_epi32(Lanes... all) {
    static_assert(sizeof...(all) == 16, "sixteen lanes");
    const std::int32_t given[] = {all...};
    return lanes<__m512i, std::int32_t>([&](int i) { return given[15 - i]; });
}

EMULATED __m512i slli_epi32(__m512i a, unsigned count) {
    const auto from = elements<std::uint32_t>(a);
    return lanes<__m512i, std::uint32_t>([&](int i) { return count > 31 ? 0 : from[i] << count; });
}
EMULATED __m512i srli_epi32(__m512i a, unsigned count) {
    const auto from = elements<std::uint32_t>(a);
    return lanes<__m512i, std::uint32_t>([&](int i) { return count > 31 ? 0 : from[i] >> count; });
}
EMULATED __m512i slli_epi16(__m512i a, unsigned count) {
    const auto from = elements<std::uint16_t>(a);
    return lanes<__m512i, std::uint16_t>([&](int i) { return count > 15 ? 0 : from[i] << count; });
}

EMULATED __m512i cvtepu8_epi16(__m256i a) {
    const auto from = elements<std::uint8_t>(a);
    return lanes<__m512i, std::uint16_t>([&](int i) { return from[i]; });
}
EMULATED __m512i cvtepu16_epi32(__m256i a) {
    const auto from = elements<std::uint16_t>(a);
    return lanes<__m512i, std::uint32_t>([&](int i) { return from[i]; });
}
// the lower halves
EMULATED __m256i cvtepi32_epi16(__m512i a) {
    const auto from = elements<std::uint32_t>(a);
    return lanes<__m256i, std::uint16_t>([&](int i) { return from[i]; });
}

template <int kQuarter>
EMULATED __m512i inserti32x4(__m512i a, __m128i b) {
    std::memcpy(reinterpret_cast<char*>(&a) + (kQuarter & 3) * 16, &b, sizeof b);
    return a;
}

// Of each 128 bits the lower (kUpper = 0) or upper half of a's elements and b's, in turn.
template <class E, int kUpper>
INLINED __m512i unpack(__m512i a, __m512i b) {
    constexpr int kCount = 16 / static_cast<int>(sizeof(E));
    const auto x = elements<E>(a), y = elements<E>(b);
    return lanes<__m512i, E>([&](int i) {
        const int from = i / kCount * kCount + kUpper * kCount / 2 + i % kCount / 2;
        return i % 2 ? y[from] : x[from];
    });
}
EMULATED __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack<std::uint32_t, 0>(a, b); }
EMULATED __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack<std::uint32_t, 1>(a, b); }
EMULATED __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack<std::uint64_t, 0>(a, b); }
EMULATED __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack<std::uint64_t, 1>(a, b); }

EMULATED __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    const auto x = elements<std::uint16_t>(a), y = elements<std::uint16_t>(b);
    const auto places = elements<std::uint16_t>(index);
    return lanes<__m512i, std::uint16_t>(
        [&](int i) { return (places[i] & 32 ? y : x)[places[i] & 31]; });
}

EMULATED __mmask32 test_epi16_mask(__m512i a, __m512i b) {
    const auto x = elements<std::uint16_t>(a), y = elements<std::uint16_t>(b);
    __mmask32 mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>((x[i] & y[i]) != 0) << i;
    return mask;
}
// b where the mask is set
EMULATED __m512i mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
    const auto x = elements<std::uint16_t>(a), y = elements<std::uint16_t>(b);
    return lanes<__m512i, std::uint16_t>([&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}

// bit (4a + 2b + c) of the table, for each bit
template <int kTable>
EMULATED __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c) {
    const auto x = elements<std::uint32_t>(a), y = elements<std::uint32_t>(b), z = elements<std::uint32_t>(c);
    return lanes<__m512i, std::uint32_t>([&](int i) {
        std::uint32_t out = 0;
        for (int row = 0; row < 8; ++row)
            if (kTable >> row & 1)
                out |= (row & 4 ? x[i] : ~x[i]) & (row & 2 ? y[i] : ~y[i]) & (row & 1 ? z[i] : ~z[i]);
        return out;
    });
}

// -- bf16

// To nearest, ties to even; subnormals to a zero of their sign, NaN to a quiet NaN.
INLINED std::uint16_t round_to_bf16(std::uint32_t bits) {
    const std::uint32_t size = bits & 0x7fffffffu;
    if (size < 0x00800000u) return static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    if (size > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
EMULATED __m256bh cvtneps_pbh(__m512 a) {
    const auto from = elements<std::uint32_t>(a);
    return lanes<__m256bh, std::uint16_t>([&](int i) { return round_to_bf16(from[i]); });
}
// b in the lower half
EMULATED __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
    return join<__m512bh>(cvtneps_pbh(b), cvtneps_pbh(a));
}

// sum + x·y twice, rounded after each, to nearest, subnormals in and out being zeros whatever the
// thread has set: the processor's own multiply-add with its MXCSR swapped around it.
INLINED __m256 fma_twice(__m256 sum, __m256 x, __m256 y, __m256 then_x, __m256 then_y) {
    const unsigned flushed = 0x9fc0;  // DAZ, FTZ, to nearest, no exceptions
    unsigned before;
    asm("vstmxcsr %[before]\n\t"
        "vldmxcsr %[flushed]\n\t"
        "vfmadd231ps %[y], %[x], %[sum]\n\t"
        "vfmadd231ps %[then_y], %[then_x], %[sum]\n\t"
        "vldmxcsr %[before]"
        : [sum] "+&x"(sum), [before] "=&m"(before)
        : [flushed] "m"(flushed), [x] "x"(x), [y] "x"(y), [then_x] "x"(then_x), [then_y] "x"(then_y));
    return sum;
}
// the odd elements' products first
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const auto part = [&](int i) {
        const __m256i x = half<__m256i>(a, i), y = half<__m256i>(b, i);
        const __m256i upper = _mm256_set1_epi32(-0x10000);
        return fma_twice(half<__m256>(sum, i), (__m256)_mm256_and_si256(x, upper),
                         (__m256)_mm256_and_si256(y, upper), (__m256)_mm256_slli_epi32(x, 16),
                         (__m256)_mm256_slli_epi32(y, 16));
    };
    return join<__m512>(part(0), part(1));
}

}  // namespace emulated

// some are macros already where nothing is optimised
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 emulated::cvtss_f32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, operation) emulated::cmp_ps_mask<operation>(a, b)
#undef _mm512_setzero_pd
#define _mm512_setzero_pd emulated::setzero_pd
#undef _mm512_add_pd
#define _mm512_add_pd emulated::add_pd
#undef _mm512_storeu_pd
#define _mm512_storeu_pd emulated::storeu_pd
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd emulated::cvtps_pd
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated::castps512_ps256
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 emulated::castsi128_si512
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, part) emulated::extractf32x8_ps<part>(a)
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set_epi32
#define _mm512_set_epi32 emulated::set_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_inserti32x4
#define _mm512_inserti32x4(a, b, quarter) emulated::inserti32x4<quarter>(a, b)
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated::permutex2var_epi16
#undef _mm512_test_epi16_mask
#define _mm512_test_epi16_mask emulated::test_epi16_mask
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated::mask_blend_epi16
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32(a, b, c, table) emulated::ternarylogic_epi32<table>(a, b, c)
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps

#undef EMULATED
#undef INLINED
