// Causal attention over the paged cache: one order of summation for prefill and decode.
//
// A single token of a rollout is done otherwise where that is faster, with the same sums: `attend_one`.
//
// Else one work item is (rollout, kv head, tile of its queries). A tile's rows are its tokens × the
// query heads of the kv head, so keys and values are read once for all of them:
//
//     row     0      1      2      3      4      5     ...
//     token   t      t      t      t+1    t+1    t+1          (3 query heads per kv head)
//     head    3g     3g+1   3g+2   3g     3g+1   3g+2
//
// Keys are taken in blocks of 64 positions from position 0, brought into two layouts of 32-bit
// words (a float32, or a pair of bf16 where the level multiplies pairs):
//
//     keys    [word of D][64 positions]       word w: elements 2w, 2w+1 of one key (bf16)
//     values  [step][D]                       step s: keys 2s, 2s+1 of one element (bf16)
//
// Where it does not, a bf16 becomes a float32 here, once, and the two of a pair change places: the
// odd one is added first.
//
// Order of summation, which fixes the bits of a row:
//     score   one chain over D: in a bf16 pair the odd element first (as vdpbf16ps has it)
//     total   sixteen lanes, lane l the positions l, l+16, ... ascending; then a tree over lanes
//     output  in a block one chain over its positions (bf16: pairs, the odd one first);
//             blocks ascending
// A row stops at its own position in each of them, so nothing depends on the tile, on other rows,
// on the schedule or on where its blocks lie, and later slots may hold anything.

#include <type_traits>
#include <vector>

#include "attention_one.h"
#include "operations.h"

using namespace everstep;
using std::int64_t;

