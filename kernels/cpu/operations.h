// The C functions that one kernel file calls in another. Each file that defines one includes this,
// so that the compiler compares; what they do stands with their definitions.
#pragma once

#include "gemm.h"

EVERSTEP_API void everstep_rms_norm(std::int32_t is_bf16, const void* x, std::int64_t stride,
                                    const void* weight, void* out, std::int64_t rows,
                                    std::int64_t width, float eps, std::int32_t threads);

EVERSTEP_API void everstep_add_rms_norm(std::int32_t is_bf16, const void* x, const void* y,
                                        const void* weight, void* sum, void* out,
                                        std::int64_t rows, std::int64_t width, float eps,
                                        std::int32_t threads);

EVERSTEP_API void everstep_add(std::int32_t is_bf16, const void* x, const void* y, void* out,
                               std::int64_t rows, std::int64_t width, std::int32_t threads);

EVERSTEP_API void everstep_place_qkv(
    std::int32_t is_bf16, const void* qkv, std::int64_t stride, std::int64_t tokens,
    std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, const void* q_weight,
    const void* k_weight, float eps, const float* cos, const float* sin, std::int64_t half,
    std::int32_t rounds, const std::int64_t* positions, const std::int64_t* slots, void* q,
    void* k_cache, void* v_cache, std::int64_t slot_stride, std::int32_t threads);

EVERSTEP_API void everstep_attention(
    std::int32_t is_bf16, const void* q, const void* k_cache, const void* v_cache, void* out,
    std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, std::int64_t q_stride,
    std::int64_t slot_stride, std::int64_t count, const std::int64_t* first_row,
    const std::int64_t* start, const std::int64_t* length, const std::int64_t* table,
    const std::int32_t* blocks, std::int64_t block_size, float scale, std::int32_t threads);

EVERSTEP_API void everstep_route(const float* logits, std::int64_t stride, const float* bias,
                                 std::int64_t tokens, std::int64_t experts, std::int64_t top_k,
                                 std::int64_t groups, std::int64_t top_groups, float scaling,
                                 std::int32_t is_forced, std::int64_t* ids, float* weights,
                                 std::int32_t threads);

EVERSTEP_API void everstep_experts(std::int32_t is_bf16, const void* x, std::int64_t x_stride,
                                   const std::int64_t* ids, const float* weights,
                                   std::int64_t tokens, std::int64_t slots,
                                   std::int64_t num_experts,
                                   const everstep::Packed* const* gate_ups,
                                   const everstep::Packed* const* downs, void* out,
                                   std::int32_t threads);
