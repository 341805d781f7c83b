// The AMX unit: eight tiles of 16 rows of 64 bytes. tests/emulation runs these very instructions on
// processors without it.
//
//   tiles 0-3  sums          row half · 2 + column tile
//   tiles 4-5  x             rows 0-15, rows 16-31
//   tiles 6-7  weight        column tile 0, column tile 1
#pragma once

#include "common.h"

#if defined(__AMX_BF16__)
#define EVERSTEP_HAS_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

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

}  // namespace everstep::amx
#endif
