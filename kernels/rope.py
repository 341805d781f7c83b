"""Rotary embedding: float32 tables, rotation in float32, one rounding (MODEL.md §3.2, §3.3)."""

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first d_r dimensions of each head, halves paired (NeoX), the rest unchanged.

    x         (T, heads, D) T
    cos, sin  (T, d_r/2) float32, or T for comparisons with Hugging Face: the rotation is then
              done in T
    returns   (T, heads, D) T
    """
    half = cos.shape[-1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    u1 = x[..., :half].to(cos.dtype)
    u2 = x[..., half : 2 * half].to(cos.dtype)
    parts = [(u1 * c - u2 * s).to(x.dtype), (u2 * c + u1 * s).to(x.dtype)]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
