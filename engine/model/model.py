"""The forward pass of `BailingMoeV2ForCausalLM` over one step's packed tokens (MODEL.md §3).

It knows weights, a KV store and an attention plan, and no scheduler: prefill, decode,
resumption and teacher forcing are the same call. A layer is written over `Operations`, so that the
trainer's model is this definition too (trainer_bridge/trainer/trainable.py).

Shapes: T packed tokens, H hidden, D head size, V vocabulary, K experts per token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ... import kernels
from ...kernels import ExpertBank, GateUp, Linear, Plan, QuerySpan
from ..checkpoint.ring_config import RingConfig
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


class Operations(Protocol):
    """What a decoder layer does to the packed tokens of one step; contracts as in `kernels`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(T, H) T → (T, H) T."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """T(x + y), (T, H) T."""

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s = T(x + y) and rms_norm(s), both (T, H) T."""

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        """T(x Wᵀ + b)."""

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        """T(T(silu(T(x Gᵀ))) · T(x Uᵀ)): (T, H) T → (T, I) T."""

    def attend(self, index: int, qkv: torch.Tensor, norms: "Norms") -> torch.Tensor:
        """QK norm, rotary and causal attention of layer `index`, each token over its sequence:
        (T, (heads + 2G)·D) T → (T, heads·D) T."""

    def route(
        self, x: torch.Tensor, gate: Linear, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of each token: ids (T, K) int64, those of `replay` if given, and weights (T, K)
        float32."""

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
    ) -> torch.Tensor:
        """T(Σ_slot float32(mlp_{ids[slot]}(x)) · weights[slot]): (T, H) T → (T, H) T."""


Norms = tuple[torch.Tensor, torch.Tensor] | None
"""Weights (D,) of the query norm and the key norm; None without QK norm."""


@dataclass(frozen=True)
class KernelOperations:
    """The engine's kernels over a KV store; writes the tokens' keys and values into it.

    tables  cosines and sines by position (engine/model/rotary.py)
    """

    config: RingConfig
    kv: KVStore
    plan: Plan
    tables: tuple[torch.Tensor, torch.Tensor]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, weight, self.config.rms_norm_eps)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kernels.add(x, y)

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.add_rms_norm(x, y, weight, self.config.rms_norm_eps)

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return kernels.linear(x, weight)

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        return kernels.gate_up(x, weights)

    def attend(self, index: int, qkv: torch.Tensor, norms: Norms) -> torch.Tensor:
        heads, d = self.config.num_attention_heads, self.config.head_dim
        keys, values = self.kv.keys[index], self.kv.values[index]
        q = kernels.place_qkv(
            qkv,
            self.plan,
            keys,
            values,
            heads=heads,
            tables=self.tables,
            norms=norms,
            eps=self.config.rms_norm_eps,
        )
        out = kernels.attention(q, keys, values, self.plan, scale=d**-0.5)
        return out.reshape(-1, heads * d)

    def route(
        self, x: torch.Tensor, gate: Linear, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        return kernels.route(
            x,
            gate,
            bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            scaling=config.routed_scaling_factor,
            forced_ids=replay,
        )

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
    ) -> torch.Tensor:
        return kernels.experts(x, ids, weights, bank)


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
    tables  cosines and sines by position (engine/model/rotary.py)
    forced  per MoE layer (T, K) int64: route to these experts (routing replay)
    trace   called with (layer, residual stream (T, H)) after each layer
    """
    ops = KernelOperations(weights.config, kv, plan, tables)
    x = weights.embedding[ids]
    routes: list[Routes] = []
    for index, layer in enumerate(weights.layers):
        replay = None if forced is None or len(routes) >= len(forced) else forced[len(routes)]
        x, chosen = run_layer(ops, layer, x, index, replay)
        if chosen is not None:
            routes.append(chosen)
        if trace is not None:
            trace(index, x)
    return Forward(ops.rms_norm(x, weights.norm), tuple(routes))


def run_layer(
    ops: Operations,
    layer: Layer,
    x: torch.Tensor,
    index: int,
    replay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routes | None]:
    """Decoder layer `index` on the residual stream x (T, H); the routes if it is a MoE layer."""
    y = ops.rms_norm(x, layer.input_norm)
    x, y = ops.add_rms_norm(x, self_attention(ops, layer, y, index), layer.post_norm)
    if isinstance(layer.ffn, Mlp):
        return ops.add(x, mlp(ops, layer.ffn, y)), None
    out, routes = moe(ops, layer.ffn, y, replay)
    return ops.add(x, out), routes


def self_attention(ops: Operations, layer: Layer, y: torch.Tensor, index: int) -> torch.Tensor:
    """(T, H) → (T, H). QK norm before rotary; keys are stored after both (MODEL.md §3.2)."""
    norms = None
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = (layer.query_norm, layer.key_norm)
    out = ops.attend(index, ops.linear(y, layer.qkv), norms)
    return ops.linear(out, layer.dense)


def mlp(ops: Operations, weights: Mlp, y: torch.Tensor) -> torch.Tensor:
    """(T, H) → (T, H)."""
    return ops.linear(ops.gate_up(y, weights.gate_up), weights.down)


def moe(
    ops: Operations, weights: Moe, y: torch.Tensor, replay: torch.Tensor | None
) -> tuple[torch.Tensor, Routes]:
    """(T, H) → (T, H): routed experts, plus the shared one unweighted (MODEL.md §3.4, §3.5)."""
    ids, topk_weights = ops.route(y, weights.router, weights.bias, replay)
    out = ops.experts(y, ids, topk_weights, weights.experts)
    if weights.shared is not None:
        out = ops.add(out, mlp(ops, weights.shared, y))
    return out, Routes(ids, topk_weights)


def logits(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """(R, H) T → (R, V) float32: the float32 sums are kept, not rounded to T (MODEL.md §3.1)."""
    return kernels.project(hidden, weights.head)


def plan_step(config: RingConfig, spans: Sequence[QuerySpan], block_size: int) -> Plan:
    """What the attention of every layer shares in a step (`kernels.plan_attention`)."""
    return kernels.plan_attention(
        spans,
        block_size=block_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )
