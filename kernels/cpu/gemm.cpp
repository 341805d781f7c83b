// Packed linear layers, at every level.
//
// One loop over K for every number of rows. A block of up to kMaxRows rows × kMaxTiles column
// tiles keeps its sums in registers from the first k to the last; blocks differ in shape, never in
// what is done to one sum:
//
//   float32                 sum = fma(x[k], w[k], sum)                      k ascending
//   bf16, avx2 + portable   the same, on the bf16 values as float32
//   bf16, avx512            sum = vdpbf16ps(sum, x[k..k+1], w[k..k+1])      pairs ascending
//   bf16, amx               tdpbf16ps over 32 k at a time                   blocks ascending
//
// So a row's bits do not depend on the rows beside it. Threads share out column tiles, and rows
// where there are many; never K.
#include "gemm.h"

#include <type_traits>

#include "amx.h"

namespace everstep {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxSums = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kMaxSums = 6;  // of 16 registers, two each
#else
constexpr int kMaxSums = 4;  // NEON: of 32 registers, four each
#endif
constexpr int kDirectSums = 16;  // where the tables of FP8 codes take registers too
constexpr int kMaxRows = 32;
constexpr int kMaxTiles = 4;
constexpr int kAheadBytes = 1024;

// What a block's sums are left in, before bias, SwiGLU and rounding.
struct Sums {
    alignas(64) float at[kMaxRows][kMaxTiles * kLanes];
};

// -- the three loops: how a step of K is loaded and multiplied

// steps of two k that share a scale: 128 columns
constexpr std::int64_t kScaleSteps = 64;

// What turns codes into numbers, made anew for each kScaleSteps; here: nothing.
struct NoDecoder {
    EVERSTEP_INLINE void start(const float*, std::int64_t) {}
};

struct Float32 {
    using X = float;
    using XPart = Vec;
    using WPart = Vec;
    static constexpr int kStep = 1;
    static constexpr int kStepBytes = kLanes * 4;
    static constexpr int kSums = kMaxSums;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        return load(reinterpret_cast<const float*>(w));
    }
    static EVERSTEP_INLINE XPart row(const X* x) { return set(*x); }
    static EVERSTEP_INLINE XPart last(const X* x) { return set(*x); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, WPart w) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)

struct PairsDot {
    using X = bf16;
    using XPart = __m512i;
    using WPart = __m512i;
    static constexpr int kStep = 2;
    static constexpr int kStepBytes = kLanes * 2 * 2;
    static constexpr int kSums = kMaxSums;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        return _mm512_loadu_si512(w);
    }
    static EVERSTEP_INLINE XPart row(const X* x) {
        std::int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    // an odd K: the pair's second half is not read
    static EVERSTEP_INLINE XPart last(const X* x) { return _mm512_set1_epi32(*x); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, WPart w) {
        return Vec{{(Native)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)x, (__m512bh)w)}};
    }
};
using Bf16 = PairsDot;

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
    EVERSTEP_INLINE __m512i pairs(const char* codes) const {
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
    EVERSTEP_INLINE __m512i pairs(const char* codes) const {
        const auto* from = reinterpret_cast<const __m128i*>(codes);
        return (__m512i)_mm512_cvtne2ps_pbh(decode(_mm_loadu_si128(from + 1), factor[1]),
                                            decode(_mm_loadu_si128(from), factor[0]));
    }
};

template <class D>
struct Fp8Dot : PairsDot {
    static constexpr int kStepBytes = kLanes * 2;
    static constexpr int kSums = kDirectSums;
    using Decoder = D;

    static EVERSTEP_INLINE WPart weight(const D& decoder, const char* w) { return decoder.pairs(w); }
};

#else

struct PairsExpanded {
    // rows were expanded to float32, and padded to an even length
    using X = float;
    struct Pair {
        Vec first, second;
    };
    using XPart = Pair;
    using WPart = Pair;
    static constexpr int kStep = 2;
    static constexpr int kStepBytes = kLanes * 2 * 2;
    static constexpr int kSums = kMaxSums;
    using Decoder = NoDecoder;

