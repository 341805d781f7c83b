"""SwiGLU with the casts of the published definition (MODEL.md §3.1)."""

import torch


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1/(1+e^-x) in float32.

    Not `torch.sigmoid`: its vector tail rounds otherwise than its body, so the bits of an
    element would depend on where it stands (measured: docs/explain/numerics.md).
    """
    return 1.0 / (1.0 + torch.exp(-x))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """T(T(silu(gate)) · up); silu inside in float32.

    gate, up  (M, I) T
    returns   (M, I) T
    """
    wide = gate.float()
    return (wide * sigmoid(wide)).to(gate.dtype) * up