namespace {

struct Work;  // names the scratch memory

constexpr int kKeyBlock = 64;
// accumulators of a product must fit the registers of the level
constexpr int kMaxRows = kParts <= 2 ? 6 : 3;
constexpr int max_cols(int rows) {
    return kParts == 1 ? 4 : kParts > 2 ? 1 : rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}
// rows of a tile: enough to pay for the layouts, few enough for their scores to stay in L2
constexpr int64_t kTileRows = 64;
constexpr int64_t kMinTileRows = 16;
constexpr int64_t kTileScores = 128 * 1024;

struct Task {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    void* out;
    int64_t heads, kv_heads, dim;
    int64_t q_stride;     // elements from token to token
    int64_t slot_stride;  // elements from slot to slot
    const int64_t* first_row;  // per rollout: packed row of its first query
    const int64_t* start;      // position of that query
    const int64_t* length;     // queries
    const int64_t* table;      // where its block table begins in `blocks`
    const int32_t* blocks;
    int64_t block_size;
    float scale;
};

// -- products of words

// scores of ROWS queries and COLS·16 keys
template <class T, int ROWS, int COLS>
void score_tile(const uint32_t* keys, const uint32_t* queries, int64_t width, float scale,
                float* scores, int64_t stride) {
    Vec acc[ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) acc[r][c] = zero();
    for (int64_t w = 0; w < width; ++w) {
        Words key[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) key[c] = load_words(keys + w * kKeyBlock + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            Words query = set_words(queries[r * width + w]);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) acc[r][c] = add_product<T>(acc[r][c], query, key[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c)
            store(scores + r * stride + c * kLanes, acc[r][c] * set(scale));
}

// COLS·16 elements of ROWS outputs over some steps of one block, from zero
template <class T, int ROWS, int COLS>
void value_tile(const uint32_t* values, int64_t pitch, const uint32_t* weights, int64_t stride,
                int64_t steps, float* parts) {
    Vec acc[ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) acc[r][c] = zero();
    for (int64_t s = 0; s < steps; ++s) {
        Words value[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) value[c] = load_words(values + s * pitch + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            Words weight = set_words(weights[r * stride + s]);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) acc[r][c] = add_product<T>(acc[r][c], weight, value[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) store(parts + r * pitch + c * kLanes, acc[r][c]);
}

// call f(integral constant n), 1 <= n <= kMaxRows
template <class F>
EVERSTEP_INLINE void with_rows(int64_t n, F f) {
    switch (n) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
    }
    if constexpr (kMaxRows > 3) {
        switch (n) {
            case 4: return f(std::integral_constant<int, 4>{});
            case 5: return f(std::integral_constant<int, 5>{});
            case 6: return f(std::integral_constant<int, 6>{});
        }
    }
}

// -- layouts

// words of a row of `dim` elements
template <class T>
constexpr int64_t words_of(int64_t dim) {
    return (dim + kPair<T> - 1) / kPair<T> * (kPair<T> / kPerWord<T>);
}

// a word as it lies in memory, a pair of bf16, to the words of the layout, `stride` apart
template <class T>
EVERSTEP_INLINE void put_words(uint32_t word, uint32_t* to, int64_t stride) {
    if constexpr (kPerWord<T> == kPair<T>) {
        to[0] = word;
    } else {
        to[0] = word & 0xffff0000u;
        to[stride] = word << 16;
    }
}

template <class T>
void lay_query(const T* query, int64_t dim, uint32_t* to) {
    constexpr int64_t step = kPair<T> / kPerWord<T>;
    for (int64_t d = 0; d < dim; d += kPair<T>, to += step) {
        uint32_t word = 0;
        std::memcpy(&word, query + d, sizeof(T) * (size_t)std::min<int64_t>(kPair<T>, dim - d));
        put_words<T>(word, to, 1);
    }
}

#if defined(__AVX512F__)
// kBatch words of sixteen rows, rows becoming columns
constexpr int64_t kBatch = 16;
template <class T>
EVERSTEP_INLINE void transpose_words(const char* const* rows, int64_t offset, uint32_t* to) {
    for (int quad = 0; quad < 4; ++quad) {
        __m512i x[4];
        for (int j = 0; j < 4; ++j) {
            // rows j, j+4, j+8, j+12: four words each
            auto four = [&](int row) {
                return _mm_loadu_si128((const __m128i*)(rows[row] + offset + quad * 16));
            };
            x[j] = _mm512_castsi128_si512(four(j));
            x[j] = _mm512_inserti32x4(x[j], four(j + 4), 1);
            x[j] = _mm512_inserti32x4(x[j], four(j + 8), 2);
            x[j] = _mm512_inserti32x4(x[j], four(j + 12), 3);
        }
        // lane l of the outputs shall hold rows 4l..4l+3
        __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
        __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
        uint32_t* at = to + quad * 4 * kKeyBlock;
        _mm512_storeu_si512(at, _mm512_unpacklo_epi64(a, c));
        _mm512_storeu_si512(at + kKeyBlock, _mm512_unpackhi_epi64(a, c));
        _mm512_storeu_si512(at + 2 * kKeyBlock, _mm512_unpacklo_epi64(b, d));
        _mm512_storeu_si512(at + 3 * kKeyBlock, _mm512_unpackhi_epi64(b, d));
    }
}
#elif defined(__AVX2__)
constexpr int64_t kBatch = 8;
template <class T>
EVERSTEP_INLINE void transpose_words(const char* const* rows, int64_t offset, uint32_t* to) {
    constexpr int64_t step = kPair<T> / kPerWord<T>;
    for (int half = 0; half < 2; ++half, rows += 8, to += 8) {
        __m256i x[4], y[4];
        for (int j = 0; j < 4; ++j) {
            // rows j and j+4: four words each, the first and the second four
            auto four = [&](int row, int64_t at) {
                return _mm_loadu_si128((const __m128i*)(rows[row] + offset + at));
            };
            x[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(j, 0)), four(j + 4, 0), 1);
            y[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(j, 16)), four(j + 4, 16), 1);
        }
        auto put = [&](int word, __m256i row) {
            auto* at = reinterpret_cast<__m256i*>(to + word * step * kKeyBlock);
            if constexpr (step == 1) {
                _mm256_storeu_si256(at, row);
            } else {
                _mm256_storeu_si256(at, _mm256_and_si256(row, _mm256_set1_epi32(-0x10000)));
                _mm256_storeu_si256(at + kKeyBlock / 8, _mm256_slli_epi32(row, 16));
            }
        };
        auto four_rows = [&](const __m256i* z, int word) {
            __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
            __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
            put(word, _mm256_unpacklo_epi64(a, c));
            put(word + 1, _mm256_unpackhi_epi64(a, c));
            put(word + 2, _mm256_unpacklo_epi64(b, d));
            put(word + 3, _mm256_unpackhi_epi64(b, d));
        };
        four_rows(x, 0);
        four_rows(y, 4);
    }
}
#endif

// keys [position][D] → [word][64 positions]; positions up to the next multiple of 16 are filled
template <class T>
void lay_keys(const T* const* keys, int64_t count, int64_t dim, uint32_t* to) {
    constexpr int64_t step = kPair<T> / kPerWord<T> * kKeyBlock;
    const int64_t full = dim / kPair<T>, words = (dim + kPair<T> - 1) / kPair<T>;
    for (int64_t first = 0; first < count; first += kLanes) {
        // what is missing repeats the last key: its score is never used
        const char* rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
            rows[i] = (const char*)keys[std::min<int64_t>(first + i, count - 1)];
        int64_t w = 0;
#if defined(__AVX2__)
        for (; w + kBatch <= full; w += kBatch)
            transpose_words<T>(rows, w * 4, to + w * step + first);
#endif
        for (; w < words; ++w)
            for (int i = 0; i < kLanes; ++i) {
                uint32_t word = 0;
                std::memcpy(&word, rows[i] + w * 4, w < full ? 4 : 2);
                put_words<T>(word, to + w * step + first + i, kKeyBlock);
            }
    }
}

// values [position][D] → [step][D padded with zeros]; a missing second key of a pair reads as zero
void lay_values(const float* const* values, int64_t count, int64_t dim, int64_t pitch,
                uint32_t* to) {
    for (int64_t s = 0; s < count; ++s, to += pitch) {
        std::memcpy(to, values[s], (size_t)dim * 4);
        std::fill(to + dim, to + pitch, 0u);
    }
}

#if defined(__AVX512BF16__)
void lay_values(const bf16* const* values, int64_t count, int64_t dim, int64_t pitch,
                uint32_t* to) {
    for (int64_t s = 0; s < count; s += 2, to += pitch) {
        const bf16* a = values[s];
        if (s + 1 < count) {
            const bf16* b = values[s + 1];
            for (int64_t d = 0; d < dim; ++d) to[d] = (uint32_t)a[d] | (uint32_t)b[d] << 16;
        } else {
            for (int64_t d = 0; d < dim; ++d) to[d] = a[d];
        }
        std::fill(to + dim, to + pitch, 0u);
    }
}
#else
void lay_values(const bf16* const* values, int64_t count, int64_t dim, int64_t pitch,
                uint32_t* to) {
    for (int64_t s = 0; s < round_up(count, 2); ++s, to += pitch) {
        const int64_t position = s ^ 1;
        auto* row = (float*)to;
        for (int64_t d = 0; d < pitch; d += kLanes)
            store(row + d, position < count ? load_left(values[position] + d, dim - d) : zero());
    }
}
#endif

// -- one work item

// lanes 2i and 2i+1 change places
EVERSTEP_INLINE Vec swap_pairs(Vec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return each([&](int i) { return (Native)_mm256_permute_ps((__m256)x.part[i], 0xb1); });
#else
    float lanes[kLanes], swapped[kLanes];
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) swapped[i] = lanes[i ^ 1];
    return load(swapped);
#endif
}

// what a row adds after its tile stopped together: its own last positions of the block
template <class T>
void finish_row(const uint32_t* values, int64_t pitch, const uint32_t* weights, int64_t from,
                int64_t keys, float* part) {
    constexpr int64_t step = kPair<T> / kPerWord<T>;
    const int64_t whole = keys / kPair<T> * step;
    for (int64_t c = 0; c < pitch; c += kLanes) {
        Vec acc = load(part + c);
        const uint32_t* column = values + c;
        for (int64_t s = from; s < whole; ++s)
            acc = add_product<T>(acc, set_words(weights[s]), load_words(column + s * pitch));
        // half a pair: the second key is beyond the row's position
        if (keys % kPair<T> != 0) {
            if constexpr (step == 1) {
                const Words value = load_words(column + whole * pitch) & 0xFFFFu;
                acc = add_product<T>(acc, set_words(weights[whole] & 0xFFFFu), value);
            } else {
                acc = add_product<T>(acc, set_words(0), set_words(0));
                acc = add_product<T>(acc, set_words(weights[whole + 1]),
                                     load_words(column + (whole + 1) * pitch));
            }
        }
        store(part + c, acc);
    }
}

// weights 16j..16j+15 as words, T(x), from the beginning of their row on
template <class T>
EVERSTEP_INLINE void store_shares(float* row, int64_t j, Vec x) {
    if constexpr (kPerWord<T> == kPair<T>)
        store_share((T*)row + j * kLanes, x);
    else
        store(row + j * kLanes, swap_pairs(round_bf16(x)));
}

// scores of positions 0..last → weights T(softmax), packed as words from the row's beginning
template <class T>
void soften(float* row, int64_t last) {
    const int64_t vectors = last / kLanes + 1;
    std::fill(row + last + 1, row + vectors * kLanes, -INFINITY);
    Vec best = load(row);
    for (int64_t j = 1; j < vectors; ++j) best = max(best, load(row + j * kLanes));
    const Vec top = set(max_lanes(best));
    Vec total = zero();
    for (int64_t j = 0; j < vectors; ++j) {
        Vec e = exp_share(load(row + j * kLanes) - top);
        total = total + e;
        store(row + j * kLanes, e);
    }
    const Vec share = set(1.0f / sum_lanes(total));
    for (int64_t j = 0; j < vectors; ++j) store_shares<T>(row, j, load(row + j * kLanes) * share);
}

struct Item {
    int64_t rollout, kv_head, first, count;  // queries first..first+count-1 of the rollout
};

template <class T>
class Gather {
public:
    Gather(const Task& task, const void* cache, const Item& item)
        : base_((const T*)cache + item.kv_head * task.dim),
          table_(task.blocks + task.table[item.rollout]),
          task_(task) {}

