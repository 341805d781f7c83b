// The products of one token's attention at the AVX2 level, bf16: its few rows read keys and values
// where they lie, instead of from the layouts of attention.cpp, which pay only where more rows share
// them. The sums are the same ones in the same order.
#pragma once

#include "mathfun.h"

namespace everstep {

#if defined(__AVX2__) && !defined(__AVX512F__)

// Rows of memory that are read next. They are asked for little by little, between multiply-adds: all
// at once they would hold up those.
struct Ahead {
    const bf16* const* rows;
    std::int64_t count;

    EVERSTEP_INLINE void ask(std::int64_t row, std::int64_t first, std::int64_t width) const {
        if (row >= count) return;
        for (std::int64_t at = first; at < first + width; at += 32) __builtin_prefetch(rows[row] + at, 0, 2);
    }
};

// What was broadcast from there is broadcast again: kept in registers it would drive the sums out of
// them, and a sum that goes through memory waits three times as long for itself.
EVERSTEP_INLINE void forget_loads(const float*& from) { asm("" : "+r"(from)); }

// four words (eight elements) of eight keys, keys becoming lanes
EVERSTEP_INLINE void turn_keys(const bf16* const* keys, std::int64_t at, __m256i* words) {
    __m256i x[4];
    for (int j = 0; j < 4; ++j) {
        auto four = [&](int key) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys[key] + at));
        };
        x[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(j)), four(j + 4), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    words[0] = _mm256_unpacklo_epi64(a, c);
    words[1] = _mm256_unpackhi_epi64(a, c);
    words[2] = _mm256_unpacklo_epi64(b, d);
    words[3] = _mm256_unpackhi_epi64(b, d);
}

// scores of ROWS queries and EIGHTS·8 keys, whose elements begin at `first`
template <int ROWS, int EIGHTS>
void score_keys(const bf16* const* keys, std::int64_t first, const float* queries, std::int64_t dim,
                float scale, float* scores, std::int64_t stride) {
    __m256 acc[ROWS][EIGHTS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int e = 0; e < EIGHTS; ++e) acc[r][e] = _mm256_setzero_ps();
    const __m256i upper = _mm256_set1_epi32(-0x10000);
    for (std::int64_t d = 0; d < dim; d += 8) {
#pragma GCC unroll 4
        for (int e = 0; e < EIGHTS; ++e) {
            __m256i words[4];
            forget_loads(queries);
            turn_keys(keys + e * 8, first + d, words);
#pragma GCC unroll 4
            for (int w = 0; w < 4; ++w) {
                const __m256 odd = (__m256)_mm256_and_si256(words[w], upper);
                const __m256 even = (__m256)_mm256_slli_epi32(words[w], 16);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    // laid by lay_query: the odd element of a pair first
                    const float* query = queries + r * dim + d + 2 * w;
                    acc[r][e] = _mm256_fmadd_ps(_mm256_set1_ps(query[0]), odd, acc[r][e]);
                    acc[r][e] = _mm256_fmadd_ps(_mm256_set1_ps(query[1]), even, acc[r][e]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int e = 0; e < EIGHTS; ++e)
            _mm256_storeu_ps(scores + r * stride + e * 8, _mm256_mul_ps(acc[r][e], _mm256_set1_ps(scale)));
}

// scores of ROWS queries and all `count` keys of a block, of which there is room for whole vectors
template <int ROWS>
void score_block(const bf16* const* keys, std::int64_t count, std::int64_t first, const float* queries,
                 std::int64_t dim, float scale, float* scores, std::int64_t stride, Ahead ahead) {
    // chains enough to hide a multiply-add's latency
    constexpr int kEights = ROWS <= 2 ? 4 : 2;
    std::int64_t k = 0;
    for (; k + kEights * 8 <= count; k += kEights * 8) {
        for (std::int64_t i = k; i < k + kEights * 8; ++i) ahead.ask(i, first, dim);
        score_keys<ROWS, kEights>(keys + k, first, queries, dim, scale, scores + k, stride);
    }
    for (std::int64_t i = k; i < ahead.count; ++i) ahead.ask(i, first, dim);
    for (; k < count; k += 8) {
        // what is missing repeats the last key: its score is never used
        const bf16* some[8];
        for (int i = 0; i < 8; ++i) some[i] = keys[std::min<std::int64_t>(k + i, count - 1)];
        score_keys<ROWS, 1>(some, first, queries, dim, scale, scores + k, stride);
    }
}

// totals of ROWS outputs += COLS·16 elements, from `first` on, over `count` positions of a block
template <int ROWS, int COLS>
void add_values(const bf16* const* values, std::int64_t count, std::int64_t first,
                const float* weights, std::int64_t stride, float* totals, std::int64_t dim, Ahead ahead) {
    Vec acc[ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLS; ++c) acc[r][c] = zero();
    // the weight of position p lies at p ^ 1
    auto add = [&](std::int64_t position) {
        const bf16* row = values[position] + first;
        const float* shares = weights + (position ^ 1);
        ahead.ask(position, first, COLS * kLanes);
#pragma GCC unroll 4
        for (int c = 0; c < COLS; ++c) {
            forget_loads(shares);
            const Vec value = load(row + c * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) acc[r][c] = fma(set(shares[r * stride]), value, acc[r][c]);
        }
    };
    for (std::int64_t p = 0; p + 2 <= count; p += 2) {
        add(p + 1);
        add(p);
    }
    if (count % 2 != 0) {
        // half a pair: the second position is not there
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < COLS; ++c) acc[r][c] = fma(zero(), zero(), acc[r][c]);
        add(count - 1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLS; ++c) {
            float* total = totals + r * dim + c * kLanes;
            store(total, load(total) + acc[r][c]);
        }
}

#endif

}  // namespace everstep