    static EVERSTEP_INLINE WPart weight(const Decoder&, const char* w) {
        const Vec pairs = load(reinterpret_cast<const float*>(w));
        return {each([&](int i) { return as_float(as_int(pairs.part[i]) << 16); }),
                each([&](int i) { return as_float(as_int(pairs.part[i]) & ~0xffff); })};
    }
    static EVERSTEP_INLINE XPart row(const X* x) { return {set(x[0]), set(x[1])}; }
    static EVERSTEP_INLINE XPart last(const X* x) { return row(x); }
    static EVERSTEP_INLINE Vec multiply(Vec sum, XPart x, WPart w) {
        return fma(x.second, w.second, fma(x.first, w.first, sum));
    }
};
using Bf16 = PairsExpanded;

// Every second of 32 e4m3 codes times their scales, which hold a factor of 256 (see Packed).
EVERSTEP_INLINE Vec decode(const char* codes, Vec scale) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const auto code = static_cast<std::uint32_t>(static_cast<std::uint8_t>(codes[2 * i]));
        const std::uint32_t bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
        std::memcpy(&lanes[i], &bits, sizeof bits);
    }
    // 2^112: from float32's exponent bias, less the scale's 2^8; exact
    return load(lanes) * set(0x1p112f) * scale;
}

#endif

// The sums of kRows rows × kTiles column tiles, over all of K.
template <class F, int kRows, int kTiles>
void block(const typename F::X* x, std::int64_t x_stride, const char* w, std::int64_t tile_bytes,
           const float* scale, std::int64_t scale_stride, std::int64_t k, Sums& out) {
    Vec sums[kRows][kTiles];
    for (auto& row : sums)
        for (Vec& sum : row) sum = zero();
    const std::int64_t steps = k / F::kStep;
    const std::int64_t rounds_of_own = steps - kAheadBytes / F::kStepBytes;
    typename F::WPart parts[kTiles];
    typename F::Decoder decoders[kTiles];
    for (std::int64_t step = 0; step < steps;) {
        const std::int64_t end = std::is_same_v<typename F::Decoder, NoDecoder>
                                     ? steps
                                     : std::min(steps, step + kScaleSteps);
#pragma GCC unroll 8
        for (int tile = 0; tile < kTiles; ++tile)
            decoders[tile].start(scale + tile * scale_stride, step / kScaleSteps);
        for (; step < end; ++step) {
            // ahead in this tile, then in the tile that the next block of columns begins with
            const std::int64_t jump = step < rounds_of_own ? 0 : (kTiles - 1) * tile_bytes;
#pragma GCC unroll 8
            for (int tile = 0; tile < kTiles; ++tile) {
                const char* from = w + tile * tile_bytes + step * F::kStepBytes;
                __builtin_prefetch(from + kAheadBytes + jump);
                parts[tile] = F::weight(decoders[tile], from);
            }
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const typename F::XPart part = F::row(x + row * x_stride + step * F::kStep);
#pragma GCC unroll 8
                for (int tile = 0; tile < kTiles; ++tile)
                    sums[row][tile] = F::multiply(sums[row][tile], part, parts[tile]);
            }
        }
    }
    if (k % F::kStep != 0) {
#pragma GCC unroll 8
        for (int tile = 0; tile < kTiles; ++tile) {
            decoders[tile].start(scale + tile * scale_stride, steps / kScaleSteps);
            parts[tile] =
                F::weight(decoders[tile], w + tile * tile_bytes + steps * F::kStepBytes);
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const typename F::XPart part = F::last(x + row * x_stride + steps * F::kStep);
#pragma GCC unroll 8
            for (int tile = 0; tile < kTiles; ++tile)
                sums[row][tile] = F::multiply(sums[row][tile], part, parts[tile]);
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int tile = 0; tile < kTiles; ++tile)
            store(&out.at[row][tile * kLanes], sums[row][tile]);
}

template <class F>
using Block = void (*)(const typename F::X*, std::int64_t, const char*, std::int64_t, const float*,
                       std::int64_t, std::int64_t, Sums&);

constexpr int max_rows(int tiles, int sums = kMaxSums) {
    return std::min(8, std::max(1, sums / tiles));
}

template <class F, int kTiles, int kRows = max_rows(kTiles, F::kSums)>
Block<F> pick_rows(int rows) {
    if constexpr (kRows > 1)
        if (rows < kRows) return pick_rows<F, kTiles, kRows - 1>(rows);
    return block<F, kRows, kTiles>;
}

template <class F>
Block<F> pick(int rows, int tiles) {
    if (tiles == 1) return pick_rows<F, 1>(rows);
    if constexpr (F::kSums <= kDirectSums) return pick_rows<F, 2>(rows);
    switch (tiles) {
        case 2: return pick_rows<F, 2>(rows);
        case 3: return pick_rows<F, 3>(rows);
        default: return pick_rows<F, 4>(rows);
    }
}

// -- what becomes of the sums

struct Sink {
    void* y;
    std::int64_t stride;
    Output output;

    EVERSTEP_INLINE void put(const Packed& w, std::int64_t row, std::int64_t column, Vec value) const {
        const auto count = static_cast<int>(std::min<std::int64_t>(kLanes, w.n - column));
        const std::int64_t at = row * stride + column;
        if (w.format == kFloat32 || output == kFloat)
            write(static_cast<float*>(y) + at, value, count);
        else
            write(static_cast<bf16*>(y) + at, value, count);
    }

    void finish(const Packed& w, std::int64_t row, int rows, std::int64_t tile, int tiles,
                const Sums& sums) const {
        for (int r = 0; r < rows; ++r) {
            for (int t = 0; t < tiles; t += w.is_pair ? 2 : 1) {
                Vec value = biased(w, tile + t, load(&sums.at[r][t * kLanes]));
                if (w.is_pair) {
                    const Vec up = biased(w, tile + t + 1, load(&sums.at[r][(t + 1) * kLanes]));
                    value = w.format == kFloat32 ? value * sigmoid(value) * up : swiglu(value, up);
                }
                put(w, row + r, (tile + t) / (w.is_pair ? 2 : 1) * kLanes, value);
            }
        }
    }

  private:
    template <class T>
    static EVERSTEP_INLINE void write(T* to, Vec value, int count) {
        if (count == kLanes)
            store(to, value);
        else
            store_first(to, value, count);
    }

    static EVERSTEP_INLINE Vec biased(const Packed& w, std::int64_t tile, Vec sums) {
        return w.bias ? sums + load(w.bias + tile * kLanes) : sums;
    }

    // T(T(silu(T(gate))) · T(up)); `put` rounds the last
    static EVERSTEP_INLINE Vec swiglu(Vec gate, Vec up) {
        gate = round_bf16(gate);
        return round_bf16(gate * sigmoid(gate)) * round_bf16(up);
    }
};

// -- FP8: a few tiles of bf16 at a time

struct Panel {};

// `tiles` tiles of codes as bf16 in this thread's memory: what packing the expanded weight gives.
const char* expand(const Packed& w, std::int64_t tile, int tiles) {
    const std::int64_t pairs = w.padded_k() / 2;
    bf16* out = scratch<bf16, Panel>(tiles * pairs * 2 * kLanes);
    for (int t = 0; t < tiles; ++t) {
        const char* codes = static_cast<const char*>(w.data) + (tile + t) * w.tile_bytes();
        const float* scale = w.scale + (tile + t) * w.scales_per_tile();
        const std::int64_t used = ceil_div(w.k, 2);
#if defined(__AVX512BF16__)
        BlockDecoder blocks;
        ChannelDecoder channels;
        if (w.format == kFp8Channel) channels.start(scale, 0);
#endif
        for (std::int64_t pair = 0; pair < pairs; ++pair) {
            bf16* to = out + (t * pairs + pair) * 2 * kLanes;
            if (pair >= used) {
                std::memset(to, 0, 2 * kLanes * sizeof(bf16));
                continue;
            }
            const char* from = codes + pair * 2 * kLanes;
#if defined(__AVX512BF16__)
            if (w.format == kFp8Block) {
                if (pair % kScaleSteps == 0) blocks.start(scale, pair / kScaleSteps);
                _mm512_storeu_si512(to, blocks.pairs(from));
            } else {
                _mm512_storeu_si512(to, channels.pairs(from));
            }
#else
            const Vec factor = w.format == kFp8Block ? set(scale[pair / kScaleSteps]) : load(scale);
            const Vec first = round_bf16(decode(from, factor));
            const Vec second = round_bf16(decode(from + 1, factor));
            const Vec both = each([&](int i) {
                const NativeInt low = as_int(first.part[i]) >> 16 & 0xffff;
                return as_float(low | as_int(second.part[i]));
            });
            std::memcpy(to, &both, sizeof both);
#endif
        }
    }
    return reinterpret_cast<const char*>(out);
}

// -- one thread's share

struct Share {
    std::int64_t first_row, end_row, first_tile, end_tile;
};

// Rows of at most `most` each, as equal as can be.
int next_rows(std::int64_t left, int most) {
    return static_cast<int>(ceil_div(left, ceil_div(left, most)));
}

int tiles_at_once(const Packed& w, std::int64_t rows) {
    if (kMaxSums < 12) return w.is_pair ? 2 : 1;
    return w.is_pair || rows <= max_rows(4) ? 4 : 3;
}

constexpr int kDirectTiles = 2;

// One block of rows: every code is decoded once, on its way into the product.
bool is_decoded_in_registers(std::int64_t rows) {
#if defined(__AVX512BF16__)
    return rows <= max_rows(kDirectTiles, kDirectSums);
#else
    return rows < 0;
#endif
}

template <class F>
void run(const Packed& w, const typename F::X* x, std::int64_t x_stride, const Share& share,
         const Sink& sink) {
    const std::int64_t rows = share.end_row - share.first_row;
    const bool is_direct = w.scale && is_decoded_in_registers(rows);
    const int at_once = is_direct ? kDirectTiles : tiles_at_once(w, rows);
    const std::int64_t tile_bytes = w.tile_bytes(), scales = w.scales_per_tile();
    Sums sums;
    for (std::int64_t tile = share.first_tile; tile < share.end_tile; tile += at_once) {
        const auto tiles = static_cast<int>(std::min<std::int64_t>(at_once, share.end_tile - tile));
        const int most = max_rows(tiles, is_direct ? kDirectSums : kMaxSums);
        const char* data = static_cast<const char*>(w.data) + tile * tile_bytes;
        const float* scale = w.scale + (w.scale ? tile * scales : 0);
        const bool is_expanded = w.scale && !is_direct;
        if (is_expanded) data = expand(w, tile, tiles);
        for (std::int64_t row = share.first_row; row < share.end_row;) {
            const int count = next_rows(share.end_row - row, most);
            const auto* from = x + row * x_stride;
            if constexpr (sizeof(typename F::X) == 2) {
                if (is_expanded)
                    pick<Bf16>(count, tiles)(reinterpret_cast<const Bf16::X*>(from), x_stride, data,
                                             w.padded_k() * kLanes * 2, nullptr, 0, w.k, sums);
                else
                    pick<F>(count, tiles)(from, x_stride, data, tile_bytes, scale, scales, w.k, sums);
            } else {
                pick<F>(count, tiles)(from, x_stride, data,
                                      is_expanded ? w.padded_k() * kLanes * 2 : tile_bytes, nullptr,
                                      0, w.k, sums);
            }
            sink.finish(w, row, count, tile, tiles, sums);
            row += count;
        }
    }
}

#if defined(EVERSTEP_HAS_AMX)

