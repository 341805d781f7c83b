// A program for sanitizers: packs and multiplies odd shapes in memory of exactly the right size.
#include "../gemm.h"

#include <cstdio>
#include <vector>

using namespace everstep;

extern "C" void everstep_pack(std::int32_t, const void*, std::int64_t, std::int64_t, std::int64_t,
                              void*, std::int32_t, std::int32_t, std::int32_t);
extern "C" void everstep_linear(const Packed*, const void*, std::int64_t, std::int64_t, void*,
                                std::int64_t, std::int32_t, std::int32_t);
extern "C" int everstep_start();

namespace {

// heap memory of its own, so that one byte beyond it is seen
template <class T>
std::vector<T> numbers(std::int64_t count, unsigned seed) {
    std::vector<T> out(static_cast<std::size_t>(count));
    for (T& x : out) {
        seed = seed * 1664525u + 1013904223u;
        const float value = static_cast<float>(seed >> 8) / 16777216.0f - 0.5f;
        if constexpr (sizeof(T) == 4)
            x = value;
        else if constexpr (sizeof(T) == 2)
            x = to_bf16(value);
        else
            x = static_cast<T>((seed >> 9) % 0x7f);
    }
    return out;
}

template <class T, class X>
void run(Format format, std::int64_t n, std::int64_t k, bool is_pair) {
    const int parts = is_pair ? 2 : 1;
    Packed packed{nullptr, nullptr, nullptr, n, k, format, is_pair};
    std::vector<T> data(static_cast<std::size_t>(packed.num_tiles() * packed.tile_bytes()) / sizeof(T));
    for (int part = 0; part < parts; ++part) {
        const auto w = numbers<T>(n * k, 7u + static_cast<unsigned>(part));
        everstep_pack(format, w.data(), n, k, k, data.data(), parts, part, 2);
    }
    const auto scale = numbers<float>(packed.num_tiles() * packed.scales_per_tile(), 3);
    const auto bias = numbers<float>(packed.num_tiles() * kLanes, 5);
    packed.data = data.data();
    packed.scale = scale.empty() ? nullptr : scale.data();
    packed.bias = bias.data();
    for (std::int64_t m : {1, 2, 7, 33, 70}) {
        const auto x = numbers<X>(m * k, 11);
        std::vector<X> y(static_cast<std::size_t>(m * n));
        std::vector<float> wide(y.size());
        for (int threads : {1, 2, 3}) {
            everstep_linear(&packed, x.data(), m, k, y.data(), n, kRounded, threads);
            everstep_linear(&packed, x.data(), m, k, wide.data(), n, kFloat, threads);
        }
    }
}

}  // namespace

int main() {
    if (everstep_start()) return 1;
    for (std::int64_t n : {1, 17, 100, 257})
        for (std::int64_t k : {1, 31, 129, 320})
            for (bool is_pair : {false, true}) {
                run<float, float>(kFloat32, n, k, is_pair);
                run<bf16, bf16>(kBf16, n, k, is_pair);
                run<std::uint8_t, bf16>(kFp8Block, n, k, is_pair);
                run<std::uint8_t, bf16>(kFp8Channel, n, k, is_pair);
            }
    std::puts("gemm: done");
    return 0;
}
