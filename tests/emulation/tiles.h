// AMX for processors without: the permission of the process and the eight tiles of each thread.
//
// kernels/cpu/amx.h has its instructions in assembly. At one that it does not know, a processor raises
// SIGILL; the handler here reads it, does what Intel's manual says (volume 2, "Operation"), and goes
// on behind it. So the machine code itself is tested, its operands included. What hardware or Linux
// would refuse ends the process with a line that says why: tiles before the permission was asked for,
// on a thread that has not configured them, or of shapes that do not fit.
//
// Put before every source of a build (`-include`), after avx512.h where that is needed.
#pragma once

#if !defined(__linux__) || !defined(__x86_64__)
#error "tiles are emulated on x86-64 Linux alone"
#endif

#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef __AMX_TILE__
#undef __AMX_BF16__
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace emulated {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

// of one thread; palette 0: not configured
struct Tiles {
    std::uint8_t palette, start_row;
    std::uint8_t rows[kTiles];
    std::uint16_t bytes[kTiles];
    alignas(64) char data[kTiles][kMaxRows][kMaxBytes];
};
inline thread_local Tiles tiles;
inline std::atomic<bool> is_permitted{false};
inline struct sigaction handler_before;

[[noreturn]] inline void refuse(const char* why) {
    constexpr char kWho[] = "emulated AMX: ";
    (void)!write(2, kWho, sizeof kWho - 1);
    (void)!write(2, why, std::strlen(why));
    (void)!write(2, "\n", 1);
    std::abort();
}

// -- one instruction, as encoded: C4, then R̅ X̅ B̅ and the map, then W v̅v̅v̅v̅ L pp, opcode, ModRM

struct Instruction {
    const std::uint8_t* at;
    const greg_t* registers;

    bool is_tile() const {
        return at[0] == 0xC4 && (at[1] & 0x1f) == 2 && (at[2] & 0x84) == 0 &&
               (at[3] == 0x49 || at[3] == 0x4B || at[3] == 0x5C);
    }
    int prefix() const { return at[2] & 3; }  // none, 66, F3, F2
    int opcode() const { return at[3]; }
    bool is_memory() const { return at[4] >> 6 != 3; }
    int reg() const { return (at[4] >> 3 & 7) + (at[1] & 0x80 ? 0 : 8); }
    int rm() const { return (at[4] & 7) + (at[1] & 0x20 ? 0 : 8); }
    int vvvv() const { return ~at[2] >> 3 & 15; }

    char* value_of(int number) const {
        static constexpr int kPlace[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                         REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                         REG_R12, REG_R13, REG_R14, REG_R15};
        return reinterpret_cast<char*>(registers[kPlace[number]]);
    }
};

struct Address {
    char* base;
    std::int64_t stride;
    int length;  // of the whole instruction
};

inline Address address_of(const Instruction& in) {
    const int mode = in.at[4] >> 6, low = in.at[4] & 7;
    const bool has_sib = low == 4;
    int length = has_sib ? 6 : 5, base = in.rm();
    std::int64_t stride = 0;
    if (has_sib) {
        base = (in.at[5] & 7) + (in.at[1] & 0x20 ? 0 : 8);
        const int index = (in.at[5] >> 3 & 7) + (in.at[1] & 0x40 ? 0 : 8);
        if (index != 4) stride = reinterpret_cast<std::int64_t>(in.value_of(index)) << (in.at[5] >> 6);
    }
    const bool has_no_base = mode == 0 && (base & 7) == 5;
    std::int64_t displacement = 0;
    if (mode == 1) {
        displacement = static_cast<std::int8_t>(in.at[length]);
        length += 1;
    } else if (mode == 2 || has_no_base) {
        std::int32_t wide;
        std::memcpy(&wide, in.at + length, sizeof wide);
        displacement = wide;
        length += 4;
    }
    const char* from = !has_no_base ? in.value_of(base)
                       : has_sib    ? nullptr
                                    : reinterpret_cast<const char*>(in.at + length);
    return {const_cast<char*>(from) + displacement, stride, length};
}

// -- what each does

inline void configure(const char* from) {
    std::uint8_t given[64];
    std::memcpy(given, from, sizeof given);
    tiles = Tiles{};
    if (given[0] == 0) return;
    if (given[0] != 1) refuse("ldtilecfg: there is no such palette");
    tiles.palette = 1;
    tiles.start_row = given[1];
    for (int i = 2; i < 64; ++i) {
        const bool is_reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
        if (is_reserved && given[i] != 0) refuse("ldtilecfg: a reserved byte is not zero");
    }
    for (int tile = 0; tile < kTiles; ++tile) {
        std::memcpy(&tiles.bytes[tile], given + 16 + 2 * tile, 2);
        tiles.rows[tile] = given[48 + tile];
        if (tiles.bytes[tile] > kMaxBytes || tiles.rows[tile] > kMaxRows)
            refuse("ldtilecfg: a tile is too large");
        if ((tiles.bytes[tile] == 0) != (tiles.rows[tile] == 0))
            refuse("ldtilecfg: a tile has rows or columns only");
    }
}

inline void check(int tile) {
    if (tiles.palette == 0) refuse("this thread has not configured its tiles");
    if (tile >= kTiles || tiles.rows[tile] == 0) refuse("there is no such tile");
}

inline void load(int tile, const Address& from) {
    std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int row = tiles.start_row; row < tiles.rows[tile]; ++row)
        std::memcpy(tiles.data[tile][row], from.base + row * from.stride, tiles.bytes[tile]);
    tiles.start_row = 0;
}

