// A program for sanitizers: tokens and prompts of odd shapes over caches of exactly the right size.
#include "../operations.h"

#include <cstdio>
#include <vector>

using namespace everstep;

namespace {

unsigned seed = 1;

std::int64_t below(std::int64_t limit) {
    seed = seed * 1664525u + 1013904223u;
    return static_cast<std::int64_t>(seed >> 8) % limit;
}

template <class T>
std::vector<T> numbers(std::int64_t count) {
    std::vector<T> out(static_cast<std::size_t>(count));
    for (T& x : out) {
        const float value = static_cast<float>(below(2000)) / 1000.0f - 1.0f;
        if constexpr (sizeof(T) == 4)
            x = value;
        else
            x = to_bf16(value);
    }
    return out;
}

// some rollouts, most of which decode; their blocks follow one another
template <class T>
void run(std::int32_t is_bf16) {
    const std::int64_t kv_heads = 1 + below(4), heads = kv_heads * (1 + below(9));
    const std::int64_t dim = below(4) == 0 ? 1 + below(40) : 16 * (1 + below(8));
    const std::int64_t sizes[] = {1, 3, 16, 64}, places[] = {0, 1, 14, 15, 16, 62, 63, 64, 127, 130};
    const std::int64_t block_size = sizes[below(4)], count = 1 + below(12);
    std::vector<std::int64_t> first, start, length, table;
    std::vector<std::int32_t> blocks;
    std::int64_t tokens = 0, next = 1;
    for (std::int64_t i = 0; i < count; ++i) {
        first.push_back(tokens);
        start.push_back(places[below(10)]);
        length.push_back(below(5) == 0 ? 1 + below(20) : 1);
        table.push_back(static_cast<std::int64_t>(blocks.size()));
        tokens += length.back();
        for (std::int64_t b = ceil_div(start.back() + length.back(), block_size); b > 0; --b)
            blocks.push_back(static_cast<std::int32_t>(next++));
    }
    const auto q = numbers<T>(tokens * heads * dim);
    const auto keys = numbers<T>(next * block_size * kv_heads * dim);
    const auto values = numbers<T>(next * block_size * kv_heads * dim);
    std::vector<T> out(q.size());
    for (int threads : {1, 2})
        everstep_attention(is_bf16, q.data(), keys.data(), values.data(), out.data(), heads, kv_heads,
                           dim, heads * dim, kv_heads * dim, count, first.data(), start.data(),
                           length.data(), table.data(), blocks.data(), block_size, 0.1f, threads);
}

}  // namespace

int main() {
    for (int i = 0; i < 80; ++i) {
        run<float>(0);
        run<bf16>(1);
    }
    std::puts("attention: done");
    return 0;
}
