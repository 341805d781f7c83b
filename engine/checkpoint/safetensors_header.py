"""What the headers and the index of a folder's safetensors shards list; no tensor data is read."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels import Pieces, drain
from ..errors import CheckpointError
from .json_keys import read_json

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The tensor types of a checkpoint, by their safetensors names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor that a shard's header lists; `start`: of its bytes in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of all shards by name, checked against the index if there is one."""
    return drain(reading_entries(folder))


def reading_entries(folder: Path) -> Pieces[dict[str, TensorEntry]]:
    """`read_entries`, a shard at a time."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no weights: neither model.safetensors nor {index.name}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; accepted: {{name: shard}}")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is not a plain file name")
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {index.name} lists it")
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(f"{name} is in both {entries[name].shard} and {path}")
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path} holds {name}, which {index.name} puts in {weight_map.get(name)}"
                )
            entries[name] = entry
        yield
    if absent := weight_map.keys() - entries.keys():
        name = min(absent)
        raise CheckpointError(
            f"{folder / weight_map[name]} lacks {listed(absent)}: {index.name} lists it there"
        )
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file, checked against the file's size.

    Raises CheckpointError if the file is truncated or is not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file (header of {length} bytes)"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointError(f"{path} is truncated: it ends within its header")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {}
        end = used = 0
        for name, item in header.items():
            begin, stop = map(int, item["data_offsets"])
            shape = tuple(map(int, item["shape"]))
            entries[name] = TensorEntry(path, item["dtype"], shape, 8 + length + begin)
            if (dtype := DTYPES.get(item["dtype"])) is not None:
                needed = math.prod(shape) * dtype.itemsize
                if stop - begin != needed:
                    raise ValueError(f"{name} has {stop - begin} bytes, its shape needs {needed}")
            end = max(end, stop)
            used += stop - begin
        if used != end:
            raise ValueError(f"its tensors have {used} bytes and end at {end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header is malformed: {error!r}") from error
    if size != 8 + length + end:
        word = "is truncated" if size < 8 + length + end else "has trailing bytes"
        raise CheckpointError(
            f"{path} {word}: its header describes {8 + length + end} bytes, it has {size}"
        )
    return entries


def listed(names: Any) -> str:
    """Names on one line, the first five and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more
