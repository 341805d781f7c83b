// Which ids of a row stay, and what they sum to: by lists of candidates, or by value where they are many.
//
// A row is held as y and e = exp(y), padded with y = -inf and e = 0 to whole vectors. Ids are ranked
// by (y descending, id ascending), so that a cut is a border in that order. Sums are in float64, in
// blocks of 512 ids lane by lane (lane = id % 16), a tree over the lanes, blocks ascending: ids that do
// not stay add nothing, so both ways sum to the same bits.
#pragma once

#include <cfloat>

#include "mathfun.h"

namespace everstep {

using std::int32_t;
using std::int64_t;
using std::uint32_t;

constexpr int64_t kBlock = 512;
// candidates of which the ranking is settled by sorting them
constexpr int64_t kFew = 48;
// more candidates than this are first told apart by bins of their values
constexpr int kBins = 512;
// candidates that are more than this part of the row are not listed
constexpr int64_t kListedPart = 16;
// how often the range of a border is cut to a fifth before its ids are listed
constexpr int kNarrowings = 3;

struct Ranked {
    float value;
    int32_t id;
};

EVERSTEP_INLINE bool is_ahead(const Ranked& a, const Ranked& b) {
    return (a.value > b.value) | ((a.value == b.value) & (a.id < b.id));
}

// -- sums in float64

struct Sum {
#if defined(__AVX512F__)
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

    EVERSTEP_INLINE void add(Vec x) {
        const __m512 all = (__m512)x.part[0];
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(all)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)));
    }
    EVERSTEP_INLINE void read(double* lanes) const {
        _mm512_storeu_pd(lanes, low);
        _mm512_storeu_pd(lanes + 8, high);
    }
#else
    double lane[kLanes] = {};

    EVERSTEP_INLINE void add(Vec x) {
        float each_lane[kLanes];
        store(each_lane, x);
        for (int i = 0; i < kLanes; ++i) lane[i] += each_lane[i];
    }
    EVERSTEP_INLINE void read(double* lanes) const { std::memcpy(lanes, lane, sizeof lane); }
#endif
    double total() const {
        double lanes[kLanes];
        read(lanes);
        return fold(lanes);
    }
    static double fold(double* lanes) {
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        return lanes[0];
    }
};

// The first block whose cumulative sum exceeds the target, or the last with weight; `below` gets
// the sum before it.
inline int64_t find_block(const double* blocks, int64_t count, double target, double* below) {
    double sum = 0.0;
    int64_t last = 0;
    for (int64_t b = 0; b < count; ++b) {
        if (blocks[b] <= 0.0) continue;
        *below = sum;
        last = b;
        sum += blocks[b];
        if (sum > target) break;
    }
    return last;
}

// -- lists

// bit i: lane i is at least `floor`
EVERSTEP_INLINE uint32_t at_least(Vec x, float floor) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x.part[0], _mm512_set1_ps(floor), _CMP_GE_OQ);
#elif defined(__AVX2__)
    const __m256 border = _mm256_set1_ps(floor);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.part[0], border, _CMP_GE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.part[1], border, _CMP_GE_OQ));
    return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 8;
#else
    float lanes[kLanes];
    store(lanes, x);
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i] >= floor) << i;
    return bits;
#endif
}

struct Candidates;
struct Maxima;
struct Ys;
struct Es;
struct Blocks;

// Ids in ascending order whose value is at least `floor`.
inline int64_t gather(const float* values, int64_t size, float floor, Ranked* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        uint32_t bits = at_least(load(values + i), floor);
        if (size - i < kLanes) bits &= (1u << (size - i)) - 1u;
        for (; bits; bits &= bits - 1) {
            const int64_t id = i + __builtin_ctz(bits);
            out[count++] = {values[id], static_cast<int32_t>(id)};
        }
    }
    return count;
}

// A value that at least k ids reach: ids fall into sets (512-block, lane), and k sets have a
// maximum that large. -inf where there are fewer than k sets.
inline float floor_of_best(const float* values, int64_t size, int64_t k) {
    const int64_t sets = ceil_div(size, kBlock) * kLanes;
    if (k > sets) return -INFINITY;
    float* maxima = scratch<float, Maxima>(sets);
    for (int64_t b = 0; b * kBlock < size; ++b) {
        // the row is padded to whole vectors with -inf
        Vec best = load(values + b * kBlock);
        for (int64_t i = b * kBlock; i < std::min(size, (b + 1) * kBlock); i += kLanes)
            best = max(best, load(values + i));
        store(maxima + b * kLanes, best);
    }
    std::nth_element(maxima, maxima + k - 1, maxima + sets, [](float a, float b) { return a > b; });
    return maxima[k - 1];
}

// The k-th in rank. Reorders.
inline Ranked kth(Ranked* candidates, int64_t count, int64_t k) {
    std::nth_element(candidates, candidates + k - 1, candidates + count, is_ahead);
    return candidates[k - 1];
}

