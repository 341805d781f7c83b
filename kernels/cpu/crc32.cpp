// CRC-32 as zlib has it, 16 or 32 bytes at a time by carry-less products, and a copy in the same pass.
//
// The bytes are a polynomial over GF(2), lowest bit first. x^n mod P folds a part of it onto what
// follows n bits later, without changing the remainder: four parts are folded over all four of them,
// then over 128 bits into one, which is reduced to 32 bits (Barrett).
// (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009.)
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define EVERSTEP_NARROW __attribute__((target("pclmul,sse4.1")))
#define EVERSTEP_WIDE __attribute__((target("avx2,vpclmulqdq,pclmul")))

namespace {

// x^n mod P, bits reversed, one place up: n = 8·128 ± 32, 4·128 ± 32, 128 ± 32, 64; then P and
// ⌊x^64 / P⌋
constexpr long long kFold1024[2] = {0x1e88ef372, 0x14a7fe880};
constexpr long long kFold512[2] = {0x154442bd4, 0x1c6e41596};
constexpr long long kFold128[2] = {0x1751997d0, 0x0ccaa009e};
constexpr long long kFold64 = 0x163cd6124;
constexpr long long kReduce[2] = {0x1db710641, 0x1f7011641};

EVERSTEP_NARROW inline __m128i pair(const long long (&factors)[2]) {
    return _mm_set_epi64x(factors[1], factors[0]);
}

EVERSTEP_NARROW inline __m128i fold(__m128i part, __m128i factor, __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(part, factor, 0x00);
    const __m128i high = _mm_clmulepi64_si128(part, factor, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

EVERSTEP_WIDE inline __m256i fold(__m256i part, __m256i factor, __m256i onto) {
    const __m256i low = _mm256_clmulepi64_epi128(part, factor, 0x00);
    const __m256i high = _mm256_clmulepi64_epi128(part, factor, 0x11);
    return _mm256_xor_si256(_mm256_xor_si256(low, high), onto);
}

// 16 bytes, which are put into `to` too where that is asked for
template <bool kCopies>
EVERSTEP_NARROW inline __m128i take(const unsigned char* from, unsigned char* to) {
    const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (kCopies) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), found);
    return found;
}

// eight floats as bf16, each in the lower half of its place: to nearest, ties to even; as torch has it
EVERSTEP_WIDE inline __m256i rounded(const float* from) {
    const __m256 values = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256 is_number = _mm256_cmp_ps(values, values, _CMP_ORD_Q);
    return _mm256_blendv_epi8(_mm256_set1_epi32(0xffff), high, _mm256_castps_si256(is_number));
}

constexpr int kAhead = 2048;  // bytes; measured: 512 to 4096 are within a tenth

// what the sum is of
enum class Source { kBytes, kFloats };

// 32 bytes from byte `place` of the result on
template <Source kSource, bool kCopies>
EVERSTEP_WIDE inline __m256i take_two(const unsigned char* data, std::int64_t place,
                                      unsigned char* to) {
    __m256i found;
    if (kSource == Source::kBytes) {
        found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + place));
    } else {
        const float* from = reinterpret_cast<const float*>(data) + place / 2;
        // a line each time; what the processor fetches by itself comes too late
        _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
        found = _mm256_packus_epi32(rounded(from), rounded(from + 8));
        found = _mm256_permute4x64_epi64(found, 0xd8);
    }
    if (kCopies) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + place), found);
    return found;
}

// the four parts one after the other, and what is left of the bytes from `place` on
template <bool kCopies, int kCount>
EVERSTEP_NARROW inline std::uint32_t finish(const __m128i (&part)[kCount],
                                            const unsigned char* data, std::int64_t place,
                                            std::int64_t count, unsigned char* to) {
    const __m128i near = pair(kFold128);
    __m128i sum = part[0];
    for (int i = 1; i < kCount; ++i) sum = fold(sum, near, part[i]);
    for (; place < count; place += 16)
        sum = fold(sum, near, take<kCopies>(data + place, to + place));
    // 128 bits → 96 → 64 → 32
    const __m128i words = _mm_setr_epi32(-1, 0, -1, 0);
    sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, near, 0x10));
    sum = _mm_xor_si128(_mm_srli_si128(sum, 4),
                        _mm_clmulepi64_si128(_mm_and_si128(sum, words),
                                             _mm_set_epi64x(0, kFold64), 0x00));
    const __m128i reduce = pair(kReduce);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, words), reduce, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, words), reduce, 0x00);
    return ~static_cast<std::uint32_t>(_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1));
}

