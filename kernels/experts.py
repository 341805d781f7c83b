"""Routed experts: rows sorted by expert, multiplied per segment, summed in slot order."""

from collections.abc import Sequence

import torch

from .activation import swiglu
from .gemm import Weight, linear


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
    tokens, slots = ids.shape
    order = torch.sort(ids.reshape(-1), stable=True)
    counts = torch.bincount(order.values, minlength=len(gate)).tolist()
    outputs = torch.empty(tokens * slots, x.shape[1], dtype=x.dtype)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            places = order.indices[start : start + count]
            rows = x.index_select(0, places // slots)
            hidden = swiglu(linear(rows, gate[expert]), linear(rows, up[expert]))
            outputs[places] = linear(hidden, down[expert])
            start += count
    outputs = outputs.view(tokens, slots, x.shape[1])
    total = outputs[:, 0].float() * weights[:, 0:1]
    for slot in range(1, slots):
        total = total + outputs[:, slot].float() * weights[:, slot : slot + 1]
    return total.to(x.dtype)
