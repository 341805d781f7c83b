// What this machine can do at most, for benchmarks: Python times the calls.
#include "common.h"

// The compiler must believe that this register changed: chains that hold the same number stay apart.
#if defined(EVERSTEP_KEEP)
// tests/emulation has its own
#elif defined(__x86_64__) && defined(__AVX512F__)
#define EVERSTEP_KEEP(vector) asm volatile("" : "+v"(vector))
#elif defined(__x86_64__)
#define EVERSTEP_KEEP(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define EVERSTEP_KEEP(vector) asm volatile("" : "+w"(vector))
#else
#define EVERSTEP_KEEP(vector) asm volatile("" : "+m"(vector))
#endif

namespace everstep {
namespace {

// as many independent sums as hide a multiply-add's latency
constexpr int kChains = 24;

// Reads 64 bytes at a time, with what a product needs to reach the bandwidth: several streams.
float read_part(const char* from, std::int64_t bytes) {
    constexpr int kStreams = 4;
    const std::int64_t part = bytes / kStreams / 64 * 64;
    Vec sums[kStreams] = {zero(), zero(), zero(), zero()};
    for (std::int64_t at = 0; at < part; at += 64)
        for (int stream = 0; stream < kStreams; ++stream) {
            const char* line = from + stream * part + at;
            __builtin_prefetch(line + 1024);
            sums[stream] = sums[stream] + load(reinterpret_cast<const float*>(line));
        }
    return sum_lanes(sums[0] + sums[1] + (sums[2] + sums[3]));
}

float multiply_floats(std::int64_t rounds, float seed) {
    Native sums[kChains];
    for (Native& sum : sums) sum = seed - Native{};
    const Native factor = 0.5f - Native{};
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (Native& sum : sums) {
            Native next = fma(sum, factor, factor);
            EVERSTEP_KEEP(next);
            sum = next;
        }
    }
    Native total{};
    for (const Native& sum : sums) total += sum;
    return total[0];
}

#if defined(__AVX512BF16__)
float multiply_pairs(std::int64_t rounds, float seed) {
    __m512 sums[kChains];
    for (__m512& sum : sums) sum = _mm512_set1_ps(seed);
    const __m512bh factor = (__m512bh)_mm512_set1_epi16(0x3f00);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (__m512& sum : sums) {
            __m512 next = _mm512_dpbf16_ps(sum, factor, factor);
            EVERSTEP_KEEP(next);
            sum = next;
        }
    }
    __m512 total = _mm512_setzero_ps();
    for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
    return _mm512_cvtss_f32(total);
}
#endif

}  // namespace
}  // namespace everstep

// Reads all of it; the result only keeps the compiler from leaving that out.
EVERSTEP_API float everstep_read(const void* from, std::int64_t bytes, std::int32_t threads) {
    using namespace everstep;
    float sums[256] = {};
    const std::int64_t parts = std::min(std::max(threads, 1), 256), part = bytes / parts / 256 * 256;
    parallel(parts, threads, [&](std::int64_t task) {
        sums[task] = read_part(static_cast<const char*>(from) + task * part, part);
    });
    float total = 0.0f;
    for (float sum : sums) total += sum;
    return total;
}

// Multiply-adds in registers alone, `rounds` of 24 vectors on each thread. bf16 pairs, or floats
// where the level has no instruction for pairs. Returns the floating-point operations of a thread.
EVERSTEP_API std::int64_t everstep_multiply(std::int32_t is_bf16, std::int64_t rounds,
                                            std::int32_t threads) {
    using namespace everstep;
    volatile float sink = 0.5f;
    float sums[256] = {};
    const std::int64_t parts = std::min(std::max(threads, 1), 256);
#if defined(__AVX512BF16__)
    if (is_bf16) {
        parallel(parts, threads, [&](std::int64_t t) { sums[t] = multiply_pairs(rounds, sink); });
        for (float sum : sums) sink = sum;
        return rounds * kChains * kWidth * 4;
    }
#endif
    (void)is_bf16;
    parallel(parts, threads, [&](std::int64_t t) { sums[t] = multiply_floats(rounds, sink); });
    for (float sum : sums) sink = sum;
    return rounds * kChains * kWidth * 2;
}
