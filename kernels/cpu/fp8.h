// FP8 weights on their way into a product: e4m3 codes times their scales.
//
// A decoder turns 16 outputs × 2 k of codes into bf16 values, the very bits of Weight.expanded():
// the product rounded to float32, then to bf16. Scales come 256 times their value (gemm.h); codes
// are no NaN, scales zero or within 2^±100 (kernels/packed.py): no product is subnormal.
#pragma once

#include "common.h"

namespace everstep {

// steps of two k that share a scale: 128 columns
constexpr std::int64_t kScaleSteps = 64;

// What turns codes into numbers, made anew for each kScaleSteps; here: nothing.
struct NoDecoder {
    EVERSTEP_INLINE void start(const float*, std::int64_t) {}
};

#if defined(__AVX512BF16__)

// Sixteen e4m3 codes times their scales. As float16 with its bits moved up a code is 1/256 of its
// value, subnormals included; the scale holds the 256.
EVERSTEP_INLINE __m512 decode(__m128i codes, __m512 scale) {
    const __m256i wide = _mm256_cvtepi8_epi16(codes);
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-0x4001));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), scale);
}

// 16 × 2 codes to 16 bf16 pairs: each product rounded to float32, then to bf16, as
// Weight.expanded() does. With one scale for all there are 128 results and their negatives.
struct BlockDecoder {
    __m512i table[4];

    EVERSTEP_INLINE void start(const float* scale, std::int64_t block) {
        alignas(64) static constexpr std::uint64_t kFirst[2] = {0x0706050403020100, 0x0f0e0d0c0b0a0908};
        const __m512 factor = _mm512_set1_ps(scale[block]);
        const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(kFirst));
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const auto low = static_cast<char>(part * 32), high = static_cast<char>(part * 32 + 16);
            table[part] = (__m512i)_mm512_cvtne2ps_pbh(
                decode(_mm_add_epi8(first, _mm_set1_epi8(high)), factor),
                decode(_mm_add_epi8(first, _mm_set1_epi8(low)), factor));
        }
    }
    EVERSTEP_INLINE __m512i words(const char* codes) const {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
        const __m512i low = _mm512_permutex2var_epi16(table[0], wide, table[1]);
        const __m512i high = _mm512_permutex2var_epi16(table[2], wide, table[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
        const __m512i size = _mm512_mask_blend_epi16(is_high, low, high);
        // size ^ (sign & 0x8000)
        return _mm512_ternarylogic_epi32(size, _mm512_slli_epi16(wide, 8),
                                         _mm512_set1_epi16(-0x8000), 0x78);
    }
};

struct ChannelDecoder {
    __m512 factor[2];

    // lanes of 8 outputs × 2 k, so that rounding leaves pairs
    EVERSTEP_INLINE void start(const float* scale, std::int64_t) {
        const __m512 all = _mm512_loadu_ps(scale);
        factor[0] = _mm512_permutexvar_ps(
            _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), all);
        factor[1] = _mm512_permutexvar_ps(
            _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8), all);
    }
    EVERSTEP_INLINE __m512i words(const char* codes) const {
        const auto* from = reinterpret_cast<const __m128i*>(codes);
        return (__m512i)_mm512_cvtne2ps_pbh(decode(_mm_loadu_si128(from + 1), factor[1]),
                                            decode(_mm_loadu_si128(from), factor[0]));
    }
};

#else

// of sixteen words of two bf16: the lower, even k, and the upper
EVERSTEP_INLINE Vec even_of(Vec words) {
    return each([&](int i) { return as_float(as_int(words.part[i]) << 16); });
}
EVERSTEP_INLINE Vec odd_of(Vec words) {
    return each([&](int i) { return as_float(as_int(words.part[i]) & ~0xffff); });
}

// the same, apart
struct Pair {
    Vec even, odd;
};
EVERSTEP_INLINE Vec even_of(Pair pair) { return pair.even; }
EVERSTEP_INLINE Vec odd_of(Pair pair) { return pair.odd; }

// sign, exponent and fraction of an e4m3 code where a float32 has its own
constexpr std::int32_t kPlaces = static_cast<std::int32_t>(0x87f00000u);

