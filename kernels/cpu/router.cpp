// From a token's router logits to its experts and their weights (MODEL.md §3.4), all in float32.
//
// One token at a time, no sum but those over the K chosen slots (in slot order). Ties: the lower
// expert and the lower group win. A NaN score ranks above every number, so ids are always valid.

#include "mathfun.h"
#include "operations.h"

using namespace everstep;
using std::int64_t;

namespace {

struct Scores;  // names the scratch memory of one token
struct Groups;

constexpr int64_t kAlone = 16 * 1024;

// Insert (score, id) into the best `limit`, kept by score descending; equals stay in order.
// ids come ascending, so the lower id stays ahead. Returns how many there are now.
int64_t insert(float* scores, int64_t* ids, int64_t count, int64_t limit, float score, int64_t id) {
    if (count == limit && !(score > scores[count - 1])) return count;
    int64_t at = count < limit ? count : limit - 1;
    for (; at > 0 && score > scores[at - 1]; --at) {
        scores[at] = scores[at - 1];
        ids[at] = ids[at - 1];
    }
    scores[at] = score;
    ids[at] = id;
    return count < limit ? count + 1 : count;
}

struct Router {
    const float* bias;
    int64_t experts, top_k, groups, top_groups;
    float scaling;
};

// The best experts of the best groups, by biased score; a group counts by its two best.
void choose(const Router& router, const float* choice, int64_t* ids) {
    // room for the running best of both searches
    float* best = scratch<float, Groups>(router.top_k + router.groups);
    int64_t count = 0;
    if (router.groups <= 1) {
        for (int64_t e = 0; e < router.experts; ++e)
            count = insert(best, ids, count, router.top_k, choice[e], e);
        return;
    }
    const int64_t size = router.experts / router.groups;
    float* group_scores = best + router.top_k;
    for (int64_t g = 0; g < router.groups; ++g) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            second = choice[e] > first ? first : (choice[e] > second ? choice[e] : second);
            first = choice[e] > first ? choice[e] : first;
        }
        group_scores[g] = first + second;
    }
    // a group is kept if fewer than top_groups are ahead of it
    auto is_kept = [&](int64_t g) {
        int64_t ahead = 0;
        for (int64_t o = 0; o < router.groups; ++o)
            ahead += group_scores[o] > group_scores[g] || (group_scores[o] == group_scores[g] && o < g);
        return ahead < router.top_groups;
    };
    // experts outside take part with -inf, should the kept groups be too small
    for (int64_t g = 0; g < router.groups; ++g) {
        const bool kept = is_kept(g);
        for (int64_t e = g * size; e < (g + 1) * size; ++e)
            count = insert(best, ids, count, router.top_k, kept ? choice[e] : -INFINITY, e);
    }
}

void route_token(const Router& router, const float* logits, bool is_forced, int64_t* ids,
                 float* weights) {
    const int64_t padded = round_up(router.experts, kLanes);
    float* scores = scratch<float, Scores>(2 * padded);
    float* choice = scores + padded;
    for (int64_t e = 0; e < router.experts; e += kLanes) {
        const int64_t left = router.experts - e;
        const Vec p = sigmoid(load_left(logits + e, left));
        store(scores + e, p);
        store(choice + e, p + load_left(router.bias + e, left));
    }
    if (!is_forced) {
        for (int64_t e = 0; e < router.experts; ++e)
            if (choice[e] != choice[e]) choice[e] = INFINITY;
        choose(router, choice, ids);
    }
    for (int64_t k = 0; k < router.top_k; ++k) weights[k] = scores[ids[k]];
    if (router.top_k > 1) {
        float total = weights[0];
        for (int64_t k = 1; k < router.top_k; ++k) total += weights[k];
        total += 1e-20f;
        for (int64_t k = 0; k < router.top_k; ++k) weights[k] /= total;
    }
    for (int64_t k = 0; k < router.top_k; ++k) weights[k] *= router.scaling;
}

}  // namespace

// logits (tokens, experts) float32, rows `stride` apart → ids, weights (tokens, top_k).
// is_forced: ids are given, and only weighed.
EVERSTEP_API void everstep_route(const float* logits, int64_t stride, const float* bias,
                                 int64_t tokens, int64_t experts, int64_t top_k, int64_t groups,
                                 int64_t top_groups, float scaling, std::int32_t is_forced,
                                 int64_t* ids, float* weights, std::int32_t threads) {
    const Router router{bias, experts, top_k, groups, top_groups, scaling};
    const int64_t shares = tokens * experts < kAlone ? 1 : std::min<int64_t>(tokens, threads);
    parallel(shares, threads, [&](int64_t share) {
        for (int64_t t = tokens * share / shares; t < tokens * (share + 1) / shares; ++t)
            route_token(router, logits + t * stride, is_forced != 0, ids + t * top_k,
                        weights + t * top_k);
    });
}
