"""The forward pass of `BailingMoeV2ForCausalLM` over one step's packed tokens (MODEL.md §3).

It knows weights, a KV store and an attention plan, and no scheduler: prefill, decode,
resumption and teacher forcing are the same call.

Shapes: T packed tokens, H hidden, D head size, V vocabulary, K experts per token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels import (
    Plan,
    QuerySpan,
    add,
    add_rms_norm,
    attention,
    experts,
    gate_up,
    linear,
    place_qkv,
    plan_attention,
    project,
    rms_norm,
    route,
)
from .ring_config import RingConfig
from .weights import Layer, Mlp, Moe, Weights

Trace = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class KVStore:
    """Keys (after norm and rotary) and values of every layer: (slots, G, D) T each.

    Slot 0's block is never written: attention reads it where a sequence has no token.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def empty(cls, config: RingConfig, num_slots: int, dtype: torch.dtype) -> "KVStore":
        shape = (num_slots, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            tuple(_untouched_zeros(shape, dtype) for _ in layers),
            tuple(_untouched_zeros(shape, dtype) for _ in layers),
        )


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system provides when they are first written (`torch.zeros` writes
    them all): a large pool costs memory only as far as it is used."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class Routes:
    """Experts of a MoE layer: ids (T, K) int64 and weights (T, K) float32 in slot order."""

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """Hidden states after the last norm (T, H) T, and the routes of each MoE layer."""

    hidden: torch.Tensor
    routes: tuple[Routes, ...]


def forward(
    weights: Weights,
    ids: torch.Tensor,
    kv: KVStore,
    plan: Plan,
    tables: tuple[torch.Tensor, torch.Tensor],
    *,
    forced: list[torch.Tensor] | None = None,
    trace: Trace | None = None,
) -> Forward:
    """Run a step; writes the tokens' keys and values into `kv`.

    ids     (T,) int64
    tables  cosines and sines by position (engine/rotary.py)
    forced  per MoE layer (T, K) int64: route to these experts (routing replay)
    trace   called with (layer, residual stream (T, H)) after each layer
    """
    x = weights.embedding[ids]
    routes: list[Routes] = []
    for index, layer in enumerate(weights.layers):
        replay = None if forced is None or len(routes) >= len(forced) else forced[len(routes)]
        x, chosen = run_layer(weights.config, layer, x, tables, kv, index, plan, replay)
        if chosen is not None:
            routes.append(chosen)
        if trace is not None:
            trace(index, x)
    return Forward(rms_norm(x, weights.norm, weights.config.rms_norm_eps), tuple(routes))


def run_layer(
    config: RingConfig,
    layer: Layer,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    kv: KVStore,
    index: int,
    plan: Plan,
    replay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routes | None]:
    """One decoder layer on the residual stream x (T, H); the routes if it is a MoE layer."""
    eps = config.rms_norm_eps
    y = rms_norm(x, layer.input_norm, eps)
    out = self_attention(config, layer, y, tables, kv.keys[index], kv.values[index], plan)
    x, y = add_rms_norm(x, out, layer.post_norm, eps)
    if isinstance(layer.ffn, Mlp):
        return add(x, mlp(y, layer.ffn)), None
    out, routes = moe(config, layer.ffn, y, replay)
    return add(x, out), routes


def self_attention(
    config: RingConfig,
    layer: Layer,
    y: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: Plan,
) -> torch.Tensor:
    """(T, H) → (T, H). QK norm before rotary; keys are stored after both (MODEL.md §3.2)."""
    heads, d = config.num_attention_heads, config.head_dim
    norms = None
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = (layer.query_norm, layer.key_norm)
    q = place_qkv(
        linear(y, layer.qkv),
        plan,
        keys,
        values,
        heads=heads,
        tables=tables,
        norms=norms,
        eps=config.rms_norm_eps,
    )
    out = attention(q, keys, values, plan, scale=d**-0.5)
    return linear(out.reshape(-1, heads * d), layer.dense)


def mlp(y: torch.Tensor, weights: Mlp) -> torch.Tensor:
    """(T, H) → (T, H)."""
    return linear(gate_up(y, weights.gate_up), weights.down)


def moe(
    config: RingConfig, weights: Moe, y: torch.Tensor, replay: torch.Tensor | None
) -> tuple[torch.Tensor, Routes]:
    """(T, H) → (T, H): routed experts, plus the shared one unweighted (MODEL.md §3.4, §3.5)."""
    ids, topk_weights = route(
        y,
        weights.router,
        weights.bias,
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        scaling=config.routed_scaling_factor,
        forced_ids=replay,
    )
    out = experts(y, ids, topk_weights, weights.experts)
    if weights.shared is not None:
        out = add(out, mlp(y, weights.shared))
    return out, Routes(ids, topk_weights)


def logits(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """(R, H) T → (R, V) float32: the float32 sums are kept, not rounded to T (MODEL.md §3.1)."""
    return project(hidden, weights.head)


def plan_step(config: RingConfig, spans: Sequence[QuerySpan], block_size: int) -> Plan:
    """What the attention of every layer shares in a step (`kernels.plan_attention`)."""
    return plan_attention(
        spans,
        block_size=block_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )
