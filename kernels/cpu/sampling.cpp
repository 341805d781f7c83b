// From a row of logits to a drawn token and what is known of it (kernels/sampling.py has the
// definition). Two passes over a row that is not cut; a cut row adds a selection, never a sort.
//
//     top      max z / T
//     y        z / T - top, float32
//     e        exp(y), float32; sums of e in float64: in blocks of 512 ids lane by lane (lane =
//              id % 16), a tree over the lanes, blocks ascending
//     lp_temp  y - ln Σe, rounded to float32
//     token    the first block, then in it the first id, whose cumulative sum exceeds u · mass
//
// Cuts. Ids are ranked by (y descending, id ascending), so that each cut is a border in that order:
// `Border` is the last id kept. A border is found among candidates that a cheap bound has let
// through; what is kept is then read off in ascending order of ids, and summed as above.

#include "mathfun.h"

using namespace everstep;
using std::int32_t;
using std::int64_t;
using std::uint32_t;

namespace {

constexpr int64_t kBlock = 512;
// candidates of which the ranking is settled by sorting them
constexpr int64_t kFew = 48;
// more candidates than this are first told apart by bins of their values
constexpr int kBins = 512;

// as kernels/sampling.py (RULE) and kernels/native_sampling.py (_DRAW) lay them out
struct Rule {
    double u, top_p;
    int64_t top_k, banned_from, banned_count, num_top;
    int64_t kept_row;      // where to write the kept ids, -1: nowhere
    int64_t row;           // of the logits
    const float* changed;  // that row after penalties and bias; null: as the head gave it
    float temperature, min_p;
    int32_t top_of;  // 0 raw, 1 temp, 2 sampled
    int32_t wants_raw, wants_entropy;
};

struct Draw {
    int64_t token, kept, tops;
    double lp_sampled, lp_temp, mass, lp_raw, entropy;
    int64_t is_lost;  // the rule takes the logits beyond float32: nothing else is written
};

// Philox4x32-10, key = seed, counter = position
double uniform(std::uint64_t seed, std::uint64_t position) {
    constexpr std::uint64_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
    auto low = [](std::uint64_t x) { return static_cast<uint32_t>(x); };
    auto high = [](std::uint64_t x) { return static_cast<uint32_t>(x >> 32); };
    uint32_t c[4] = {low(position), high(position), 0, 0}, k[2] = {low(seed), high(seed)};
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p = kFirst * c[0], q = kSecond * c[2];
        const uint32_t next[4] = {high(q) ^ c[1] ^ k[0], low(q), high(p) ^ c[3] ^ k[1], low(p)};
        std::memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    const std::uint64_t words = static_cast<std::uint64_t>(c[0]) << 32 | c[1];
    return static_cast<double>(words >> 11) * 0x1p-53;
}

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

// -- one row

struct Row {
    const float* z;
    int64_t size;
    float temperature, top;

    // y of sixteen ids; lanes beyond the row are -inf
    EVERSTEP_INLINE Vec at(int64_t first) const {
        const int64_t left = size - first;
        Vec x = left >= kLanes ? load(z + first) : padded(first, left);
        if (temperature != 1.0f) x = x / set(temperature);
        return x - set(top);
    }

    Vec padded(int64_t first, int64_t left) const {
        float lanes[kLanes];
        std::fill(lanes, lanes + kLanes, -INFINITY);
        std::memcpy(lanes, z + first, sizeof(float) * static_cast<size_t>(left));
        return load(lanes);
    }

