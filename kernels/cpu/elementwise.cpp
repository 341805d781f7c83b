// What acts on one row at a time: RMSNorm, rotary, the step from qkv to the cache, SwiGLU, adds.
//
// Casts are those of MODEL.md §3.1-3.2, and of the torch level. The only sum is the norm's:
// element i goes to lane i % 64, lanes are chains over ascending i, and 64 lanes end in a tree.
// Threads share out rows, never a row.

#include "mathfun.h"
#include "operations.h"

using namespace everstep;
using std::int64_t;

namespace {

struct Head;  // names the scratch memory of one head

// below this a second thread costs more than it does
constexpr int64_t kAlone = 32 * 1024;

// function(row) for every row, each thread a contiguous share
template <class Function>
void each_row(int64_t rows, int64_t width, int threads, const Function& function) {
    if (rows * width < kAlone) threads = 1;
    const int64_t shares = std::min<int64_t>(rows, threads);
    parallel(shares, threads, [&](int64_t share) {
        for (int64_t r = rows * share / shares; r < rows * (share + 1) / shares; ++r) function(r);
    });
}

template <class T>
float sum_of_squares(const T* x, int64_t width) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes)
        for (int j = 0; j < 4; ++j) {
            const Vec y = load(x + c + j * kLanes);
            acc[j] = fma(y, y, acc[j]);
        }
    for (int j = 0; c < width; c += kLanes, ++j) {
        const Vec y = load_left(x + c, width - c);
        acc[j] = fma(y, y, acc[j]);
    }
    return sum_lanes((acc[0] + acc[2]) + (acc[1] + acc[3]));
}

// T(weight · T(x · rsqrt(mean(x²) + eps)))
template <class T>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* out) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const Vec scale = set(1.0f / std::sqrt(mean + eps));
    for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = width - c;
        const Vec y = round_to<T>(load_left(x + c, left) * scale);
        store_left(out + c, load_left(weight + c, left) * y, left);
    }
}

// Rotate the pairs (j, j + half). `rounds`: tables are T, and every product is rounded to T.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, int64_t dim, bool rounds,
            T* out) {
    for (int64_t j = 0; j < half; j += kLanes) {
        const int64_t left = half - j;
        const Vec c = load_left(cos + j, left), s = load_left(sin + j, left);
        const Vec a = load_left(x + j, left), b = load_left(x + half + j, left);
        Vec ac = a * c, bs = b * s, bc = b * c, as = a * s;
        if (rounds) {
            ac = round_to<T>(ac), bs = round_to<T>(bs);
            bc = round_to<T>(bc), as = round_to<T>(as);
        }
        store_left(out + j, ac - bs, left);
        store_left(out + half + j, bc + as, left);
    }
    if (out != x)
        std::memcpy(out + 2 * half, x + 2 * half, sizeof(T) * static_cast<size_t>(dim - 2 * half));
}

template <class T>
void rms_norm(const void* x, int64_t stride, const void* weight, void* out, int64_t rows,
              int64_t width, float eps, int threads) {
    each_row(rows, width, threads, [&](int64_t r) {
        norm_row((const T*)x + r * stride, (const T*)weight, width, eps, (T*)out + r * width);
    });
}

template <class T>
void add(const T* a, const T* b, int64_t width, T* out) {
    for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = width - c;
        store_left(out + c, load_left(a + c, left) + load_left(b + c, left), left);
    }
}

template <class T>
void add_rms_norm(const void* x, const void* y, const void* weight, void* sum, void* out,
                  int64_t rows, int64_t width, float eps, int threads) {
    each_row(rows, width, threads, [&](int64_t r) {
        T* total = (T*)sum + r * width;
        add((const T*)x + r * width, (const T*)y + r * width, width, total);
        norm_row(total, (const T*)weight, width, eps, (T*)out + r * width);
    });
}

template <class T>
void swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
            int64_t rows, int64_t width, int threads) {
    each_row(rows, 4 * width, threads, [&](int64_t r) {
        const T *a = (const T*)gate + r * gate_stride, *b = (const T*)up + r * up_stride;
        for (int64_t c = 0; c < width; c += kLanes) {
            const int64_t left = width - c;
            const Vec x = load_left(a + c, left);
            const Vec silu = round_to<T>(x * sigmoid(x));
            store_left((T*)out + r * width + c, silu * load_left(b + c, left), left);
        }
    });
}

struct Qkv {
    const void* qkv;
    int64_t stride, tokens, heads, kv_heads, dim;
    const void *q_weight, *k_weight;  // null: no QK norm
    float eps;
    const float *cos, *sin;  // (positions, half)
    int64_t half;
    bool rounds;
    const int64_t *positions, *slots;
    void *q, *k_cache, *v_cache;
    int64_t slot_stride;
};