// Leave the candidates of one bin of values: that in which the mass reaches the target. Bins are
// even in y from the best candidate to the worst, so they keep the order. Returns how many are
// left; `before` gets the mass of the bins above.
inline int64_t narrow_to_bin(Ranked* candidates, int64_t count, const float* e, double target,
                      double* before) {
    float best = candidates[0].value, worst = best;
    for (int64_t i = 1; i < count; ++i) {
        best = candidates[i].value > best ? candidates[i].value : best;
        worst = candidates[i].value < worst ? candidates[i].value : worst;
    }
    if (!(worst > -1e30f) || best == worst) return count;
    double mass[kBins] = {};
    const float scale = static_cast<float>(kBins) / (best - worst);
    auto bin_of = [&](const Ranked& x) {
        return std::min(static_cast<int>((best - x.value) * scale), kBins - 1);
    };
    for (int64_t i = 0; i < count; ++i) mass[bin_of(candidates[i])] += e[candidates[i].id];
    int bin = 0;
    // the worst candidate is in the last bin: no bin that is stopped at is empty
    for (; bin < kBins - 1 && *before + mass[bin] < target; ++bin) *before += mass[bin];
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
        candidates[n] = candidates[i];
        n += bin_of(candidates[i]) == bin;
    }
    return n;
}

// The last in rank before which less than `target` has been gathered, `before` of it by ids that are
// no candidates. Reorders.
// Quickselect by mass: each round leaves one side of a pivot, whose mass is known, behind.
inline Ranked border_of_mass(Ranked* candidates, int64_t count, const float* e, double target,
                      double before = 0.0) {
    if (count > kBins) count = narrow_to_bin(candidates, count, e, target, &before);
    while (count > kFew) {
        Ranked* end = candidates + count;
        Ranked a = candidates[0], b = candidates[count / 2], c = candidates[count - 1];
        const Ranked pivot = is_ahead(a, b) ? (is_ahead(b, c) ? b : is_ahead(a, c) ? c : a)
                                            : (is_ahead(a, c) ? a : is_ahead(b, c) ? c : b);
        // ahead of the pivot or the pivot itself; neither side is empty, since it is a median
        Ranked* middle = std::partition(candidates, end,
                                        [&](const Ranked& x) { return !is_ahead(pivot, x); });
        double mass = before;
        for (const Ranked* x = candidates; x < middle; ++x) mass += e[x->id];
        if (mass < target) {
            before = mass;
            candidates = middle;
        } else {
            end = middle;
        }
        count = end - candidates;
    }
    std::sort(candidates, candidates + count, is_ahead);
    int64_t last = 0;
    before += e[candidates[0].id];
    while (last + 1 < count && before < target) before += e[candidates[++last].id];
    return candidates[last];
}

// Keep what does not rank behind the border; ids stay ascending.
inline int64_t keep_to(Ranked* kept, int64_t count, Ranked border) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
        const bool stays = !is_ahead(border, kept[i]);
        kept[n] = kept[i];
        n += stays;
    }
    return n;
}

// Σe of some ids in ascending order: the order of additions of the whole row, zeros left out.
inline double sum_kept(const Ranked* kept, int64_t count, const float* e, double* blocks, int64_t size) {
    double total = 0.0;
    int64_t i = 0;
    for (int64_t b = 0; b * kBlock < size; ++b) {
        double lanes[kLanes] = {};
        if (i < count && kept[i].id < (b + 1) * kBlock) {
            for (; i < count && kept[i].id < (b + 1) * kBlock; ++i)
                lanes[kept[i].id % kLanes] += e[kept[i].id];
            blocks[b] = Sum::fold(lanes);
        } else {
            blocks[b] = 0.0;
        }
        total += blocks[b];
    }
    return total;
}

inline int64_t draw_kept(const Ranked* kept, int64_t count, const float* e, const double* blocks,
                  int64_t size, double target) {
    double below = 0.0, sum = 0.0;
    const int64_t b = find_block(blocks, ceil_div(size, kBlock), target, &below);
    const Ranked* from = std::lower_bound(
        kept, kept + count, b * kBlock, [](const Ranked& x, int64_t id) { return x.id < id; });
    int64_t last = from->id;
    for (; from < kept + count && from->id < (b + 1) * kBlock; ++from) {
        if (e[from->id] <= 0.0f) continue;
        last = from->id;
        sum += e[from->id];
        if (sum > target - below) break;
    }
    return last;
}

// -- by value

// Ids with y of at least the border's, those of the same y up to the border's id, and e of at least
// `share`.
struct Cut {
    Ranked border{-INFINITY, -1};
    float share = 0.0f;

    // y from which on the ids behind the border's stay
    float above() const { return std::nextafter(border.value, INFINITY); }
    bool keeps(int64_t id, float y, float e) const {
        return e >= share && y >= (id <= border.id ? border.value : above());
    }
};

// e of the lanes that stay, else 0; `count` gains how many do
EVERSTEP_INLINE Vec keep_lanes(Vec y, Vec e, float least, float share, NativeInt& count) {
    return each([&](int i) {
        const NativeInt stays = (y.part[i] >= least - Native{}) & (e.part[i] >= share - Native{});
        count -= stays;
        return as_float(as_int(e.part[i]) & stays);
    });
}