    double y(int64_t id) const {
        const float scaled = temperature != 1.0f ? z[id] / temperature : z[id];
        return scaled - top;
    }
};

Row make_row(const float* z, int64_t size, float temperature) {
    Row row{z, size, temperature == 0.0f ? 1.0f : temperature, 0.0f};
    Vec best[4] = {set(-INFINITY), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) best[j] = max(best[j], load(z + i + j * kLanes));
    for (; i < size; i += kLanes)
        best[0] = max(best[0], size - i >= kLanes ? load(z + i) : row.padded(i, size - i));
    // dividing by a positive number keeps the order
    row.top = max_lanes(max(max(best[0], best[1]), max(best[2], best[3]))) / row.temperature;
    return row;
}

// Σe per block into `blocks`, of which there are ceil(size / 512); y·e into `products` if wanted;
// y and e are kept if there is somewhere to keep them.
double sum_row(const Row& row, double* blocks, double* products, float* ys, float* es) {
    double total = 0.0;
    Sum turned;
    for (int64_t b = 0; b * kBlock < row.size; ++b) {
        Sum sum;
        const int64_t end = std::min(row.size, (b + 1) * kBlock);
        for (int64_t i = b * kBlock; i < end; i += kLanes) {
            const Vec y = row.at(i), e = exp(y);
            sum.add(e);
            // 0·-inf of the lanes beyond the row is no number
            if (products != nullptr) turned.add(e * max(y, set(-1e38f)));
            if (ys != nullptr) {
                store(ys + i, y);
                store(es + i, e);
            }
        }
        blocks[b] = sum.total();
        total += blocks[b];
    }
    if (products != nullptr) *products = turned.total();
    return total;
}

double log_sum(const Row& row) {
    double total = 0.0;
    for (int64_t b = 0; b * kBlock < row.size; ++b) {
        Sum sum;
        const int64_t end = std::min(row.size, (b + 1) * kBlock);
        for (int64_t i = b * kBlock; i < end; i += kLanes) sum.add(exp(row.at(i)));
        total += sum.total();
    }
    return std::log(total);
}

double logprob(const Row& row, int64_t id, double log_total) {
    return static_cast<float>(row.y(id) - log_total);
}

// The first block whose cumulative sum exceeds the target, or the last with weight; `below` gets
// the sum before it.
int64_t find_block(const double* blocks, int64_t count, double target, double* below) {
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

int64_t draw_whole(const Row& row, const double* blocks, double target) {
    double below = 0.0;
    const int64_t b = find_block(blocks, ceil_div(row.size, kBlock), target, &below);
    float e[kBlock];
    const int64_t first = b * kBlock, end = std::min(row.size, first + kBlock);
    for (int64_t i = first; i < end; i += kLanes) store(e + i - first, exp(row.at(i)));
    double sum = 0.0;
    int64_t last = first;
    for (int64_t i = first; i < end; ++i) {
        if (e[i - first] <= 0.0f) continue;
        last = i;
        sum += e[i - first];
        if (sum > target - below) break;
    }
    return last;
}

// -- selection

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
int64_t gather(const float* values, int64_t size, float floor, Ranked* out) {
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
float floor_of_best(const float* values, int64_t size, int64_t k) {
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
Ranked kth(Ranked* candidates, int64_t count, int64_t k) {
    std::nth_element(candidates, candidates + k - 1, candidates + count, is_ahead);
    return candidates[k - 1];
}

// Leave the candidates of one bin of values: that in which the mass reaches the target. Bins are
// even in y from the best candidate to the worst, so they keep the order. Returns how many are
// left; `before` gets the mass of the bins above.
int64_t narrow_to_bin(Ranked* candidates, int64_t count, const float* e, double target,
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

// The last in rank before which less than `target` has been gathered. Reorders.
// Quickselect by mass: each round leaves one side of a pivot, whose mass is known, behind.
Ranked border_of_mass(Ranked* candidates, int64_t count, const float* e, double target) {
    double before = 0.0;
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
int64_t keep_to(Ranked* kept, int64_t count, Ranked border) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
        const bool stays = !is_ahead(border, kept[i]);
        kept[n] = kept[i];
        n += stays;
    }
    return n;
}

// Σe of some ids in ascending order: the order of additions of the whole row, zeros left out.
double sum_kept(const Ranked* kept, int64_t count, const float* e, double* blocks, int64_t size) {
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

int64_t draw_kept(const Ranked* kept, int64_t count, const float* e, const double* blocks,
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

// -- a whole row

// The `count` best in rank, best first, at the front of `candidates`.
void rank(Ranked* candidates, int64_t size, int64_t count) {
    if (count < size) std::nth_element(candidates, candidates + count - 1, candidates + size, is_ahead);
    std::sort(candidates, candidates + count, is_ahead);
}

class Sampler {
public:
    Sampler(const Rule& rule, const float* raw, const float* z, const int64_t* banned, int64_t size)
        : rule_(rule), raw_(raw), banned_(banned), size_(size),
          padded_(round_up(size, kLanes)),
          row_(make_row(z, size, rule.temperature)) {}

    void run(Draw& draw, int32_t* kept_ids, int64_t* top_ids, double* top_lps) {
        draw.is_lost = !std::isfinite(row_.top);
        if (draw.is_lost) return;
        const bool cuts = rule_.banned_count > 0 || rule_.top_k > 0 || rule_.top_p < 1.0 ||
                          rule_.min_p > 0.0f || rule_.temperature == 0.0f;
        double* blocks = scratch<double, Blocks>(ceil_div(size_, kBlock));
        if (cuts) {
            y_ = scratch<float, Ys>(padded_ + kBlock);
            e_ = scratch<float, Es>(padded_ + kBlock);
        }
        double products = 0.0;
        const double total =
            sum_row(row_, blocks, rule_.wants_entropy ? &products : nullptr, y_, e_);
        log_total_ = std::log(total);
        if (rule_.wants_entropy) draw.entropy = log_total_ - products / total;
        kept_count_ = size_;
        log_mass_ = 0.0;
        if (cuts) {
            cut(draw, blocks, total);
        } else {
            draw.token = draw_whole(row_, blocks, rule_.u * total);
        }
        draw.kept = kept_count_;
        draw.mass = std::exp(log_mass_);
        draw.lp_temp = logprob(row_, draw.token, log_total_);
        draw.lp_sampled = sampled(draw.token);
        if (kept_ids != nullptr && kept_count_ < size_)
            for (int64_t i = 0; i < kept_count_; ++i) kept_ids[i] = kept_[i].id;
        if (rule_.wants_raw || (rule_.num_top > 0 && rule_.top_of == 0)) measure_raw();
        if (rule_.wants_raw) draw.lp_raw = logprob(raw_row_, draw.token, raw_log_total_);
        draw.tops = rule_.num_top > 0 ? tops(top_ids, top_lps) : 0;
    }

private:
    double sampled(int64_t id) const {
        if (kept_count_ == 1) return 0.0;
        return std::min(logprob(row_, id, log_total_) - log_mass_, 0.0);
    }

    void measure_raw() {
        raw_row_ = make_row(raw_, size_, 1.0f);
        const bool is_same = rule_.changed == nullptr && row_.temperature == 1.0f;
        raw_log_total_ = is_same ? log_total_ : log_sum(raw_row_);
    }

    // Bans, then top-k, top-p, min-p on what is left; then the draw.
    void cut(Draw& draw, double* blocks, double total) {
        double whole = total, top = 0.0;
        int64_t alive = ban(&whole, &top);
        if (rule_.temperature == 0.0f) {
            int64_t id = 0;
            while (y_[id] != static_cast<float>(top)) ++id;
            kept_ = scratch<Ranked, Candidates>(1);
            kept_[0] = {y_[id], static_cast<int32_t>(id)};
            kept_count_ = 1;
        } else {
            select(alive, whole);
        }
        if (kept_count_ == size_) {
            // nothing was cut: the sums of the whole row hold
            draw.token = draw_whole(row_, blocks, rule_.u * total);
            return;
        }
        const double mass = sum_kept(kept_, kept_count_, e_, blocks, size_);
        draw.token = draw_kept(kept_, kept_count_, e_, blocks, size_, rule_.u * mass);
        log_mass_ = std::min(top - log_total_ + std::log(mass), 0.0);
    }

    // Set y of the banned to -inf; e becomes relative to the best that is left. Returns how many
    // are left; if none is, the bans are void.
    int64_t ban(double* whole, double* top) {
        if (rule_.banned_count == 0) return size_;
        int64_t alive = size_;
        for (int64_t i = 0; i < rule_.banned_count; ++i) {
            float& y = y_[banned_[rule_.banned_from + i]];
            alive -= y > -INFINITY;
            y = -INFINITY;
        }
        if (alive == 0) {
            for (int64_t i = 0; i < size_; i += kLanes) store(y_ + i, row_.at(i));
            return size_;
        }
        Vec best = set(-INFINITY);
        for (int64_t i = 0; i < padded_; i += kLanes) best = max(best, load(y_ + i));
        const float left = max_lanes(best);
        *top = left;
        Sum sum;
        for (int64_t i = 0; i < padded_; i += kLanes) {
            const Vec e = exp(load(y_ + i) - set(left));
            store(e_ + i, e);
            sum.add(e);
        }
        *whole = sum.total();
        return alive;
    }

    void select(int64_t alive, double whole) {
        const bool has_top_k = rule_.top_k > 0 && rule_.top_k < alive;
        if (alive == size_ && !has_top_k && rule_.top_p >= 1.0 && rule_.min_p <= 0.0f) return;
        kept_ = scratch<Ranked, Candidates>(2 * size_);
        Ranked* spare = kept_ + size_;
        if (has_top_k) {
            kept_count_ = gather(y_, size_, floor_of_best(y_, size_, rule_.top_k), kept_);
            std::copy(kept_, kept_ + kept_count_, spare);
            kept_count_ = keep_to(kept_, kept_count_, kth(spare, kept_count_, rule_.top_k));
            if (rule_.top_p < 1.0) {
                double lanes[kLanes] = {};
                for (int64_t i = 0; i < kept_count_; ++i)
                    lanes[kept_[i].id % kLanes] += e_[kept_[i].id];
                whole = Sum::fold(lanes);
            }
        } else if (rule_.top_p < 1.0) {
            // ids below this share sum to less than top-p drops, even if all of them were
            const double share = 0.5 * (1.0 - rule_.top_p) * whole / static_cast<double>(size_);
            kept_count_ = gather_by_share(static_cast<float>(share));
        } else {
            kept_count_ = gather_by_share(rule_.min_p);
        }
        if (rule_.top_p < 1.0) {
            std::copy(kept_, kept_ + kept_count_, spare);
            const Ranked border = border_of_mass(spare, kept_count_, e_, rule_.top_p * whole);
            kept_count_ = keep_to(kept_, kept_count_, border);
        }
        if (rule_.min_p > 0.0f) {
            int64_t n = 0;
            for (int64_t i = 0; i < kept_count_; ++i) {
                kept_[n] = kept_[i];
                n += e_[kept_[i].id] >= rule_.min_p;
            }
            kept_count_ = n;
        }
    }

    // ids that are not banned, with e of at least `share`, ascending
    int64_t gather_by_share(float share) {
        int64_t count = gather(e_, size_, share, kept_), n = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float y = y_[kept_[i].id];
            if (y > -INFINITY) kept_[n++] = {y, kept_[i].id};
        }
        return n;
    }

    // The likeliest ids and their logprobs, best first.
    int64_t tops(int64_t* ids, double* lps) {
        const bool of_kept = rule_.top_of == 2 && kept_count_ < size_;
        const int64_t limit = of_kept ? kept_count_ : size_;
        const int64_t count = std::min(rule_.num_top, limit);
        Ranked* list = kept_;
        int64_t found = kept_count_;
        const Row& row = rule_.top_of == 0 ? raw_row_ : row_;
        if (!of_kept) {
            float* values = scratch<float, Ys>(padded_ + kBlock);
            for (int64_t i = 0; i < padded_; i += kLanes) store(values + i, row.at(i));
            list = scratch<Ranked, Candidates>(2 * size_);
            found = gather(values, size_, floor_of_best(values, size_, count), list);
        }
        rank(list, found, count);
        for (int64_t i = 0; i < count; ++i) {
            ids[i] = list[i].id;
            lps[i] = rule_.top_of == 0   ? logprob(row, ids[i], raw_log_total_)
                     : rule_.top_of == 1 ? logprob(row, ids[i], log_total_)
                                         : sampled(ids[i]);
        }
        return count;
    }

    const Rule& rule_;
    const float* raw_;
    const int64_t* banned_;
    const int64_t size_, padded_;
    const Row row_;
    float* y_ = nullptr;
    float* e_ = nullptr;
    Ranked* kept_ = nullptr;
    int64_t kept_count_ = 0;
    double log_total_ = 0.0, log_mass_ = 0.0;
    Row raw_row_{};
    double raw_log_total_ = 0.0;
};

}  // namespace

// One draw per rule.
//
//     logits   (.., size) float32 as the head gave them; each rule names its row
//     banned   ids, each rule names its part
//     kept     (.., size) int32: kept ids of the rules that ask; tops (rules, most_tops)
EVERSTEP_API void everstep_sample(const float* logits, int64_t size, const void* rules,
                                  int64_t count, const int64_t* banned, void* draws, int32_t* kept,
                                  int64_t* top_ids, double* top_lps, int64_t most_tops,
                                  int32_t threads) {
    parallel(count, threads, [&](int64_t r) {
        const Rule& rule = static_cast<const Rule*>(rules)[r];
        const float* raw = logits + rule.row * size;
        Sampler sampler(rule, raw, rule.changed ? rule.changed : raw, banned, size);
        sampler.run(static_cast<Draw*>(draws)[r],
                    rule.kept_row < 0 ? nullptr : kept + rule.kept_row * size,
                    top_ids + r * most_tops, top_lps + r * most_tops);
    });
}

// One uniform number in [0, 1) per (seed, position), 53 bits (kernels/philox.py has the definition).
EVERSTEP_API void everstep_uniforms(const std::uint64_t* seeds, const std::uint64_t* positions,
                                    int64_t count, double* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = uniform(seeds[i], positions[i]);
}

// z (rows, size) float32 → out (rows, size): each id's lp_raw, the very numbers that a draw reports.
EVERSTEP_API void everstep_log_softmax(const float* z, int64_t rows, int64_t size, float* out,
                                       int32_t threads) {
    parallel(rows, threads, [&](int64_t r) {
        const Row row = make_row(z + r * size, size, 1.0f);
        const double log_total = log_sum(row);
        for (int64_t i = 0; i < size; ++i)
            out[r * size + i] = static_cast<float>(logprob(row, i, log_total));
    });
}
