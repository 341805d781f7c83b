"""Which linear layers of a model are stored in FP8 blocks, and how config.json says so (format A of
MODEL.md §2.3)."""

from typing import Any, Literal

from .expected_tensors import TensorSpec, expected_tensors
from .ring_config import RingConfig

Fp8Format = Literal["fp8-experts", "fp8-block"]
"""fp8-experts: routed experts alone, as in Ring 2.6's RL (PAPER.md §3); fp8-block: every linear
layer but router and head, as the published converter writes it."""

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128


def is_quantised(spec: TensorSpec, format: Fp8Format) -> bool:
    """Whether this tensor is FP8 with a scale beside it."""
    return spec.quantisable and (format == "fp8-block" or ".experts." in spec.name)


def has_power_of_two_scales(name: str) -> bool:
    """Whose scales the published converter rounds up to powers of two."""
    routed = ".experts." in name and ("gate_proj" in name or "up_proj" in name)
    return routed or name.endswith("attention.dense.weight")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """One scale for each block of a weight (out, in), whole or not."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantization_config(config: RingConfig, format: Fp8Format) -> dict[str, Any]:
    """config.json's section. The published converter writes no list of modules; where fewer layers
    are FP8 than it quantises, the others are named in it, for other engines too."""
    section: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    excluded = [
        spec.name.removesuffix(".weight")
        for spec in expected_tensors(config)
        if spec.quantisable and not is_quantised(spec, format)
    ]
    return section | ({"modules_to_not_convert": excluded} if excluded else {})
