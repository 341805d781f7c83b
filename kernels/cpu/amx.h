// The AMX unit: eight tiles of 16 rows of 64 bytes. With EVERSTEP_EMULATE_AMX the same functions
// in plain C++, so that the tile code is tested on machines without it.
//
//   tiles 0-3  sums          row half · 2 + column tile
//   tiles 4-5  x             rows 0-15, rows 16-31
//   tiles 6-7  weight        column tile 0, column tile 1
#pragma once

#include "common.h"

#if defined(__AMX_BF16__) || defined(EVERSTEP_EMULATE_AMX)
#define EVERSTEP_HAS_AMX 1

#if !defined(EVERSTEP_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace everstep::amx {

struct alignas(64) Config {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// For blocks of 1 to 32 rows.
inline Config config_of(int rows) {
    const int halves[2] = {rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 1};
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes[tile] = 64;
        config.rows[tile] =
            static_cast<std::uint8_t>(tile < 4 ? halves[tile / 2] : tile < 6 ? halves[tile - 4] : 16);
    }
    return config;
}

#if defined(EVERSTEP_EMULATE_AMX)

struct Unit {
    Config config;
    float sums[4][16][16];
    bf16 inputs[4][16][32];
};
inline thread_local Unit unit;

inline bool request() { return true; }
inline void configure(const Config& config) {
    std::memset(static_cast<void*>(&unit), 0, sizeof unit);
    unit.config = config;
}
inline void release() {}
template <int kTile>
void clear() {
    std::memset(unit.sums[kTile], 0, sizeof unit.sums[kTile]);
}
template <int kTile>
void load(const void* from, std::int64_t stride_bytes) {
    for (int row = 0; row < unit.config.rows[kTile]; ++row)
        std::memcpy(unit.inputs[kTile - 4][row],
                    static_cast<const char*>(from) + row * stride_bytes, 64);
}
template <int kSum, int kX, int kW>
void multiply() {
    for (int row = 0; row < unit.config.rows[kX]; ++row)
        for (int pair = 0; pair < 16; ++pair)
            for (int n = 0; n < 16; ++n)
                for (int j = 0; j < 2; ++j)
                    unit.sums[kSum][row][n] =
                        fma1(to_float(unit.inputs[kX - 4][row][2 * pair + j]),
                             to_float(unit.inputs[kW - 4][pair][2 * n + j]),
                             unit.sums[kSum][row][n]);
}
template <int kTile>
void store(float* to, std::int64_t stride_bytes) {
    for (int row = 0; row < unit.config.rows[kTile]; ++row)
        std::memcpy(reinterpret_cast<char*>(to) + row * stride_bytes, unit.sums[kTile][row], 64);
}

#else

// Linux hands out the tiles' memory only to a process that asked (arch_prctl 0x1023, feature 18).
inline bool request() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
// All in assembly. `configure` with the whole struct as operand: g++ 12's intrinsic lets the compiler
// drop the stores that fill it. The rest because the intrinsics are macros that paste their argument
// into a register's name, and because they do not say that they touch memory.
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
EVERSTEP_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
EVERSTEP_INLINE void load(const void* from, std::int64_t stride_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride_bytes)
                 : "memory");
}
template <int kSum, int kX, int kW>
EVERSTEP_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kW));
}
template <int kTile>
EVERSTEP_INLINE void store(float* to, std::int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride_bytes)
                 : "memory");
}

#endif

}  // namespace everstep::amx
#endif
