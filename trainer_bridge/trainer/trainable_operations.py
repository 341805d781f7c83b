"""The operations of a layer in plain torch, for autograd: the definition's casts, any device.

Bits are those of torch's own products, which see the batch; logprobs are the engine's to rounding.
`exact_operations.py` has the engine's bits.

Legend: T packed rows, H hidden, D head size, G kv heads, E experts, K experts per token. Wide is
float32, or float64 in a float64 model.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch
from torch.nn import functional

from ...engine.checkpoint.ring_config import RingConfig
from ...engine.model.model import Norms
from ...kernels import ExpertBank, GateUp, Linear, Pair, Weight
from ...kernels.rope import apply_rope
from ...kernels.router import choose
from .packing import PackedBatch

Tables = tuple[torch.Tensor, torch.Tensor]
Experts = Callable[[int, torch.Tensor], torch.Tensor]


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _is_slow(x: torch.Tensor) -> bool:
    """bf16 on a CPU: few have units for it, and float32 sums rounded once are what it means."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """T(weight · T(y · rsqrt(mean(y²) + eps))) over the last dimension."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """T(x Wᵀ + b)."""
    if _is_slow(x):
        wide_bias = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide_bias).to(x.dtype)
    return functional.linear(x, weight, bias)


def gate_up(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """T(T(silu(T(x Gᵀ))) · T(x Uᵀ))."""
    opened = functional.silu(wide(linear(x, gate))).to(x.dtype)
    return opened * linear(x, up)


def attend(
    qkv: torch.Tensor, norms: Norms, config: RingConfig, batch: PackedBatch, tables: Tables
) -> torch.Tensor:
    """QK norm, rotary and causal attention inside each sequence: (T, (heads + 2G)·D) →
    (T, heads·D).

    Sequences of like length are padded to one; causal attention never looks at what is behind.
    """
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = torch.split(qkv.view(-1, heads + 2 * kv_heads, d), [heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (rms_norm(x, w, config.rms_norm_eps) for x, w in zip((q, k), norms, strict=True))
    cos, sin = (table[batch.positions] for table in tables)
    q, k, dtype = apply_rope(q, cos, sin), apply_rope(k, cos, sin), qkv.dtype
    if _is_slow(qkv):
        q, k, v = q.float(), k.float(), v.float()
    outs = []
    for bucket in batch.buckets:
        flat, shape = bucket.rows.reshape(-1), bucket.rows.shape
        own_q, own_k, own_v = (
            x.index_select(0, flat).view(*shape, -1, d).transpose(1, 2) for x in (q, k, v)
        )
        out = functional.scaled_dot_product_attention(
            own_q, own_k, own_v, is_causal=True, enable_gqa=True
        )
        outs.append(out.transpose(1, 2).reshape(-1, heads * d).index_select(0, bucket.real))
    return torch.cat(outs).index_select(0, batch.places).to(dtype)


def route(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    replay: torch.Tensor | None,
    config: RingConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (T, K) int64, of `replay` if given, and weights (T, K) wide, which have the gradient."""
    logits = functional.linear(wide(x), wide(gate))
    ids = replay
    if ids is None:
        with torch.no_grad():
            ids, _ = choose(
                logits,
                bias,
                top_k=config.num_experts_per_tok,
                n_group=config.n_group,
                topk_group=config.topk_group,
                scaling=config.routed_scaling_factor,
            )
    weights = torch.sigmoid(logits).gather(1, ids)
    if config.num_experts_per_tok > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


def experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, num_experts: int, one: Experts
) -> torch.Tensor:
    """T(Σ_slot wide(one(ids[slot], x)) · weights[slot]): (T, H) T → (T, H) T.

    one  (expert, rows (M, H) T) → (M, H) T; called for every expert, M = 0 included, so that
         each has a gradient on every rank
    """
    tokens, slots = ids.shape
    order = torch.sort(ids.reshape(-1), stable=True)
    counts = torch.bincount(order.values, minlength=num_experts).tolist()
    rows = torch.split(x.index_select(0, order.indices // slots), counts)
    outs = torch.cat([wide(one(expert, part)) for expert, part in enumerate(rows)])
    places = torch.empty_like(order.indices)
    places[order.indices] = torch.arange(len(places), device=places.device)
    weighted = outs.index_select(0, places).view(tokens, slots, -1) * weights.unsqueeze(-1)
    total = weighted[:, 0]
    for slot in range(1, slots):
        total = total + weighted[:, slot]
    return total.to(x.dtype)


class _Replayed(torch.autograd.Function):
    """The recorded value, with the gradient of one's own."""

    @staticmethod
    def forward(_: Any, own: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
        return recorded.to(own.dtype, copy=True)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def replayed(own: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """`recorded` in value, `own` in gradient."""
    out: torch.Tensor = _Replayed.apply(own, recorded)  # type: ignore[no-untyped-call]
    return out


class PlainOperations:
    """`engine.model.Operations` over the sequences of a batch."""

    def __init__(self, config: RingConfig, batch: PackedBatch, tables: Tables) -> None:
        self.config, self.batch, self.tables = config, batch, tables
        self.routing_weights: torch.Tensor | None = None

    def with_routing_weights(self, recorded: torch.Tensor) -> Self:
        """For one MoE layer: its routing weights (T, K) have these values, and their own gradient."""
        other = copy(self)
        other.routing_weights = recorded
        return other

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return total, rms_norm(total, weight, self.config.rms_norm_eps)

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        assert isinstance(weight, Weight)
        return linear(x, weight.data, weight.bias)

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        assert isinstance(weights, Pair)
        return gate_up(x, weights.gate.data, weights.up.data)

    def attend(self, index: int, qkv: torch.Tensor, norms: Norms) -> torch.Tensor:  # noqa: ARG002
        return attend(qkv, norms, self.config, self.batch, self.tables)

    def route(
        self, x: torch.Tensor, gate: Linear, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(gate, Weight)
        ids, weights = self._route(x, gate.data, bias, replay)
        if self.routing_weights is not None:
            weights = replayed(weights, self.routing_weights)
        return ids, weights

    def _route(
        self, x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return route(x, gate, bias, replay, self.config)

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
    ) -> torch.Tensor:
        def one(expert: int, rows: torch.Tensor) -> torch.Tensor:
            return self.linear(self.gate_up(rows, bank.gate_ups[expert]), bank.downs[expert])

        return experts(x, ids, weights, len(bank.gate_ups), one)