// Blocks of 32 rows × 2 column tiles, the last one with fewer rows; x is padded to whole k blocks.
void run_amx(const Packed& w, const bf16* x, std::int64_t x_stride, const Share& share,
             const Sink& sink) {
    constexpr int kRows = 32, kTiles = 2, kHalf = 16;
    const std::int64_t k_blocks = w.padded_k() / 32, stride = x_stride * 2;
    const std::int64_t out_stride = kMaxTiles * kLanes * 4;
    Sums sums;
    int configured = 0;
    for (std::int64_t tile = share.first_tile; tile < share.end_tile; tile += kTiles) {
        const auto tiles = static_cast<int>(std::min<std::int64_t>(kTiles, share.end_tile - tile));
        const std::int64_t tile_bytes = w.padded_k() * kLanes * 2;
        const char* data = w.scale ? expand(w, tile, tiles)
                                   : static_cast<const char*>(w.data) + tile * tile_bytes;
        for (std::int64_t row = share.first_row; row < share.end_row; row += kRows) {
            const auto rows = static_cast<int>(std::min<std::int64_t>(kRows, share.end_row - row));
            if (rows != configured) amx::configure(amx::config_of(rows));
            configured = rows;
            amx::clear<0>();
            amx::clear<1>();
            amx::clear<2>();
            amx::clear<3>();
            const bf16* upper = x + row * x_stride;
            const bf16* lower = upper + kHalf * x_stride;
            for (std::int64_t kb = 0; kb < k_blocks; ++kb) {
                const char* from = data + kb * 1024;
                for (int line = 0; line < 1024; line += 64) {
                    __builtin_prefetch(from + 4096 + line);
                    if (tiles > 1) __builtin_prefetch(from + tile_bytes + 4096 + line);
                }
                amx::load<6>(from, 64);
                amx::load<4>(upper + kb * 32, stride);
                amx::multiply<0, 4, 6>();
                if (tiles > 1) {
                    amx::load<7>(from + tile_bytes, 64);
                    amx::multiply<1, 4, 7>();
                }
                if (rows > kHalf) {
                    amx::load<5>(lower + kb * 32, stride);
                    amx::multiply<2, 5, 6>();
                    if (tiles > 1) amx::multiply<3, 5, 7>();
                }
            }
            amx::store<0>(&sums.at[0][0], out_stride);
            amx::store<1>(&sums.at[0][kLanes], out_stride);
            if (rows > kHalf) {
                amx::store<2>(&sums.at[kHalf][0], out_stride);
                amx::store<3>(&sums.at[kHalf][kLanes], out_stride);
            }
            sink.finish(w, row, rows, tile, tiles, sums);
        }
    }
    amx::release();
}

#endif

// -- rows as the level wants them

struct Rows {};

#if defined(EVERSTEP_HAS_AMX)
// whole k blocks: copied only where K is no multiple of 32
const bf16* prepare(const Packed& w, const bf16* x, std::int64_t m, std::int64_t& stride) {
    if (w.k % 32 == 0) return x;
    const std::int64_t width = w.padded_k();
    bf16* out = scratch<bf16, Rows>(m * width);
    for (std::int64_t row = 0; row < m; ++row) {
        std::memcpy(out + row * width, x + row * stride, static_cast<std::size_t>(w.k) * 2);
        std::memset(out + row * width + w.k, 0, static_cast<std::size_t>(width - w.k) * 2);
    }
    stride = width;
    return out;
}
#elif defined(__AVX512BF16__)
const bf16* prepare(const Packed&, const bf16* x, std::int64_t, std::int64_t&) { return x; }
#else
const float* prepare(const Packed& w, const bf16* x, std::int64_t m, std::int64_t& stride) {
    const std::int64_t width = round_up(w.k, 2);
    float* out = scratch<float, Rows>(m * width);
    for (std::int64_t row = 0; row < m; ++row) {
        for (std::int64_t k = 0; k < w.k; ++k) out[row * width + k] = to_float(x[row * stride + k]);
        if (width != w.k) out[row * width + w.k] = 0.0f;
    }
    stride = width;
    return out;
}
#endif

template <class Function>
void share_out(const Packed& w, std::int64_t m, int threads, const Function& function) {
    // below this a second thread costs more than it gives
    constexpr std::int64_t kWorthAThread = 64 * 1024;
    const std::int64_t unit = w.is_pair ? 2 : 1, units = w.num_tiles() / unit;
    const std::int64_t work = w.num_tiles() * w.padded_k() * kLanes * ceil_div(m, 4);
    const std::int64_t parts = std::min<std::int64_t>(threads, std::max<std::int64_t>(1, work / kWorthAThread));
    const std::int64_t columns = std::min(parts, units);
    // rows are cut only where the columns do not feed every thread
    const std::int64_t bands =
        std::max<std::int64_t>(1, std::min(parts / columns, m / kMaxRows));
    parallel(columns * bands, threads, [&](std::int64_t task) {
        const std::int64_t column = task % columns, band = task / columns;
        function(Share{m * band / bands, m * (band + 1) / bands, units * column / columns * unit,
                       units * (column + 1) / columns * unit});
    });
}

}  // namespace

void linear(const Packed& w, const void* x, std::int64_t m, std::int64_t x_stride, void* y,
            std::int64_t y_stride, Output output, int threads) {
    if (m <= 0 || w.n <= 0) return;
    const Sink sink{y, y_stride, output};
    if (w.format == kFloat32) {
        share_out(w, m, threads, [&](const Share& share) {
            run<Float32>(w, static_cast<const float*>(x), x_stride, share, sink);
        });
        return;
    }
    std::int64_t stride = x_stride;
    const auto* rows = prepare(w, static_cast<const bf16*>(x), m, stride);
    share_out(w, m, threads, [&](const Share& share) {
#if defined(EVERSTEP_HAS_AMX)
        run_amx(w, rows, stride, share, sink);
#elif defined(__AVX512BF16__)
        if (w.format == kBf16)
            run<Bf16>(w, rows, stride, share, sink);
        else if (w.format == kFp8Block)
            run<Fp8Dot<BlockDecoder>>(w, rows, stride, share, sink);
        else
            run<Fp8Dot<ChannelDecoder>>(w, rows, stride, share, sink);
#else
        run<Bf16>(w, rows, stride, share, sink);
#endif
    });
}

// -- packing

namespace {

// Tiles offset, offset + step, ... of a packed weight, from rows of T.
template <class T, class Place>
void pack(const T* w, std::int64_t n, std::int64_t k, std::int64_t stride, std::int64_t padded_k,
          T* out, int step, int offset, int threads, const Place& place) {
    parallel(ceil_div(n, kLanes), threads, [&](std::int64_t tile) {
        T* to = out + (tile * step + offset) * padded_k * kLanes;
        std::memset(to, 0, static_cast<std::size_t>(padded_k) * kLanes * sizeof(T));
        const auto count = static_cast<int>(std::min<std::int64_t>(kLanes, n - tile * kLanes));
        for (int lane = 0; lane < count; ++lane) {
            const T* row = w + (tile * kLanes + lane) * stride;
            for (std::int64_t i = 0; i < k; ++i) to[place(i, lane)] = row[i];
        }
    });
}

}  // namespace
}  // namespace everstep

// Once per process, before any call: 0, or -1 where the system refuses the AMX unit.
EVERSTEP_API int everstep_start() {
#if defined(EVERSTEP_HAS_AMX)
    return everstep::amx::request() ? 0 : -1;
#else
    return 0;
#endif
}

// Packs a weight (n, k) of the format's stored type; rows stride elements apart. Writes the tiles
// offset, offset + step, ... of `out`, padding included.
EVERSTEP_API void everstep_pack(std::int32_t format, const void* w, std::int64_t n, std::int64_t k,
                                std::int64_t stride, void* out, std::int32_t step,
                                std::int32_t offset, std::int32_t threads) {
    using namespace everstep;
    const std::int64_t padded = round_up(k, 32);
    if (format == kFloat32)
        pack(static_cast<const std::uint32_t*>(w), n, k, stride, k,
             static_cast<std::uint32_t*>(out), step, offset, threads,
             [](std::int64_t i, int lane) { return i * kLanes + lane; });
    else if (format == kBf16)
        pack(static_cast<const bf16*>(w), n, k, stride, padded, static_cast<bf16*>(out), step,
             offset, threads,
             [](std::int64_t i, int lane) { return i / 2 * 32 + lane * 2 + i % 2; });
    else
        pack(static_cast<const std::uint8_t*>(w), n, k, stride, padded,
             static_cast<std::uint8_t*>(out), step, offset, threads,
             [](std::int64_t i, int lane) { return i / 2 * 32 + lane * 2 + i % 2; });
}

EVERSTEP_API void everstep_linear(const everstep::Packed* w, const void* x, std::int64_t m,
                                  std::int64_t x_stride, void* y, std::int64_t y_stride,
                                  std::int32_t output, std::int32_t threads) {
    everstep::linear(*w, x, m, x_stride, y, y_stride, static_cast<everstep::Output>(output),
                     threads);
}