    // where positions first..first+count-1 lie
    void at(int64_t first, int64_t count, const T** to) const {
        int64_t block = first / task_.block_size, inside = first % task_.block_size;
        for (int64_t i = 0; i < count; ++i) {
            to[i] = base_ + ((int64_t)table_[block] * task_.block_size + inside) * task_.slot_stride;
            if (++inside == task_.block_size) inside = 0, ++block;
        }
    }

    // ask for the lines of the next block while this one is used
    void prefetch(const T* const* rows, int64_t count) const {
        const int64_t bytes = task_.dim * (int64_t)sizeof(T);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t b = 0; b < bytes; b += 64)
                __builtin_prefetch((const char*)rows[i] + b, 0, 2);
    }

private:
    const T* base_;
    const int32_t* table_;
    const Task& task_;
};

template <class T>
void attend(const Task& task, const Item& item) {
    const int64_t group = task.heads / task.kv_heads, dim = task.dim;
    const int64_t rows = item.count * group;
    const int64_t start = task.start[item.rollout] + item.first;
    const int64_t keys = start + item.count;
    const int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
    const int64_t stride = blocks * kKeyBlock;
    const int64_t width = words_of<T>(dim);
    const int64_t pitch = (dim + kLanes - 1) / kLanes * kLanes;

    const int64_t layout = kKeyBlock * std::max(width, pitch);
    uint32_t* laid = scratch<uint32_t, Work>(layout + rows * (width + stride + 2 * pitch));
    float* scores = (float*)(laid + layout);
    float* totals = scores + rows * stride;
    float* parts = totals + rows * pitch;
    uint32_t* queries = (uint32_t*)(parts + rows * pitch);

    const int64_t first_row = task.first_row[item.rollout] + item.first;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = item.kv_head * group + r % group;
        const T* q = (const T*)task.q + (first_row + r / group) * task.q_stride + head * dim;
        lay_query(q, dim, queries + r * width);
    }
    // the first row that reaches a position
    auto first_at = [&](int64_t position) {
        return std::max<int64_t>(0, position - start) * group;
    };

    const T* here[kKeyBlock];
    const T* next[kKeyBlock];
    auto each_block = [&](const void* cache, auto use) {
        Gather<T> gather(task, cache, item);
        gather.at(0, std::min<int64_t>(kKeyBlock, keys), next);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t from = b * kKeyBlock, count = std::min<int64_t>(kKeyBlock, keys - from);
            std::copy(next, next + count, here);
            const int64_t after = std::min<int64_t>(kKeyBlock, keys - from - count);
            if (after > 0) {
                gather.at(from + count, after, next);
                gather.prefetch(next, after);
            }
            use(from, count);
        }
    };

    each_block(task.k_cache, [&](int64_t from, int64_t count) {
        lay_keys<T>(here, count, dim, laid);
        const int64_t columns = (count + kLanes - 1) / kLanes;
        for (int64_t r = first_at(from); r < rows; r += kMaxRows)
            with_rows(std::min<int64_t>(kMaxRows, rows - r), [&](auto n) {
                float* to = scores + r * stride + from;
                int64_t c = 0;
                constexpr int kCols = max_cols(n());
                for (; c + kCols <= columns; c += kCols)
                    score_tile<T, n(), kCols>(laid + c * kLanes, queries + r * width, width,
                                                 task.scale, to + c * kLanes, stride);
                for (; c < columns; ++c)
                    score_tile<T, n(), 1>(laid + c * kLanes, queries + r * width, width, task.scale,
                                          to + c * kLanes, stride);
            });
    });

    for (int64_t r = 0; r < rows; ++r) soften<T>(scores + r * stride, start + r / group);
    std::fill(totals, totals + rows * pitch, 0.0f);

    each_block(task.v_cache, [&](int64_t from, int64_t count) {
        lay_values(here, count, dim, pitch, laid);
        // words of a block's weights begin where its positions before it end
        const uint32_t* weights = (const uint32_t*)scores + from / kPerWord<T>;
        for (int64_t r = first_at(from); r < rows; r += kMaxRows) {
            const int64_t n = std::min<int64_t>(kMaxRows, rows - r);
            auto reached = [&](int64_t row) {
                return std::min<int64_t>(kKeyBlock, start + row / group + 1 - from);
            };
            // the tile's rows together as far as its first row goes, then each alone
            const int64_t pairs = reached(r) / kPair<T>;
            const int64_t steps = pairs * (kPair<T> / kPerWord<T>);
            with_rows(n, [&](auto n) {
                int64_t c = 0;
                constexpr int kCols = max_cols(n());
                for (; c + kCols * kLanes <= pitch; c += kCols * kLanes)
                    value_tile<T, n(), kCols>(laid + c, pitch, weights + r * stride, stride,
                                                 steps, parts + c);
                for (; c < pitch; c += kLanes)
                    value_tile<T, n(), 1>(laid + c, pitch, weights + r * stride, stride, steps,
                                          parts + c);
            });
            for (int64_t i = 0; i < n; ++i) {
                if (pairs * kPair<T> < reached(r + i))
                    finish_row<T>(laid, pitch, weights + (r + i) * stride, steps, reached(r + i),
                                  parts + i * pitch);
                float* total = totals + (r + i) * pitch;
                for (int64_t c = 0; c < pitch; c += kLanes)
                    store(total + c, load(total + c) + load(parts + i * pitch + c));
            }
        }
    });

    for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = item.kv_head * group + r % group;
        T* to = (T*)task.out + ((first_row + r / group) * task.heads + head) * dim;
        for (int64_t c = 0; c < dim; c += kLanes)
            store_left(to + c, load(totals + r * pitch + c), dim - c);
    }
}

