"""Group-limited top-k routing by biased sigmoid scores (MODEL.md §3.4), all in float32."""

import torch

from .activation import sigmoid
from .gemm import matmul_rows


def route(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling: float,
    forced_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights.

    x           (T, H) T
    gate        (E, H) float32
    bias        (E,) float32; added for the choice, not in the weights
    forced_ids  (T, K) int64: use these experts instead (routing replay)
    returns     ids (T, K) int64, weights (T, K) float32; slots by choice score descending.
                Ties: the lower expert, and the lower group, wins.
    """
    return choose(
        matmul_rows(x.float(), gate),
        bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scaling=scaling,
        forced_ids=forced_ids,
    )


def choose(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling: float,
    forced_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` from the router's logits (T, E) float32."""
    scores = sigmoid(logits)
    if forced_ids is None:
        choice = scores + bias
        if n_group > 1:
            choice = _keep_best_groups(choice, n_group, topk_group)
        ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    else:
        ids = forced_ids
    weights = scores.gather(1, ids)
    if top_k > 1:
        total = weights[:, 0]
        for slot in range(1, top_k):
            total = total + weights[:, slot]
        weights = weights / (total + 1e-20).unsqueeze(1)
    return ids, weights * scaling


def _keep_best_groups(choice: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """Set the scores outside the best groups to -inf; a group counts by its two best."""
    tokens, experts = choice.shape
    grouped = choice.view(tokens, n_group, experts // n_group)
    best = torch.topk(grouped, 2, dim=-1).values
    group_scores = best[..., 0] + best[..., 1]
    order = torch.sort(group_scores, dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool)
    keep.scatter_(1, order[:, :topk_group], True)
    return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).view(tokens, experts)