// Codes in those places, times their scales, rounded. The first factor, exact, comes from the two
// exponent biases, less the scale's 2^8.
EVERSTEP_INLINE Vec scaled(Vec codes, Vec scale) {
    const Vec value = codes * set(0x1p112f) * scale;
    return each([&](int i) {
        const NativeInt bits = as_int(value.part[i]);
        return as_float((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
    });
}

// By multiplication. kIsBlock: one scale for all outputs, else one for each.
template <bool kIsBlock>
struct Multiplier {
    using Parts = Pair;
    Vec scale;

    EVERSTEP_INLINE void start(const float* scales, std::int64_t block) {
        scale = kIsBlock ? set(scales[block]) : load(scales);
    }
    EVERSTEP_INLINE Pair parts(const char* codes) const {
        Vec even, odd;
#if defined(__AVX2__)
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
            const auto* from = reinterpret_cast<const __m128i*>(codes) + i;
            const auto both = (NativeInt)_mm256_cvtepi16_epi32(_mm_loadu_si128(from));
            // the sign is copied down to where it shall be
            even.part[i] = as_float((both << 24) >> 4 & kPlaces);
            odd.part[i] = as_float(both << 12 & kPlaces);
        }
#else
        std::int32_t lanes[2][kLanes];
        for (int i = 0; i < 2 * kLanes; ++i) {
            const std::int32_t code = static_cast<std::int8_t>(codes[i]);
            lanes[i % 2][i / 2] = static_cast<std::int32_t>(static_cast<std::uint32_t>(code) << 20) & kPlaces;
        }
        std::memcpy(&even, lanes[0], sizeof even);
        std::memcpy(&odd, lanes[1], sizeof odd);
#endif
        return {scaled(even, scale), scaled(odd, scale)};
    }
    EVERSTEP_INLINE Vec words(const char* codes) const {
        const Pair pair = parts(codes);
        return each([&](int i) {
            const NativeInt lower = as_int(pair.even.part[i]) >> 16 & 0xffff;
            return as_float(lower | as_int(pair.odd.part[i]));
        });
    }
};

#if defined(__AVX2__)

// By table, for one scale: a product's fraction depends on the code's three bits of fraction alone,
// so that the bf16 of a code is that of its lower four bits, with half the exponent's upper three
// bits of places above. In bytes:
//
//     code      s eee emmm
//     bf16      s....eee | emmmmmmm       upper byte: table[emmm] + (s, eee); lower: table[emmm]
//
// Codes below 16, subnormals among them, have another table: what they differ in is kept.
// Scales must be so large that no other product is subnormal.
struct Table {
    using Parts = Vec;
    __m256i low, high, low_change, high_change;

    static bool takes(float scale) { return std::fabs(scale) >= 0x1p-100f; }

    EVERSTEP_INLINE void start(const float* scales, std::int64_t block) {
        const Vec scale = set(scales[block]);
        const __m256i first = words_of(0, scale), second = words_of(16, scale);
        low = bytes_of(_mm256_and_si256(second, _mm256_set1_epi16(0xff)));
        high = bytes_of(_mm256_srli_epi16(_mm256_sub_epi16(second, _mm256_set1_epi16(0x100)), 8));
        low_change = _mm256_xor_si256(low, bytes_of(_mm256_and_si256(first, _mm256_set1_epi16(0xff))));
        high_change = _mm256_xor_si256(high, bytes_of(_mm256_srli_epi16(first, 8)));
    }
    EVERSTEP_INLINE Vec parts(const char* codes) const { return words(codes); }
    EVERSTEP_INLINE Vec words(const char* from) const {
        const __m256i top = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121));
        // quarters 0, 2, 1, 3: so that the halves of both lanes are in order when unpacked
        const __m256i codes = _mm256_permute4x64_epi64(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), 0xd8);
        const __m256i size = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
        // a byte with its highest bit set looks up zero: every code from 16 on
        const __m256i small = _mm256_add_epi8(size, _mm256_set1_epi8(0x70));
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(0x0f));
        const __m256i lows = _mm256_xor_si256(_mm256_shuffle_epi8(low, size),
                                              _mm256_shuffle_epi8(low_change, small));
        const __m256i highs = _mm256_xor_si256(_mm256_shuffle_epi8(high, size),
                                               _mm256_shuffle_epi8(high_change, small));
        const __m256i signs = _mm256_add_epi8(highs, _mm256_shuffle_epi8(top, upper));
        return {{(Native)_mm256_unpacklo_epi8(lows, signs),
                 (Native)_mm256_unpackhi_epi8(lows, signs)}};
    }

  private:
    // the bf16 of sixteen codes from `code` on
    static EVERSTEP_INLINE __m256i words_of(int code, Vec scale) {
        const NativeInt lanes = {0, 1, 2, 3, 4, 5, 6, 7};
        const Vec values = scaled({{as_float((lanes + code) << 20), as_float((lanes + code + 8) << 20)}}, scale);
        const __m256i words =
            _mm256_packus_epi32(_mm256_srli_epi32((__m256i)values.part[0], 16),
                                _mm256_srli_epi32((__m256i)values.part[1], 16));
        return _mm256_permute4x64_epi64(words, 0xd8);
    }
    // sixteen words below 256 as bytes, in both lanes
    static EVERSTEP_INLINE __m256i bytes_of(__m256i words) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x88);
    }
};

#endif
#endif

}  // namespace everstep