// count: a multiple of 16, at least 64
template <bool kCopies>
EVERSTEP_NARROW std::uint32_t narrow(const unsigned char* data, std::int64_t count,
                                     std::uint32_t crc, unsigned char* to) {
    __m128i part[4];
    for (int i = 0; i < 4; ++i) part[i] = take<kCopies>(data + 16 * i, to + 16 * i);
    part[0] = _mm_xor_si128(part[0], _mm_cvtsi32_si128(static_cast<int>(~crc)));
    const __m128i far = pair(kFold512);
    std::int64_t place = 64;
    for (; place + 64 <= count; place += 64)
        for (int i = 0; i < 4; ++i) {
            const std::int64_t at = place + 16 * i;
            part[i] = fold(part[i], far, take<kCopies>(data + at, to + at));
        }
    return finish<kCopies>(part, data, place, count, to);
}

// count: a multiple of 16, of floats of 128, at least 128
template <Source kSource, bool kCopies>
EVERSTEP_WIDE std::uint32_t wide(const unsigned char* data, std::int64_t count, std::uint32_t crc,
                                 unsigned char* to) {
    __m256i part[4];
    for (int i = 0; i < 4; ++i) part[i] = take_two<kSource, kCopies>(data, 32 * i, to);
    const __m128i begin = _mm_cvtsi32_si128(static_cast<int>(~crc));
    part[0] = _mm256_xor_si256(part[0], _mm256_inserti128_si256(_mm256_setzero_si256(), begin, 0));
    const __m256i far = _mm256_broadcastsi128_si256(pair(kFold1024));
    std::int64_t place = 128;
    for (; place + 128 <= count; place += 128)
        for (int i = 0; i < 4; ++i)
            part[i] = fold(part[i], far, take_two<kSource, kCopies>(data, place + 32 * i, to));
    __m128i halves[8];
    for (int i = 0; i < 4; ++i) {
        halves[2 * i] = _mm256_castsi256_si128(part[i]);
        halves[2 * i + 1] = _mm256_extracti128_si256(part[i], 1);
    }
    return finish<kCopies>(halves, data, place, count, to);
}

bool is_wide() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
}

}  // namespace
#endif

// The CRC-32 of `count` bytes (a multiple of 16, at least 64) after others of `crc`, and the bytes in
// `to` if that is not null; -1 where this processor has no carry-less products.
EVERSTEP_API std::int64_t everstep_crc32(const unsigned char* data, std::int64_t count,
                                         std::uint32_t crc, unsigned char* to) {
#if defined(__x86_64__)
    if (count >= 128 && is_wide())
        return to == nullptr ? wide<Source::kBytes, false>(data, count, crc, to)
                             : wide<Source::kBytes, true>(data, count, crc, to);
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"))
        return to == nullptr ? narrow<false>(data, count, crc, to)
                             : narrow<true>(data, count, crc, to);
#endif
    static_cast<void>(data), static_cast<void>(count), static_cast<void>(crc);
    static_cast<void>(to);
    return -1;
}

// The same of floats (a multiple of 64) rounded to bf16, which are put into `to`; -1 where this
// processor cannot.
EVERSTEP_API std::int64_t everstep_crc32_bf16(const float* from, std::int64_t count,
                                              std::uint32_t crc, unsigned char* to) {
#if defined(__x86_64__)
    if (count >= 64 && is_wide())
        return wide<Source::kFloats, true>(reinterpret_cast<const unsigned char*>(from), 2 * count,
                                           crc, to);
#endif
    static_cast<void>(from), static_cast<void>(count), static_cast<void>(crc);
    static_cast<void>(to);
    return -1;
}