// -- one token

#if defined(__AVX2__) && !defined(__AVX512F__)

template <class T>
bool is_read_in_place(const Task& task, int64_t rollout) {
    return sizeof(T) == sizeof(bf16) && task.length[rollout] == 1 && task.dim % kLanes == 0;
}

// `kv_heads` of them from the item's on: each block of positions is gone through once for all
void attend_one(const Task& task, const Item& item, int64_t kv_heads) {
    const int64_t group = task.heads / task.kv_heads, dim = task.dim, rows = kv_heads * group;
    const int64_t keys = task.start[item.rollout] + 1;
    const int64_t blocks = ceil_div(keys, kKeyBlock), stride = blocks * kKeyBlock;
    float* scores = scratch<float, Work>(rows * (stride + 2 * dim));
    float* totals = scores + rows * stride;
    float* queries = totals + rows * dim;
    const int64_t first_head = item.kv_head * group, row = task.first_row[item.rollout];
    for (int64_t r = 0; r < rows; ++r) {
        const bf16* q = (const bf16*)task.q + row * task.q_stride + (first_head + r) * dim;
        lay_query(q, dim, (uint32_t*)queries + r * dim);
    }
    std::fill(totals, totals + rows * dim, 0.0f);

    const bf16* here[kKeyBlock];
    const bf16* next[kKeyBlock];
    // `then`: the cache that is gone through next
    auto each_block = [&](const void* cache, const void* then, auto use) {
        const Gather<bf16> gather(task, cache, item);
        gather.at(0, std::min<int64_t>(kKeyBlock, keys), next);
        for (int64_t from = 0; from < keys; from += kKeyBlock) {
            const int64_t count = std::min<int64_t>(kKeyBlock, keys - from);
            std::copy(next, next + count, here);
            int64_t after = std::min<int64_t>(kKeyBlock, keys - from - count);
            if (after > 0) {
                gather.at(from + count, after, next);
            } else if (then != nullptr) {
                after = std::min<int64_t>(kKeyBlock, keys);
                Gather<bf16>(task, then, item).at(0, after, next);
            }
            use(from, count, Ahead{next, after});
        }
    };
    // function(rows, their first one, its kv head, what to ask for) for rows of one kv head each
    const int64_t most = ceil_div(group, ceil_div(group, kMaxRows));
    auto each_rows = [&](Ahead ahead, auto function) {
        for (int64_t h = 0; h < kv_heads; ++h)
            for (int64_t r = 0; r < group; r += most)
                with_rows(std::min(most, group - r), [&](auto n) {
                    function(n, h * group + r, h, r == 0 ? ahead : Ahead{nullptr, 0});
                });
    };

    each_block(task.k_cache, task.v_cache, [&](int64_t from, int64_t count, Ahead ahead) {
        each_rows(ahead, [&](auto n, int64_t r, int64_t head, Ahead then) {
            score_block<n()>(here, count, head * dim, queries + r * dim, dim, task.scale,
                             scores + r * stride + from, stride, then);
        });
    });
    for (int64_t r = 0; r < rows; ++r) soften<bf16>(scores + r * stride, keys - 1);
    each_block(task.v_cache, nullptr, [&](int64_t from, int64_t count, Ahead ahead) {
        each_rows(ahead, [&](auto n, int64_t r, int64_t head, Ahead then) {
            constexpr int kCols = max_cols(n());
            const float* weights = scores + r * stride + from;
            int64_t c = 0;
            for (; c + kCols * kLanes <= dim; c += kCols * kLanes)
                add_values<n(), kCols>(here, count, head * dim + c, weights, stride,
                                       totals + r * dim + c, dim, then);
            for (; c < dim; c += kLanes)
                add_values<n(), 1>(here, count, head * dim + c, weights, stride,
                                   totals + r * dim + c, dim, then);
        });
    });

    bf16* out = (bf16*)task.out + (row * task.heads + first_head) * dim;
    for (int64_t c = 0; c < rows * dim; c += kLanes) store(out + c, load(totals + c));
}

