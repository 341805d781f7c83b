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
#include "gemm_block.h"

#include "amx.h"

namespace everstep {
namespace {

// -- one thread's share

struct Share {
    std::int64_t first_row, end_row, first_tile, end_tile;
};

// Rows of at most `most` each, as equal as can be.
int next_rows(std::int64_t left, int most) {
    return static_cast<int>(ceil_div(left, ceil_div(left, most)));
}

// -- FP8 and many rows: a few tiles of bf16 at a time

struct Panel {};

// `tiles` tiles of codes as bf16 in this thread's memory: what packing the expanded weight gives.
template <class F>
const char* expand(const Packed& w, std::int64_t tile, int tiles) {
    const std::int64_t steps = w.padded_k() / 2, used = ceil_div(w.k, 2);
    bf16* out = scratch<bf16, Panel>(tiles * steps * 2 * kLanes);
    for (int t = 0; t < tiles; ++t) {
        const char* codes = static_cast<const char*>(w.data) + (tile + t) * w.tile_bytes();
        const float* scale = w.scale + (tile + t) * w.scales_per_tile();
        bf16* to = out + t * steps * 2 * kLanes;
        typename F::Decoder decoder;
        for (std::int64_t step = 0; step < used;) {
            decoder.start(scale, step / kScaleSteps);
            for (const std::int64_t end = std::min(used, step + kScaleSteps); step < end; ++step) {
                const auto words = decoder.words(codes + step * F::kStepBytes);
                std::memcpy(to + step * 2 * kLanes, &words, sizeof words);
            }
        }
        std::memset(to + used * 2 * kLanes, 0, static_cast<std::size_t>(steps - used) * 2 * kLanes * sizeof(bf16));
    }
    return reinterpret_cast<const char*>(out);
}

// -- which blocks

#if defined(__AVX512F__)

// One block of rows: every code is decoded once, on its way into the product.
bool is_decoded_in_registers(std::int64_t rows) {
    return rows <= max_rows(kDirectTiles, kDirectSums);
}

int tiles_at_once(const Packed& w, std::int64_t rows, bool is_direct) {
    return is_direct ? kDirectTiles : w.is_pair || rows <= max_rows(4) ? 4 : 3;
}

int rows_at_once(int tiles, bool is_direct) {
    return max_rows(tiles, is_direct ? kDirectSums : kMaxSums);
}

template <class F>
int tiles_beside(int, int tiles) {
    return tiles;
}

#else

bool is_decoded_in_registers(std::int64_t rows) { return rows <= max_rows(1); }

// what several blocks of rows read shall be in the cache still
int tiles_at_once(const Packed& w, std::int64_t rows, bool) {
    return rows <= max_rows(1) ? kMaxTiles : w.is_pair ? 2 : 1;
}

int rows_at_once(int, bool) { return max_rows(1); }

// Enough sums in flight to hide a multiply-add's latency, and no more than the registers hold.
template <class F>
int tiles_beside(int rows, int tiles) {
    return std::min({rows == 1 ? 4 : rows == 2 ? 2 : 1, F::kTiles, tiles});
}

#endif

template <class F>
void run(const Packed& w, const typename F::X* x, std::int64_t x_stride, const Share& share,
         const Sink& sink) {
    const std::int64_t rows = share.end_row - share.first_row;
    const bool is_direct = w.scale && is_decoded_in_registers(rows);
    const bool is_expanded = w.scale && !is_direct;
    const int at_once = tiles_at_once(w, rows, is_direct);
    const std::int64_t scales = w.scales_per_tile();
    const std::int64_t tile_bytes = is_expanded ? w.padded_k() * kLanes * 2 : w.tile_bytes();
    Sums sums;
    for (std::int64_t tile = share.first_tile; tile < share.end_tile; tile += at_once) {
        const auto tiles = static_cast<int>(std::min<std::int64_t>(at_once, share.end_tile - tile));
        const int most = rows_at_once(tiles, is_direct);
        const char* data = static_cast<const char*>(w.data) + tile * tile_bytes;
        const float* scale = w.scale + (w.scale ? tile * scales : 0);
        if constexpr (kIsFp8<F>)
            if (is_expanded) data = expand<F>(w, tile, tiles);
        for (std::int64_t row = share.first_row; row < share.end_row;) {
            const int count = next_rows(share.end_row - row, most);
            const auto* from = x + row * x_stride;
            const int beside = tiles_beside<F>(count, tiles);
            for (int t = 0; t < tiles; t += beside) {
                const int width = std::min(beside, tiles - t);
                const char* part = data + t * tile_bytes;
                float* out = sums.at + t * kLanes;
                if constexpr (kIsFp8<F>)
                    if (is_expanded) {
                        pick<Bf16>(count, width)(from, x_stride, part, tile_bytes, nullptr, 0, w.k, out);
                        continue;
                    }
                pick<F>(count, width)(from, x_stride, part, tile_bytes, scale + (w.scale ? t * scales : 0),
                                      scales, w.k, out);
            }
            sink.finish(w, row, count, tile, tiles, sums.at);
            row += count;
        }
    }
}

// function(F{}) for what turns this weight's codes, of these tiles, into numbers
template <class Function>
auto with_fp8(const Packed& w, const Share& share, const Function& function) {
#if defined(__AVX512BF16__)
    (void)share;
    return w.format == kFp8Block ? function(Fp8Dot<BlockDecoder>{}) : function(Fp8Dot<ChannelDecoder>{});
#else
    if (w.format == kFp8Channel) return function(Fp8Expanded<Multiplier<false>>{});
#if defined(__AVX2__)
    const std::int64_t scales = w.scales_per_tile();
    if (std::all_of(w.scale + share.first_tile * scales, w.scale + share.end_tile * scales, Table::takes))
        return function(Fp8Expanded<Table>{});
#endif
    (void)share;
    return function(Fp8Expanded<Multiplier<true>>{});
#endif
}

#if defined(EVERSTEP_HAS_AMX)

// Blocks of 32 rows × 2 column tiles, the last one with fewer rows; x is padded to whole k blocks.
void run_amx(const Packed& w, const bf16* x, std::int64_t x_stride, const Share& share,
             const Sink& sink) {
    constexpr int kRows = 32, kTiles = 2, kHalf = 16;
    const std::int64_t k_blocks = w.padded_k() / 32, stride = x_stride * 2;
    const std::int64_t out_stride = kSumsStride * 4;
    Sums sums;
    int configured = 0;
    for (std::int64_t tile = share.first_tile; tile < share.end_tile; tile += kTiles) {
        const auto tiles = static_cast<int>(std::min<std::int64_t>(kTiles, share.end_tile - tile));
        const std::int64_t tile_bytes = w.padded_k() * kLanes * 2;
        const char* data = static_cast<const char*>(w.data) + tile * tile_bytes;
        if (w.scale)
            data = with_fp8(w, share, [&](auto kind) { return expand<decltype(kind)>(w, tile, tiles); });
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
            amx::store<0>(sums.at, out_stride);
            amx::store<1>(sums.at + kLanes, out_stride);
            if (rows > kHalf) {
                amx::store<2>(sums.at + kHalf * kSumsStride, out_stride);
                amx::store<3>(sums.at + kHalf * kSumsStride + kLanes, out_stride);
            }
            sink.finish(w, row, rows, tile, tiles, sums.at);
        }
    }
    amx::release();
}

#endif

// -- rows as the level wants them

struct Rows {};

// below this a second thread costs more than it gives
constexpr std::int64_t kWorthAThread = 64 * 1024;
// so that a thread which comes late leaves little to wait for
constexpr int kTasksEach = 4;

#if defined(EVERSTEP_HAS_AMX)
// whole k blocks: copied only where K is no multiple of 32
const bf16* prepare(const Packed& w, const bf16* x, std::int64_t m, std::int64_t& stride, int) {
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
const bf16* prepare(const Packed&, const bf16* x, std::int64_t, std::int64_t&, int) { return x; }
#else
const float* prepare(const Packed& w, const bf16* x, std::int64_t m, std::int64_t& stride,
                     int threads) {
    // as float32; not a power of two apart, which would share few lines of the cache
    const std::int64_t width = round_up(w.k, kLanes) + kLanes;
    float* out = scratch<float, Rows>(m * width);
    const std::int64_t from = stride;
    parallel(m, m * w.k < kWorthAThread ? 1 : threads, [&](std::int64_t row) {
        for (std::int64_t k = 0; k < w.k; k += kLanes) {
            const auto left = static_cast<int>(std::min<std::int64_t>(kLanes, w.k - k));
            const bf16* at = x + row * from + k;
            store(out + row * width + k, left == kLanes ? load(at) : load_first(at, left));
        }
    });
    stride = width;
    return out;
}
#endif

template <class Function>
void share_out(const Packed& w, std::int64_t m, int threads, const Function& function) {
    const std::int64_t unit = w.is_pair ? 2 : 1, units = w.num_tiles() / unit;
    const std::int64_t work = w.num_tiles() * w.padded_k() * kLanes * ceil_div(m, 4);
    const std::int64_t parts = std::min<std::int64_t>(threads * kTasksEach, std::max<std::int64_t>(1, work / kWorthAThread));
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
    const auto* rows = prepare(w, static_cast<const bf16*>(x), m, stride, threads);
    share_out(w, m, threads, [&](const Share& share) {
#if defined(EVERSTEP_HAS_AMX)
        run_amx(w, rows, stride, share, sink);
#else
        if (!w.scale) return run<Bf16>(w, rows, stride, share, sink);
        with_fp8(w, share, [&](auto kind) { run<decltype(kind)>(w, rows, stride, share, sink); });
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
