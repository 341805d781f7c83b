// CRC-32 as zlib has it, sixteen bytes at a time by carry-less products.
//
// The bytes are a polynomial over GF(2), lowest bit first. x^n mod P folds a part of it onto what
// follows n bits later, without changing the remainder: four parts of 128 bits are folded over 512
// bits each, then over 128 bits into one, which is reduced to 32 bits (Barrett).
// (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009.)
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

// x^n mod P, bits reversed, one place up: n = 4·128 ± 32, 128 ± 32, 64; then P and ⌊x^64 / P⌋
constexpr long long kFold512[2] = {0x154442bd4, 0x1c6e41596};
constexpr long long kFold128[2] = {0x1751997d0, 0x0ccaa009e};
constexpr long long kFold64 = 0x163cd6124;
constexpr long long kReduce[2] = {0x1db710641, 0x1f7011641};

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i part, __m128i factor,
                                                             __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(part, factor, 0x00);
    const __m128i high = _mm_clmulepi64_si128(part, factor, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

__attribute__((target("sse4.1"))) inline __m128i at(const unsigned char* place) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
}

// count: a multiple of 16, at least 64
__attribute__((target("pclmul,sse4.1"))) std::uint32_t crc32(const unsigned char* data,
                                                             std::int64_t count,
                                                             std::uint32_t crc) {
    __m128i part[4];
    for (int i = 0; i < 4; ++i) part[i] = at(data + 16 * i);
    part[0] = _mm_xor_si128(part[0], _mm_cvtsi32_si128(static_cast<int>(~crc)));
    const __m128i far = _mm_set_epi64x(kFold512[1], kFold512[0]);
    std::int64_t place = 64;
    for (; place + 64 <= count; place += 64)
        for (int i = 0; i < 4; ++i) part[i] = fold(part[i], far, at(data + place + 16 * i));
    const __m128i near = _mm_set_epi64x(kFold128[1], kFold128[0]);
    __m128i sum = part[0];
    for (int i = 1; i < 4; ++i) sum = fold(sum, near, part[i]);
    for (; place < count; place += 16) sum = fold(sum, near, at(data + place));
    // 128 bits → 96 → 64 → 32
    const __m128i words = _mm_setr_epi32(-1, 0, -1, 0);
    sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, near, 0x10));
    sum = _mm_xor_si128(_mm_srli_si128(sum, 4),
                        _mm_clmulepi64_si128(_mm_and_si128(sum, words),
                                             _mm_set_epi64x(0, kFold64), 0x00));
    const __m128i reduce = _mm_set_epi64x(kReduce[1], kReduce[0]);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, words), reduce, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, words), reduce, 0x00);
    return ~static_cast<std::uint32_t>(_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1));
}

}  // namespace
#endif

// The CRC-32 of `count` bytes (a multiple of 16, at least 64) after others of `crc`; -1 where this
// processor has no carry-less products.
EVERSTEP_API std::int64_t everstep_crc32(const unsigned char* data, std::int64_t count,
                                         std::uint32_t crc) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"))
        return crc32(data, count, crc);
#endif
    static_cast<void>(data), static_cast<void>(count), static_cast<void>(crc);
    return -1;
}
