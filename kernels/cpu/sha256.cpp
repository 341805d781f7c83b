// SHA-256 (FIPS 180-4) of two messages at once, by the processor's own instructions.
//
// A round waits for the one before, so that one message leaves the unit idle half of the time: the
// rounds of a second message fit between, and both are there after little more than the time of one.
#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define EVERSTEP_SHA __attribute__((target("sha,sse4.1,ssse3")))

namespace {

alignas(16) constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// the instructions keep a state's words as (f e b a) and (h g d c), lowest first
struct State {
    __m128i feba, hgdc;
};

EVERSTEP_SHA inline __m128i words(const std::uint32_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

EVERSTEP_SHA inline State load(const std::uint32_t* from) {
    const __m128i badc = _mm_shuffle_epi32(words(from), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(words(from + 4), 0x1b);
    return {_mm_alignr_epi8(badc, hgfe, 8), _mm_blend_epi16(hgfe, badc, 0xf0)};
}

EVERSTEP_SHA inline void store(const State& state, std::uint32_t* to) {
    const __m128i abef = _mm_shuffle_epi32(state.feba, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(state.hgdc, 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_blend_epi16(abef, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_alignr_epi8(dchg, abef, 8));
}

template <int kLanes>
EVERSTEP_SHA void rounds(std::uint32_t* const (&states)[kLanes],
                         const unsigned char* const (&data)[kLanes], std::int64_t count) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    State state[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) state[lane] = load(states[lane]);
    for (std::int64_t block = 0; block < count; ++block) {
        State begin[kLanes];
        // the last sixteen words of each schedule, four to a vector
        __m128i word[kLanes][4];
        for (int lane = 0; lane < kLanes; ++lane) {
            begin[lane] = state[lane];
            const auto* from = reinterpret_cast<const __m128i*>(data[lane] + 64 * block);
            for (int i = 0; i < 4; ++i)
                word[lane][i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), big_endian);
        }
#pragma GCC unroll 16
        for (int step = 0; step < 16; ++step) {
            const __m128i constants = words(kRounds + 4 * step);
#pragma GCC unroll 2
            for (int lane = 0; lane < kLanes; ++lane) {
                State& s = state[lane];
                __m128i(&w)[4] = word[lane];
                const __m128i sum = _mm_add_epi32(w[step % 4], constants);
                s.hgdc = _mm_sha256rnds2_epu32(s.hgdc, s.feba, sum);
                s.feba = _mm_sha256rnds2_epu32(s.feba, s.hgdc, _mm_shuffle_epi32(sum, 0x0e));
                if (step >= 12) continue;
                const __m128i last = w[(step + 3) % 4];
                const __m128i before = _mm_alignr_epi8(last, w[(step + 2) % 4], 4);
                const __m128i first = _mm_sha256msg1_epu32(w[step % 4], w[(step + 1) % 4]);
                w[step % 4] = _mm_sha256msg2_epu32(_mm_add_epi32(first, before), last);
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            state[lane].feba = _mm_add_epi32(state[lane].feba, begin[lane].feba);
            state[lane].hgdc = _mm_add_epi32(state[lane].hgdc, begin[lane].hgdc);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) store(state[lane], states[lane]);
}

bool is_able() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) &&
           __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
}

}  // namespace
#endif

// `count` blocks of 64 bytes into a state of eight words, and as many of other bytes into a second
// state if that is not null; -1 where this processor has no instructions for it.
EVERSTEP_API int everstep_sha256(std::uint32_t* one, const unsigned char* data,
                                 std::uint32_t* other, const unsigned char* other_data,
                                 std::int64_t count) {
#if defined(__x86_64__)
    static const bool able = is_able();
    if (able) {
        if (other == nullptr)
            rounds<1>({one}, {data}, count);
        else
            rounds<2>({one, other}, {data, other_data}, count);
        return 0;
    }
#endif
    static_cast<void>(one), static_cast<void>(data), static_cast<void>(other);
    static_cast<void>(other_data), static_cast<void>(count);
    return -1;
}
