// Each instruction that the kernels use, as a function of memory, for test_instructions.py: compiled over
// the emulation, and for the processor where it has them.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../../kernels/cpu/amx.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <class V>
V read(const void* from) {
    V whole;
    std::memcpy(&whole, from, sizeof whole);
    return whole;
}

template <class V>
void write(void* to, V whole) {
    std::memcpy(to, &whole, sizeof whole);
}

}  // namespace

#define A read<__m512>(a)
#define B read<__m512>(b)
#define C read<__m512>(c)
#define AI read<__m512i>(a)
#define BI read<__m512i>(b)
#define CI read<__m512i>(c)
#define HALF read<__m256i>(a)
// out = expression of the vectors at a, b and c
#define INSTRUCTION(name, expression)                                                    \
    EXPORT void name(const void* a, const void* b, const void* c, void* out) {           \
        (void)a, (void)b, (void)c;                                                       \
        write(out, expression);                                                          \
    }

INSTRUCTION(set1_ps, _mm512_set1_ps(read<float>(a)))
INSTRUCTION(setzero_ps, _mm512_setzero_ps())
INSTRUCTION(loadu_ps, _mm512_loadu_ps(static_cast<const float*>(a)))
INSTRUCTION(add_ps, _mm512_add_ps(A, B))
INSTRUCTION(mul_ps, _mm512_mul_ps(A, B))
INSTRUCTION(fmadd_ps, _mm512_fmadd_ps(A, B, C))
INSTRUCTION(cvtss_f32, _mm512_cvtss_f32(A))
INSTRUCTION(cvtph_ps, _mm512_cvtph_ps(HALF))
INSTRUCTION(permutexvar_ps, _mm512_permutexvar_ps(AI, B))
INSTRUCTION(cmp_ps_mask, static_cast<std::uint32_t>(_mm512_cmp_ps_mask(A, B, _CMP_GE_OQ)))
INSTRUCTION(setzero_pd, _mm512_setzero_pd())
INSTRUCTION(add_pd, _mm512_add_pd(read<__m512d>(a), read<__m512d>(b)))
INSTRUCTION(cvtps_pd, _mm512_cvtps_pd(read<__m256>(a)))
INSTRUCTION(castps_si512, _mm512_castps_si512(A))
INSTRUCTION(castsi512_ps, _mm512_castsi512_ps(AI))
INSTRUCTION(castps512_ps256, _mm512_castps512_ps256(A))
INSTRUCTION(castsi128_si512, _mm512_inserti32x4(
    _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(read<__m128i>(a)), read<__m128i>(b), 3),
                       read<__m128i>(b), 1), read<__m128i>(c), 2))
INSTRUCTION(extractf32x8_ps, _mm512_extractf32x8_ps(A, 1))
INSTRUCTION(loadu_si512, _mm512_loadu_si512(a))
INSTRUCTION(set1_epi32, _mm512_set1_epi32(read<std::int32_t>(a)))
INSTRUCTION(set1_epi16, _mm512_set1_epi16(read<std::int16_t>(a)))
INSTRUCTION(set_epi32, _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
INSTRUCTION(slli_epi32, _mm512_slli_epi32(AI, 16))
INSTRUCTION(srli_epi32, _mm512_srli_epi32(AI, 16))
INSTRUCTION(slli_epi16, _mm512_slli_epi16(AI, 8))
INSTRUCTION(cvtepu8_epi16, _mm512_cvtepu8_epi16(HALF))
INSTRUCTION(cvtepu16_epi32, _mm512_cvtepu16_epi32(HALF))
INSTRUCTION(cvtepi32_epi16, _mm512_cvtepi32_epi16(AI))
INSTRUCTION(unpacklo_epi32, _mm512_unpacklo_epi32(AI, BI))
INSTRUCTION(unpackhi_epi32, _mm512_unpackhi_epi32(AI, BI))
INSTRUCTION(unpacklo_epi64, _mm512_unpacklo_epi64(AI, BI))
INSTRUCTION(unpackhi_epi64, _mm512_unpackhi_epi64(AI, BI))
INSTRUCTION(permutex2var_epi16, _mm512_permutex2var_epi16(AI, BI, CI))
INSTRUCTION(test_epi16_mask, static_cast<std::uint32_t>(_mm512_test_epi16_mask(AI, BI)))
INSTRUCTION(mask_blend_epi16, _mm512_mask_blend_epi16(read<std::uint32_t>(a), BI, CI))
INSTRUCTION(ternarylogic_epi32, _mm512_ternarylogic_epi32(AI, BI, CI, 0x78))
INSTRUCTION(cvtneps_pbh, _mm512_cvtneps_pbh(A))
INSTRUCTION(cvtne2ps_pbh, _mm512_cvtne2ps_pbh(A, B))
INSTRUCTION(dpbf16_ps, _mm512_dpbf16_ps(A, (__m512bh)BI, (__m512bh)CI))

EXPORT void storeu_pd(const void* a, const void*, const void*, void* out) {
    _mm512_storeu_pd(static_cast<double*>(out), read<__m512d>(a));
}
EXPORT void storeu_si512(const void* a, const void*, const void*, void* out) {
    _mm512_storeu_si512(out, AI);
}

#if defined(EVERSTEP_HAS_AMX)

using namespace everstep;

EXPORT int ask() { return amx::request() ? 0 : -1; }

EXPORT void configure(int rows) { amx::configure(amx::config_of(rows)); }

EXPORT void release() { amx::release(); }

// sums (rows, 16) += x (rows, 32) · w, as kernels/cpu/gemm.cpp has a tile: tile 2 when `is_lower`
EXPORT void multiply(int is_lower, const void* x, std::int64_t x_stride, const void* w, float* sums,
                     std::int64_t stride) {
    amx::load<6>(w, 64);
    amx::load<7>(w, 64);
    if (is_lower) {
        amx::load<2>(sums, stride);
        amx::load<5>(x, x_stride);
        amx::multiply<2, 5, 6>();
        amx::store<2>(sums, stride);
    } else {
        amx::load<1>(sums, stride);
        amx::load<4>(x, x_stride);
        amx::multiply<1, 4, 7>();
        amx::store<1>(sums, stride);
    }
}

EXPORT void clear(float* sums, std::int64_t stride) {
    amx::load<0>(sums, stride);
    amx::clear<0>();
    amx::store<0>(sums, stride);
}

EXPORT void multiply_misfit() { asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm0"); }
// tdpbf16ps tmm6, tmm0, tmm0, which no assembler takes
EXPORT void multiply_twice() { asm volatile(".byte 0xc4, 0xe2, 0x4a, 0x5c, 0xc0"); }
EXPORT void configure_wrongly(int at, int value) {
    amx::Config config = amx::config_of(16);
    reinterpret_cast<std::uint8_t*>(&config)[at] = static_cast<std::uint8_t>(value);
    amx::configure(config);
}

#endif