template <class T>
void place_token(const Qkv& x, int64_t token) {
    const int64_t q_width = x.heads * x.dim, kv_width = x.kv_heads * x.dim;
    const T* row = (const T*)x.qkv + token * x.stride;
    const float *cos = x.cos + x.positions[token] * x.half,
                *sin = x.sin + x.positions[token] * x.half;
    T* normed = scratch<T, Head>(x.dim);
    auto head = [&](const T* from, const void* weight, T* to) {
        if (weight != nullptr) {
            norm_row(from, (const T*)weight, x.dim, x.eps, normed);
            from = normed;
        }
        rotate(from, cos, sin, x.half, x.dim, x.rounds, to);
    };
    T* q = (T*)x.q + token * q_width;
    for (int64_t c = 0; c < q_width; c += x.dim) head(row + c, x.q_weight, q + c);
    const int64_t slot = x.slots[token] * x.slot_stride;
    T* k = (T*)x.k_cache + slot;
    for (int64_t c = 0; c < kv_width; c += x.dim) head(row + q_width + c, x.k_weight, k + c);
    std::memcpy((T*)x.v_cache + slot, row + q_width + kv_width, sizeof(T) * (size_t)kv_width);
}

}  // namespace

// x (rows, width) T, rows `stride` elements apart → out (rows, width) T
EVERSTEP_API void everstep_rms_norm(std::int32_t is_bf16, const void* x, int64_t stride,
                                    const void* weight, void* out, int64_t rows, int64_t width,
                                    float eps, std::int32_t threads) {
    (is_bf16 ? rms_norm<bf16> : rms_norm<float>)(x, stride, weight, out, rows, width, eps, threads);
}

// sum = T(x + y), out = rms_norm(sum); sum may be x
EVERSTEP_API void everstep_add_rms_norm(std::int32_t is_bf16, const void* x, const void* y,
                                        const void* weight, void* sum, void* out, int64_t rows,
                                        int64_t width, float eps, std::int32_t threads) {
    (is_bf16 ? add_rms_norm<bf16> : add_rms_norm<float>)(x, y, weight, sum, out, rows, width, eps,
                                                         threads);
}

// out = T(x + y) over count elements; out may be x
EVERSTEP_API void everstep_add(std::int32_t is_bf16, const void* x, const void* y, void* out,
                               int64_t rows, int64_t width, std::int32_t threads) {
    each_row(rows, width, threads, [&](int64_t r) {
        if (is_bf16)
            add((const bf16*)x + r * width, (const bf16*)y + r * width, width,
                (bf16*)out + r * width);
        else
            add((const float*)x + r * width, (const float*)y + r * width, width,
                (float*)out + r * width);
    });
}

// out = T(T(silu(gate)) · up)
EVERSTEP_API void everstep_swiglu(std::int32_t is_bf16, const void* gate, int64_t gate_stride,
                                  const void* up, int64_t up_stride, void* out, int64_t rows,
                                  int64_t width, std::int32_t threads) {
    (is_bf16 ? swiglu<bf16> : swiglu<float>)(gate, gate_stride, up, up_stride, out, rows, width,
                                             threads);
}

// x (tokens, heads, dim) T contiguous → out; token t uses row t of cos and sin (tokens, half)
EVERSTEP_API void everstep_rope(std::int32_t is_bf16, const void* x, const float* cos,
                                const float* sin, void* out, int64_t tokens, int64_t heads,
                                int64_t dim, int64_t half, std::int32_t rounds,
                                std::int32_t threads) {
    each_row(tokens, heads * dim, threads, [&](int64_t t) {
        for (int64_t h = t * heads; h < (t + 1) * heads; ++h) {
            if (is_bf16)
                rotate((const bf16*)x + h * dim, cos + t * half, sin + t * half, half, dim,
                       rounds != 0, (bf16*)out + h * dim);
            else
                rotate((const float*)x + h * dim, cos + t * half, sin + t * half, half, dim,
                       rounds != 0, (float*)out + h * dim);
        }
    });
}

// From a token's row of qkv to its query (tokens, heads, dim) and its slot of the caches:
// QK norm where weights are given, rotary by its absolute position, then the stores.
EVERSTEP_API void everstep_place_qkv(
    std::int32_t is_bf16, const void* qkv, int64_t stride, int64_t tokens, int64_t heads,
    int64_t kv_heads, int64_t dim, const void* q_weight, const void* k_weight, float eps,
    const float* cos, const float* sin, int64_t half, std::int32_t rounds,
    const int64_t* positions, const int64_t* slots, void* q, void* k_cache, void* v_cache,
    int64_t slot_stride, std::int32_t threads) {
    const Qkv x{qkv,  stride, tokens, heads,       kv_heads,  dim,   q_weight, k_weight, eps,
                cos,  sin,    half,   rounds != 0, positions, slots, q,        k_cache,  v_cache,
                slot_stride};
    each_row(tokens, (heads + 2 * kv_heads) * dim, threads, [&](int64_t token) {
        if (is_bf16)
            place_token<bf16>(x, token);
        else
            place_token<float>(x, token);
    });
}
