"""RMSNorm with the casts of the published definition (MODEL.md §3.1)."""

import torch

from .reduce import tree_sum


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """T(weight · T(y · rsqrt(mean(y²) + eps))), y = float32(x).

    x        (..., H) T
    weight   (H,) T
    returns  (..., H) T; the mean is a fixed tree over H
    """
    y = x.float()
    mean = tree_sum(y * y) / x.shape[-1]
    y = y * torch.rsqrt(mean + eps).unsqueeze(-1)
    return weight * y.to(x.dtype)
