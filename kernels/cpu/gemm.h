// Linear layers: y = x wᵀ. Other kernels (experts, the head) call these functions; Python calls
// the C functions at the end of gemm.cpp.
#pragma once

#include "common.h"

namespace everstep {

enum Format : std::int32_t { kFloat32 = 0, kBf16 = 1, kFp8Block = 2, kFp8Channel = 3 };
enum Output : std::int32_t { kRounded = 0, kFloat = 1 };

// A weight (N, K) as the kernels read it. kernels/packed.py fills the same struct.
//
// Sixteen rows of it are a tile: what one vector of outputs needs, in the order in which it is
// read. Rows beyond N are zeros; of columns beyond K only the padding is.
//
//   float32  data[tile][k][16 n]
//   bf16     data[tile][k/2][16 n][2 k]     k padded to a multiple of 32: AMX's tile order
//   fp8      data[tile][k/2][16 n][2 k]     codes; k padded likewise
//            scale[tile][ceil(K/128)]       block      each 256 times its value: the codes are
//            scale[tile][16 n]              channel    read as float16, 1/256 of theirs
//
// A pair (gate and up of one MLP) alternates their tiles: gate 0, up 0, gate 1, up 1, ...
struct Packed {
    const void* data;
    const float* scale;
    const float* bias;  // as many floats as padded rows, or null
    std::int64_t n;     // outputs; of a pair: of one of the two
    std::int64_t k;
    std::int32_t format;
    std::int32_t is_pair;

    std::int64_t num_tiles() const { return ceil_div(n, kLanes) * (is_pair ? 2 : 1); }
    std::int64_t padded_k() const { return format == kFloat32 ? k : round_up(k, 32); }
    std::int64_t tile_bytes() const {
        return padded_k() * kLanes * (format == kFloat32 ? 4 : format == kBf16 ? 2 : 1);
    }
    std::int64_t scales_per_tile() const {
        return format == kFp8Block ? ceil_div(k, 128) : format == kFp8Channel ? kLanes : 0;
    }
};

// y = T(x wᵀ + bias), or its float32 sums; of a pair T(T(silu(T(gate))) · T(up)).
//
// x  (m, w.k)  T = float32 for kFloat32, else bf16; rows x_stride elements apart
// y  (m, w.n)  T, or float32 for kFloat; rows y_stride elements apart
//
// An output is one chain of additions over ascending k, in float32, whatever m, its place and
// the number of threads are.
void linear(const Packed& w, const void* x, std::int64_t m, std::int64_t x_stride, void* y,
            std::int64_t y_stride, Output output, int threads);

}  // namespace everstep