inline void store(int tile, const Address& to) {
    for (int row = tiles.start_row; row < tiles.rows[tile]; ++row)
        std::memcpy(to.base + row * to.stride, tiles.data[tile][row], tiles.bytes[tile]);
    tiles.start_row = 0;
}

// One row of TDPBF16PS. The even and the odd elements of the pairs have a sum each, from zero, then
// these are added, then that to the tile.
__attribute__((noinline)) inline void multiply_row(float* sums, const char* x, const char (*w)[64],
                                                   int pairs) {
    __m256 even[2] = {}, odd[2] = {};
    const __m256i upper = _mm256_set1_epi32(-0x10000);
    for (int k = 0; k < pairs; ++k) {
        std::int32_t pair;
        std::memcpy(&pair, x + 4 * k, sizeof pair);
        const __m256i both = _mm256_set1_epi32(pair);
        const __m256 first = (__m256)_mm256_slli_epi32(both, 16), second = (__m256)_mm256_and_si256(both, upper);
        for (int part = 0; part < 2; ++part) {
            const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[k]) + part);
            even[part] = _mm256_fmadd_ps(first, (__m256)_mm256_slli_epi32(y, 16), even[part]);
            odd[part] = _mm256_fmadd_ps(second, (__m256)_mm256_and_si256(y, upper), odd[part]);
        }
    }
    for (int part = 0; part < 2; ++part) {
        const __m256 before = _mm256_loadu_ps(sums + 8 * part);
        _mm256_storeu_ps(sums + 8 * part, _mm256_add_ps(before, _mm256_add_ps(even[part], odd[part])));
    }
}

inline void multiply(int sum, int x, int w) {
    for (const int tile : {sum, x, w}) check(tile);
    if (sum == x || x == w || w == sum) refuse("tdpbf16ps: a tile is named twice");
    if (tiles.bytes[x] % 4 || tiles.bytes[w] % 4 || tiles.bytes[sum] % 4)
        refuse("tdpbf16ps: columns are no whole words");
    if (tiles.bytes[x] / 4 != tiles.rows[w] || tiles.rows[sum] != tiles.rows[x] ||
        tiles.bytes[sum] != tiles.bytes[w])
        refuse("tdpbf16ps: the shapes do not fit");
    // DAZ, FTZ, to nearest: whatever the thread has set
    const unsigned before = _mm_getcsr(), flushed = 0x9fc0;
    asm volatile("vldmxcsr %0" ::"m"(flushed) : "memory");
    for (int row = 0; row < tiles.rows[sum]; ++row)
        multiply_row(reinterpret_cast<float*>(tiles.data[sum][row]), tiles.data[x][row], tiles.data[w],
                     tiles.bytes[x] / 4);
    asm volatile("vldmxcsr %0" ::"m"(before) : "memory");
    // rows and columns beyond the tile are zeros
    for (int row = 0; row < kMaxRows; ++row) {
        const int used = row < tiles.rows[sum] ? tiles.bytes[sum] : 0;
        std::memset(tiles.data[sum][row] + used, 0, static_cast<std::size_t>(kMaxBytes - used));
    }
}

// Does the instruction; returns its length.
inline int run(const Instruction& in) {
    if (!is_permitted) refuse("the process has not asked for its tiles");
    const int kind = in.opcode() << 2 | in.prefix();
    if (in.is_memory()) {
        const Address address = address_of(in);
        if (kind == (0x49 << 2 | 0)) {
            configure(address.base);
            return address.length;
        }
        check(in.reg());
        if (kind == (0x4B << 2 | 3))
            load(in.reg(), address);
        else if (kind == (0x4B << 2 | 2))
            store(in.reg(), address);
        else
            refuse("this instruction is not known here");
        return address.length;
    }
    if (kind == (0x49 << 2 | 0)) {
        tiles = Tiles{};
    } else if (kind == (0x49 << 2 | 3)) {
        check(in.reg());
        std::memset(tiles.data[in.reg()], 0, sizeof tiles.data[in.reg()]);
    } else if (kind == (0x5C << 2 | 2)) {
        multiply(in.reg(), in.rm(), in.vvvv());
    } else {
        refuse("this instruction is not known here");
    }
    return 5;
}

// -- the system's part

inline void handle(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const Instruction in{reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]), registers};
    if (in.is_tile())
        registers[REG_RIP] += run(in);
    else
        sigaction(SIGILL, &handler_before, nullptr);  // and again, for whoever it concerns
}

// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), once per process
inline long system_call(long number, int code, int feature) {
    if (number != SYS_arch_prctl || code != 0x1023 || feature != 18) {
        errno = EINVAL;
        return -1;
    }
    if (!is_permitted.exchange(true)) {
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGILL, &action, &handler_before);
    }
    return 0;
}

}  // namespace emulated

#define syscall emulated::system_call
