"""Rotary tables: inverse frequencies with linear and YaRN scaling, cosines and sines."""

import math

import numpy as np
import torch

from ..checkpoint.ring_config import RingConfig
from ..checkpoint.rope_config import LinearScaling, YarnScaling


def inverse_frequencies(config: RingConfig) -> tuple[np.ndarray, float]:
    """(d_r/2,) float32 and the factor m on cosines and sines. Source: MODEL.md §3.3."""
    d_r, theta = config.rotary_dim, config.rope_theta
    exponents = np.arange(0, d_r, 2, dtype=np.float64) / d_r
    plain = (1.0 / theta**exponents).astype(np.float32)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return (plain / np.float32(scaling.factor)).astype(np.float32), 1.0
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, d_r, theta, scaling), scaling.attention_factor
    return plain, 1.0


def _yarn(plain: np.ndarray, d_r: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Blend plain and divided frequencies along a ramp (YaRN; MODEL.md §3.3)."""
    original = scaling.original_max_position_embeddings

    def corrected(rotations: float) -> float:
        return d_r * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = corrected(scaling.beta_fast), corrected(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_r - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(d_r // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return (plain / scaling.factor * ramp + plain * (1.0 - ramp)).astype(np.float32)


def rotary_tables(
    config: RingConfig, length: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position below `length`, each (length, d_r/2) in `dtype`.

    The angle is a float32 product; its cosine is taken in float64 and rounded to float32, so
    that an entry does not depend on the table's length.
    """
    frequencies, factor = inverse_frequencies(config)
    positions = np.arange(length, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
    tables = []
    for function in (np.cos, np.sin):
        values = function(angles).astype(np.float32) * np.float32(factor)
        tables.append(torch.from_numpy(values).to(dtype))
    return tables[0], tables[1]
