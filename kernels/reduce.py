"""Sums whose order is fixed by the length alone.

A library's reduction may split its work by shape, by threads or by vector tails; a sum made of
elementwise additions cannot. Every sum over a row in `kernels/` goes through `tree_sum`.
"""

import torch


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by folding the upper half onto the lower until one is left.

    x        (..., n) float, n >= 1; not changed
    returns  (...), x.dtype; the order of additions depends on n only
    """
    n = x.shape[-1]
    if n == 1:
        return x[..., 0]
    half = (n + 1) // 2
    folded = x[..., :half].clone()
    folded[..., : n - half] += x[..., half:]
    n = half
    while n > 1:
        half = (n + 1) // 2
        folded[..., : n - half] += folded[..., half:n]
        n = half
    return folded[..., 0]


def pairwise_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by adding neighbours (0+1, 2+3, …) until one is left.

    x        (..., n) float, n a power of two
    returns  (...), x.dtype; zeros appended at the end never change the result, so rows of
             different lengths may be padded to a common one
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"pairwise_sum needs a power of two, got {n}")
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]