inline int64_t sum_counts(NativeInt count) {
    int64_t total = 0;
    for (int i = 0; i < kWidth; ++i) total += count[i];
    return total;
}

inline int64_t count_at_least(const float* values, int64_t padded, float floor) {
    NativeInt count{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec x = load(values + i);
        keep_lanes(x, x, floor, floor, count);
    }
    return sum_counts(count);
}

// Σe of the ids that stay, per block into `blocks`; how many they are.
inline double sum_cut(const float* ys, const float* es, int64_t size, const Cut& cut, double* blocks,
                      int64_t* kept) {
    const float above = cut.above();
    NativeInt count{};
    int64_t apart = 0;
    double total = 0.0;
    for (int64_t b = 0; b * kBlock < size; ++b) {
        Sum sum;
        for (int64_t i = b * kBlock; i < std::min(size, (b + 1) * kBlock); i += kLanes) {
            if (i <= cut.border.id && cut.border.id < i + kLanes - 1) {
                float lanes[kLanes] = {};
                for (int lane = 0; lane < kLanes; ++lane)
                    if (cut.keeps(i + lane, ys[i + lane], es[i + lane])) {
                        lanes[lane] = es[i + lane];
                        ++apart;
                    }
                sum.add(load(lanes));
            } else {
                const float least = i <= cut.border.id ? cut.border.value : above;
                sum.add(keep_lanes(load(ys + i), load(es + i), least, cut.share, count));
            }
        }
        blocks[b] = sum.total();
        total += blocks[b];
    }
    *kept = sum_counts(count) + apart;
    return total;
}

inline int64_t draw_cut(const float* ys, const float* es, int64_t size, const Cut& cut,
                        const double* blocks, double target) {
    double below = 0.0, sum = 0.0;
    const int64_t first = find_block(blocks, ceil_div(size, kBlock), target, &below) * kBlock;
    int64_t last = first;
    for (int64_t id = first; id < std::min(size, first + kBlock); ++id) {
        if (es[id] <= 0.0f || !cut.keeps(id, ys[id], es[id])) continue;
        last = id;
        sum += es[id];
        if (sum > target - below) break;
    }
    return last;
}

inline int64_t list_cut(const float* ys, const float* es, int64_t size, const Cut& cut, Ranked* out) {
    int64_t count = 0;
    for (int64_t id = 0; id < size; ++id) {
        out[count] = {ys[id], static_cast<int32_t>(id)};
        count += cut.keeps(id, ys[id], es[id]);
    }
    return count;
}

struct Span {
    float low, high;
};

// A part of the span in which the border is: from the best on, ids down to it gather `target`. Judged
// by sums in float32, so that it may rarely be a part beside it.
inline Span narrow(const float* ys, const float* es, int64_t padded, Span span, double target) {
    constexpr int kCuts = 4;
    const float step = (span.high - span.low) / (kCuts + 1);
    float cuts[kCuts];
    for (int c = 0; c < kCuts; ++c) cuts[c] = span.low + static_cast<float>(c + 1) * step;
    Vec sums[kCuts] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec y = load(ys + i), e = load(es + i);
#pragma GCC unroll 4
        for (int c = 0; c < kCuts; ++c) sums[c] = sums[c] + each([&](int part) {
            return as_float(as_int(e.part[part]) & (y.part[part] >= cuts[c] - Native{}));
        });
    }
    for (int c = kCuts - 1; c >= 0; --c) {
        if (sum_lanes(sums[c]) >= target) return {cuts[c], span.high};
        span.high = cuts[c];
    }
    return span;
}

// Σe above the span; the ids in it, ascending, into `out`.
inline double split(const float* ys, const float* es, int64_t padded, Span span, Ranked* out,
                    int64_t* count) {
    Sum above;
    NativeInt unused{};
    const float over = std::nextafter(span.high, INFINITY);
    *count = 0;
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec y = load(ys + i);
        above.add(keep_lanes(y, load(es + i), over, 0.0f, unused));
        for (uint32_t bits = at_least(y, span.low) & ~at_least(y, over); bits; bits &= bits - 1) {
            const int64_t id = i + __builtin_ctz(bits);
            out[(*count)++] = {ys[id], static_cast<int32_t>(id)};
        }
    }
    return above.total();
}

// The border of the ids that gather `target`, without a list of all that might be it; false if it is
// not where it was looked for. top: the largest y; bottom: the least that matters; out: memory for
// the row's ids.
inline bool find_border(const float* ys, const float* es, int64_t padded, float top, float bottom,
                        double target, Ranked* out, Ranked* border) {
    Span span{bottom, top};
    for (int round = 0; round < kNarrowings; ++round) span = narrow(ys, es, padded, span, target);
    int64_t count = 0;
    const double before = split(ys, es, padded, span, out, &count);
    double inside = 0.0;
    for (int64_t i = 0; i < count; ++i) inside += es[out[i].id];
    if (count == 0 || before >= target || before + inside < target) return false;
    *border = border_of_mass(out, count, es, target, before);
    return true;
}

}  // namespace everstep
