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
// Cuts (selection.h): bans, top-k, top-p, min-p.

#include "selection.h"

using namespace everstep;
using std::int32_t;
using std::int64_t;
using std::uint32_t;

namespace {

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
            select(alive, whole, static_cast<float>(top), blocks);
        }
        if (kept_count_ == size_) {
            // nothing was cut: the sums of the whole row hold
            draw.token = draw_whole(row_, blocks, rule_.u * total);
            return;
        }
        const double mass = is_by_value_ ? mass_ : sum_kept(kept_, kept_count_, e_, blocks, size_);
        draw.token = is_by_value_ ? draw_cut(y_, e_, size_, cut_, blocks, rule_.u * mass)
                                  : draw_kept(kept_, kept_count_, e_, blocks, size_, rule_.u * mass);
        if (is_by_value_ && (rule_.kept_row >= 0 || rule_.num_top > 0))
            list_cut(y_, e_, size_, cut_, kept_);
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

    void select(int64_t alive, double whole, float top, double* blocks) {
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
        } else {
            // ids below this share sum to less than top-p drops, even if all of them were
            const double dropped = 0.5 * (1.0 - rule_.top_p) * whole / static_cast<double>(size_);
            const float share = rule_.top_p < 1.0 ? static_cast<float>(dropped) : rule_.min_p;
            if (count_at_least(e_, padded_, share) > size_ / kListedPart &&
                select_by_value(whole, top, share, blocks))
                return;
            kept_count_ = gather_by_share(share);
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

    // The same without a list; false, and nothing done, if the border is not found so.
    bool select_by_value(double whole, float top, float share, double* blocks) {
        Cut cut;
        cut.share = rule_.min_p;
        if (rule_.top_p < 1.0) {
            const float bottom = top + std::max(std::log(share), -80.0f);
            if (!find_border(y_, e_, padded_, top, bottom, rule_.top_p * whole, kept_, &cut.border))
                return false;
        }
        mass_ = sum_cut(y_, e_, size_, cut, blocks, &kept_count_);
        cut_ = cut;
        is_by_value_ = true;
        return true;
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
    bool is_by_value_ = false;  // then these, and kept_ is listed for who asks
    Cut cut_;
    double mass_ = 0.0;
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
