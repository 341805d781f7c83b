"""Logprobs of given tokens from hidden states, with the head in pieces: [rows, vocabulary] never
exists whole, neither forward nor backward.

Shapes: R scored rows, H hidden, V vocabulary. Wide is float32, or float64 in a float64 model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .packing import KeptIds
from .trainable_operations import wide

# logits in memory at once: 64 MB in float32, and their gradient as much again
_CHUNK_ELEMENTS = 1 << 24

Project = Callable[[torch.Tensor], torch.Tensor]
"""(rows, H) T → (rows, V) wide: the head's sums are not rounded to T."""


class PlainHead:
    """The head in plain torch."""

    def project(self, weight: torch.Tensor) -> Project:
        """For a weight (V, H) T."""
        whole = wide(weight).t()
        return lambda hidden: wide(hidden) @ whole

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, V) → (rows, V)."""
        return torch.log_softmax(logits, dim=-1)


def target_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    kept: KeptIds | None,
    head: PlainHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob of each target, and the entropy of its tempered distribution.

    hidden        (R, H) T;  weight (V, H) T
    targets       (R,) int64
    temperatures  (R,) float32: logits are divided by them
    kept          renormalise over these ids (PAPER.md §1.5); None: over all
    returns       each (R,) wide; gradient flows through the logprobs alone
    """
    lp, entropy = _TargetLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperatures, kept, head
    )
    return lp, entropy


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperatures: torch.Tensor,
        kept: KeptIds | None,
        head: PlainHead,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden, weight, targets, temperatures)
        ctx.kept, ctx.head = kept, head
        found = wide(hidden).new_empty(targets.shape[0])
        entropies = torch.empty_like(found)
        project = head.project(weight)
        for start, end in _chunks(targets.shape[0], weight.shape[0]):
            logits = project(hidden[start:end]) / temperatures[start:end, None]
            lp = head.log_softmax(logits)
            own = lp.gather(1, targets[start:end, None])[:, 0]
            found[start:end] = own if kept is None else own - _log_mass(lp, kept, start, end)
            entropies[start:end] = -(lp.exp() * lp).nan_to_num_(nan=0.0).sum(-1)
        if kept is not None:
            found.clamp_(max=0.0)
        ctx.mark_non_differentiable(entropies)
        return found, entropies

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, temperatures = ctx.saved_tensors
        project, whole = ctx.head.project(weight), wide(weight)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(whole)
        for start, end in _chunks(targets.shape[0], weight.shape[0]):
            part = slice(start, end)
            logits = project(hidden[part]) / temperatures[part, None]
            if ctx.kept is not None:
                logits = logits.masked_fill(~_is_kept(logits, ctx.kept, start, end), float("-inf"))
            d_logits = torch.softmax(logits, dim=-1).neg_()
            d_logits.scatter_add_(1, targets[part, None], torch.ones_like(d_logits[:, :1]))
            d_logits *= (grad[part] / temperatures[part])[:, None]
            d_hidden[part] = (d_logits @ whole).to(hidden.dtype)
            d_weight.addmm_(d_logits.t(), wide(hidden[part]))
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, vocab: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // vocab)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _log_mass(lp: torch.Tensor, kept: KeptIds, start: int, end: int) -> torch.Tensor:
    """(rows,): the logarithm of what the kept ids have of the whole; 0 where nothing was cut."""
    row, ids = kept.rows(start, end)
    values = lp[row, ids].double()
    top = values.new_full((end - start,), float("-inf")).scatter_reduce_(0, row, values, "amax")
    mass = torch.zeros_like(top).scatter_add_(0, row, torch.exp(values - top[row]))
    return torch.where(mass > 0, top + mass.log(), 0.0).to(lp.dtype)


def _is_kept(logits: torch.Tensor, kept: KeptIds, start: int, end: int) -> torch.Tensor:
    """(rows, V) bool."""
    row, ids = kept.rows(start, end)
    found = torch.zeros_like(logits, dtype=torch.bool)
    found[row, ids] = True
    return found | ~found.any(dim=1, keepdim=True)
