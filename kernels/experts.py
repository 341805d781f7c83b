"""Routed experts: rows sorted by expert, multiplied per segment, summed in slot order."""

from collections.abc import Callable, Sequence

import torch

from .activation import sigmoid, swiglu
from .gemm import Weight, linear, linear_float


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Sequence[Weight],
    up: Sequence[Weight],
    down: Sequence[Weight],
) -> torch.Tensor:
    """T(Σ_slot float32(mlp_{ids[slot]}(x)) · weights[slot]), slots in order (MODEL.md §3.5).

    x        (T, H) T
    ids      (T, K) int64, weights (T, K) float32
    gate, up E × (I, H); down E × (H, I)
    returns  (T, H) T; each expert's output is rounded to T before it is weighted
    """

    def one(expert: int, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if gate[expert].activations != "none":
            return expert_w8a8(rows, gate[expert], up[expert], down[expert], weight)
        hidden = swiglu(linear(rows, gate[expert]), linear(rows, up[expert]))
        return linear(hidden, down[expert]).float() * weight

    return sum_slots(x, ids, weights, len(gate), one)


def sum_slots(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    one: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Rows sorted by expert, each segment through `one`, then the slots in order.

    one      (expert, rows (M, H) T, routing weights (M, 1)) → weighted outputs (M, H) float32
    returns  (T, H) T
    """
    tokens, slots = ids.shape
    order = torch.sort(ids.reshape(-1), stable=True)
    counts = torch.bincount(order.values, minlength=num_experts).tolist()
    flat_weights = weights.reshape(-1, 1)
    weighted = torch.empty(tokens * slots, x.shape[1], dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            places = order.indices[start : start + count]
            rows = x.index_select(0, places // slots)
            weighted[places] = one(expert, rows, flat_weights[places])
            start += count
    weighted = weighted.view(tokens, slots, x.shape[1])
    total = weighted[:, 0]
    for slot in range(1, slots):
        total = total + weighted[:, slot]
    return total.to(x.dtype)


def expert_w8a8(
    x: torch.Tensor, gate: Weight, up: Weight, down: Weight, weight: torch.Tensor
) -> torch.Tensor:
    """One expert's rows times their routing weights (M, 1), float32.

    Rounds where FP8 serving does (MODEL.md §2.3): SwiGLU once, and the weighted output once.
    """
    wide = linear(x, gate).float()
    hidden = (wide * sigmoid(wide) * linear(x, up).float()).to(x.dtype)
    return (linear_float(hidden, down) * weight).to(x.dtype).float()