#else

template <class T>
bool is_read_in_place(const Task&, int64_t) {
    return false;
}
void attend_one(const Task&, const Item&, int64_t) {}

#endif

// -- all items

// kv heads that one item of a single token takes: all, where there are rollouts enough for all
// threads, and their scores stay in L2
int64_t heads_at_once(const Task& task, int64_t rollout, int64_t count, int threads) {
    if (threads > 1 && count < 4 * threads) return 1;
    const int64_t scores = (task.start[rollout] + 1) * (task.heads / task.kv_heads);
    return std::max<int64_t>(1, std::min(task.kv_heads, kTileScores / scores));
}

int64_t tile_tokens(const Task& task, int64_t rollout) {
    const int64_t group = task.heads / task.kv_heads;
    const int64_t keys = task.start[rollout] + task.length[rollout];
    const int64_t rows = std::max(kMinTileRows, std::min(kTileRows, kTileScores / keys));
    return std::max<int64_t>(1, rows / group);
}

template <class T>
void attend_all(const Task& task, int64_t count, int threads) {
    // items of rollout i: [begin[i], begin[i + 1]), kv heads outside, the longest tiles first
    static thread_local std::vector<int64_t> begin;
    begin.assign((size_t)count + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
        int64_t items = 0;
        if (is_read_in_place<T>(task, i))
            items = ceil_div(task.kv_heads, heads_at_once(task, i, count, threads));
        else
            items = ceil_div(task.length[i], tile_tokens(task, i)) * task.kv_heads;
        begin[i + 1] = begin[i] + items;
    }
    const int64_t items = begin[count];
    const int64_t* border = begin.data();
    parallel(items, threads, [&](int64_t n) {
        const int64_t i = std::upper_bound(border, border + count + 1, n) - border - 1;
        const int64_t inside = n - border[i];
        if (is_read_in_place<T>(task, i)) {
            const int64_t heads = heads_at_once(task, i, count, threads), head = inside * heads;
            attend_one(task, {i, head, 0, 1}, std::min(heads, task.kv_heads - head));
            return;
        }
        const int64_t tiles = (border[i + 1] - border[i]) / task.kv_heads;
        const int64_t tokens = tile_tokens(task, i);
        const int64_t first = (tiles - 1 - inside % tiles) * tokens;
        const int64_t left = task.length[i] - first;
        attend<T>(task, {i, inside / tiles, first, std::min(tokens, left)});
    });
}

}  // namespace

// q (T, H, D) T, k_cache and v_cache (slots, G, D) T → out (T, H, D) T, contiguous.
//
//     is_bf16       T is bf16 (1) or float32 (0)
//     q_stride      elements between tokens of q; slot_stride: between slots of the caches
//     first_row, start, length, table, blocks: per rollout, and its block table in `blocks`
// Never reads a slot beyond a query's own position.
EVERSTEP_API void everstep_attention(
    int32_t is_bf16, const void* q, const void* k_cache, const void* v_cache, void* out,
    int64_t heads, int64_t kv_heads, int64_t dim, int64_t q_stride, int64_t slot_stride,
    int64_t count, const int64_t* first_row, const int64_t* start, const int64_t* length,
    const int64_t* table, const int32_t* blocks, int64_t block_size, float scale,
    int32_t threads) {
    Task task{q,         k_cache, v_cache, out,   heads,  kv_heads,   dim,  q_stride, slot_stride,
              first_row, start,   length,  table, blocks, block_size, scale};
    if (is_bf16)
        attend_all<bf16>(task, count, threads);
    else
        attend_all<float>(task, count, threads);
}
