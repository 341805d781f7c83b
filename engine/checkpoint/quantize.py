"""A bf16 or float32 checkpoint as block FP8, offline: what a trainer publishes for FP8 engines has
the same bytes (trainer_bridge/weights/layout.py), by the same functions of kernels/quant.py."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...kernels.quant import BLOCK, quantize_block
from ..errors import CheckpointError
from ..model.weights import DTYPES
from .checkpoint import Checkpoint
from .expected_tensors import TensorSpec, expected_tensors
from .fp8_policy import Fp8Format, has_power_of_two_scales
from .hub import Progress, ignore_progress, new_folder
from .safetensors_writer import Unit, write_shards
from .stored_format import StoredFormat

Dtype = Literal["auto", "bfloat16", "float32"]
_PIECE_ELEMENTS = 1 << 24
_SLACK_BYTES = 16 << 20


def quantize_checkpoint(
    source: Path,
    target: Path,
    format: Fp8Format = "fp8-experts",
    *,
    dtype: Dtype = "auto",
    on_progress: Progress = ignore_progress,
) -> Path:
    """Write `target`: the weights of `source` in FP8 where `format` says so; returns the folder.

    dtype  of what is not FP8: bfloat16, float32, or auto: as the source says. Weights are rounded
           to it before they are quantised, as those of a model that was exported in it.

    A piece of a tensor is in memory at a time. Raises CheckpointError for a source that is FP8
    already or cannot be read, and for a target that is not empty or cannot be written.
    """
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config
    if config.quant is not None:
        raise CheckpointError(
            f"{source} is FP8 already; accepted: a bfloat16 or float32 checkpoint"
        )
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise CheckpointError(
            f"{source} is stored in {name}; accepted: bfloat16, float32, or --dtype one of them"
        )
    stored = StoredFormat(config, DTYPES[name], format)
    units = [
        _unit(checkpoint, spec, stored)
        for spec in expected_tensors(config)
        if spec.name in checkpoint.entries
    ]
    with new_folder(target, sum(unit.num_bytes for unit in units) + _SLACK_BYTES):
        write_shards(target, units, on_progress=on_progress)
        # config.json is the last of them: a folder without it is not a model
        for file, content in stored.companions(source).items():
            (target / file).write_bytes(content)
    checkpoint.close()
    return target


def stored_unit(
    stored: StoredFormat, spec: TensorSpec, pieces: Callable[[], Iterator[Tensor]]
) -> Unit:
    """A tensor as it is stored, made of whole bands of 128 rows in any float type."""
    parts = stored.parts(spec)

    def plain() -> Iterator[tuple[int, Tensor]]:
        for piece in pieces():
            yield 0, piece.to(parts[0].dtype)

    def quantised() -> Iterator[tuple[int, Tensor]]:
        power_of_two = has_power_of_two_scales(spec.name)
        for piece in pieces():
            # codes are those of the weight that would be exported
            codes, scales = quantize_block(piece.to(stored.dtype), power_of_two=power_of_two)
            yield 0, codes
            yield 1, scales

    return Unit(parts, quantised if len(parts) == 2 else plain)


def rows_of_a_piece(width: int) -> int:
    """How many rows of this width are made at once: whole bands of 128."""
    return max(BLOCK, _PIECE_ELEMENTS // width // BLOCK * BLOCK)


def _unit(checkpoint: Checkpoint, spec: TensorSpec, stored: StoredFormat) -> Unit:
    rows = rows_of_a_piece(math.prod(spec.shape[1:]))
    return stored_unit(stored, spec, lambda: iter(torch.split(checkpoint.tensor(spec.name), rows)))
