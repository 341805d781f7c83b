"""Safetensors shards and their index, written piece by piece.

The writer holds one piece of one tensor at a time, so a checkpoint of 2 TB needs no more memory
than a small one.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hub import Progress, ignore_progress
from .json_keys import write_json
from .safetensors_header import DTYPE_NAMES

_PUBLISHED_SHARD_BYTES = 10 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that are made together (a weight and its scale).

    pieces() yields (index into parts, consecutive elements of that part in its dtype).
    """

    parts: tuple[Part, ...]
    pieces: Callable[[], Iterator[tuple[int, Tensor]]]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def write_shards(
    folder: Path,
    units: Sequence[Unit],
    *,
    shards: int | None = None,
    max_shard_bytes: int | None = None,
    on_progress: Progress = ignore_progress,
) -> None:
    """Write model.safetensors, or shards with an index, piece by piece. Progress is in bytes."""
    total = sum(unit.num_bytes for unit in units)
    limit = max_shard_bytes or (math.ceil(total / shards) if shards else _PUBLISHED_SHARD_BYTES)
    groups = _cut(units, limit, shards)
    weight_map: dict[str, str] = {}
    done = 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        path = folder / (name if len(groups) > 1 else "model.safetensors")
        for written in _write_shard(path, group):
            done += written
            on_progress("write", done, total)
        weight_map |= {part.name: path.name for unit in group for part in unit.parts}
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _cut(units: Sequence[Unit], limit: int, shards: int | None) -> list[list[Unit]]:
    """Consecutive groups: `shards` of nearly equal size, or each within the limit."""
    groups: list[list[Unit]] = [[]]
    size = start = 0
    for unit in units:
        full = start >= limit * len(groups) if shards else size + unit.num_bytes > limit
        if groups[-1] and full:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.num_bytes
        start += unit.num_bytes
    return groups


def layout(parts: Sequence[Part]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where in the file each tensor begins.

    Wide types come first, so that every tensor is aligned whatever its size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for part in sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name)):
        offsets[part.name] = end
        header[part.name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [end, end + part.num_bytes],
        }
        end += part.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def _write_shard(path: Path, units: Sequence[Unit]) -> Iterator[int]:
    """Write one safetensors file; yields the bytes of each piece."""
    head, offsets = layout([part for unit in units for part in unit.parts])
    with path.open("wb") as file:
        file.write(head)
        for unit in units:
            cursors = [offsets[part.name] for part in unit.parts]
            for index, piece in unit.pieces():
                file.seek(cursors[index])
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data.data)
                cursors[index] += data.nbytes
                yield data.nbytes
