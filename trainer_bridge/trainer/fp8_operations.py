"""FP8 products by NVIDIA's transformer-engine: attention projections, MLPs and experts.

Weights are scaled by blocks of 128 × 128 and activations by 128 columns of a row, as the engine's
W8A8 numerics have it; gradients likewise. Router, head, norms and attention itself stay as they are
(PAPER.md §3). Written against the package's public interface (`te.Linear`, `te.fp8_autocast`,
`Float8BlockScaling`), and tested without it: this has never run on a GPU.

Shapes: M rows, N outputs, K inputs.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch.func import functional_call
from torch.nn import functional

from ...engine.errors import ConfigError, MissingExtra
from ...kernels import GateUp, Linear, Pair, Weight
from .trainable_operations import PlainOperations, wide

# what a block of scales covers, so what rows are padded to
_BLOCK = 128


def check_fp8(device: torch.device) -> None:
    """Raise MissingExtra or ConfigError, in one line, where FP8 products cannot be had."""
    _package()
    if device.type != "cuda":
        raise ConfigError(f"numerics.fp8 needs a CUDA device; this rank trains on {device.type}")


class Fp8Operations(PlainOperations):
    """`PlainOperations` whose linear layers are FP8 where blocks of 128 fit them."""

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        assert isinstance(weight, Weight)
        return _linear(x, weight.data, weight.bias)

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        assert isinstance(weights, Pair)
        gate = _linear(x, weights.gate.data, None)
        return functional.silu(wide(gate)).to(x.dtype) * _linear(x, weights.up.data, None)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """T(x Wᵀ + b): (M, K) → (M, N)."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if outputs % _BLOCK or inputs % _BLOCK:
        return functional.linear(x, weight, bias)
    te, recipe = _package()
    # an expert without rows still gives its weight a gradient of zeros
    padded = functional.pad(x, (0, 0, 0, max(_BLOCK, rows + -rows % _BLOCK) - rows))
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        out: torch.Tensor = functional_call(
            _product(outputs, inputs, weight.dtype, weight.device), {"weight": weight}, (padded,)
        )
    return out[:rows] if bias is None else out[:rows] + bias


@cache
def _product(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The package's layer of a shape; each call brings its own weight."""
    te, _ = _package()
    return te.Linear(inputs, outputs, bias=False, params_dtype=dtype, device=device)


@cache
def _package() -> tuple[Any, Any]:
    """transformer_engine.pytorch, and the recipe."""
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe")
    except ImportError:
        raise MissingExtra("transformer-engine", "gpu", "numerics.fp8") from None
    return te, recipe.Float8BlockScaling()
