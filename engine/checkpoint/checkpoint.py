"""A Ring/Ling 2.0 checkpoint folder: checked from its headers, read tensor by tensor (MODEL.md §2).

`Checkpoint.open` reads config.json, the index and the header of every shard, and compares them with
the exact set of tensors that the configuration calls for; no tensor data is touched. Reading maps
the shards, so that no more than one tensor is held beyond the page cache.
"""

import hashlib
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from ...kernels import PIECE_BYTES, Pieces, drain
from ...kernels.quant import dequantize_block, dequantize_channel
from .. import log
from ..errors import CheckpointError, WeightsRefused
from .expected_tensors import TensorSpec, expected_tensors
from .hub import Progress, ignore_progress
from .manifest import combine_digests, tensor_hash
from .quant_format import QuantFormat, is_ignored
from .reader_locks import lock_for_reading
from .ring_config import RingConfig, read_config
from .safetensors_header import DTYPE_NAMES, DTYPES, TensorEntry, listed, reading_entries

_FLOATS = ("BF16", "F16", "F32")
_CHUNK_BYTES = 1 << 24
# tensors that are compared with the configuration in a piece
_PIECE_TENSORS = 256
# the bits that all are set in what is no finite number, and as which integers they are read
_NOT_FINITE = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    # e4m3fn has no infinity; NaN is 0x7f with either sign
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A Linear as it is stored; y = x Wᵀ + bias.

    weight  (out, in)  bf16 | f16 | f32, or float8_e4m3fn with a scale; may alias the file's map
    scale   float32: block (ceil(out/128), ceil(in/128)), channel (out, 1), plain None
    bias    (out,) or None
    """

    weight: Tensor
    scale: Tensor | None
    kind: Literal["plain", "block", "channel"]
    bias: Tensor | None = None


def dequantize(linear: StoredLinear) -> Tensor:
    """The weight in float32, float(q) · s: the plain reference (weight-only, not W8A8)."""
    if linear.scale is None:
        return linear.weight.float()
    if linear.kind == "block":
        return dequantize_block(linear.weight, linear.scale, torch.float32)
    return dequantize_channel(linear.weight, linear.scale, torch.float32)


class Checkpoint:
    """An opened checkpoint folder. `config` is corrected by what the tensors say (§2.2).

    names    every tensor of the model, scales included, sorted; ignored tensors are left out
    entries  what the headers say of them
    """

    def __init__(
        self, folder: Path, config: RingConfig, entries: Mapping[str, TensorEntry]
    ) -> None:
        self.folder = folder
        self.config = config
        self.entries = entries
        self.names = tuple(sorted(entries))
        self._shards: dict[Path, mmap.mmap] = {}
        self._verified: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check everything that headers can tell.

        Raises CheckpointError for a configuration that cannot be run, a missing, truncated or
        malformed shard, an index that disagrees with the shards, and any missing, unknown,
        mis-shaped or mis-typed tensor.
        """
        return drain(cls.opening(folder))

    @classmethod
    def opening(cls, folder: Path) -> Pieces["Checkpoint"]:
        """`open`, in pieces: some hundred tensors each."""
        stated = read_config(folder)
        entries = yield from reading_entries(folder)
        for name in [name for name in entries if "rotary_emb.inv_freq" in name or "v_head" in name]:
            del entries[name]
        if stated.tie_word_embeddings:
            entries.pop("lm_head.weight", None)
        yield
        config = _correct(stated, entries, folder)
        yield from _checking_tensors(config, entries, folder)
        return cls(folder, config, entries)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored type, on the CPU; it may alias the file's map: do not write to it.

        Raises CheckpointError for an unknown name and for any value that is not finite.
        """
        tensor = self._raw(name)
        if name not in self._verified and not _is_finite(tensor):
            raise CheckpointError(self._not_finite(name))
        return tensor

    def verifying(self, name: str) -> Pieces[str]:
        """The tensor's digest, in pieces; its values are looked at on the way.

        Raises WeightsRefused for one that is not finite; CheckpointError as `tensor`.
        """
        tensor = self._raw(name)
        hashing = _tensor_hash(name, tensor)
        for chunk in torch.split(tensor.reshape(-1), PIECE_BYTES // tensor.element_size()):
            if not _is_finite(chunk):
                raise WeightsRefused(self._not_finite(name), tensor=name)
            hashing.update(chunk.view(torch.uint8).numpy().data)
            yield
        yield from self.letting_go(name)
        self._verified.add(name)
        return hashing.hexdigest()

    def trust(self) -> None:
        """Look at no values any more: somebody else does (`verifying`)."""
        self._verified.update(self.names)

    def letting_go(self, name: str) -> Pieces[None]:
        """Of the pages of a tensor in the file's map; they are mapped again where they are read.

        Unmapping takes a time for each page that was looked at: a file of gigabytes would hold up a
        step when its map is closed.
        """
        entry, page = self.entries[name], mmap.PAGESIZE
        shard = self._shards.get(entry.shard)
        if shard is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = entry.start // page * page
        last = (entry.start + _num_bytes(entry)) // page * page
        for start in range(first, last, _CHUNK_BYTES):
            shard.madvise(mmap.MADV_DONTNEED, start, min(_CHUNK_BYTES, last - start))
            yield

    def _not_finite(self, name: str) -> str:
        return f"{self.entries[name].shard}: {name} holds a value that is not finite"

    def linear(self, name: str) -> StoredLinear:
        """A Linear by its name without `.weight`, with its scale and its bias where it has them."""
        weight = self.tensor(name + ".weight")
        bias = self.tensor(name + ".bias") if name + ".bias" in self.entries else None
        if weight.dtype != torch.float8_e4m3fn:
            return StoredLinear(weight, None, "plain", bias)
        quant = cast(QuantFormat, self.config.quant)
        scale = self.tensor(name + ".weight" + quant.scale_suffix).float()
        if quant.kind == "block":
            return StoredLinear(weight, scale, "block", bias)
        column = scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
        return StoredLinear(weight, column, "channel", bias)

    def tensor_digest(self, name: str) -> str:
        """sha256 (hex) of one tensor: see `tensor_digest` below."""
        return tensor_digest(name, self._raw(name))

    def content_digest(self, on_progress: Progress = ignore_progress) -> str:
        """sha256 (hex) of all tensors in sorted name order: see `manifest.combine_digests`."""
        digests = {}
        for done, name in enumerate(self.names):
            on_progress("digest", done, len(self.names))
            digests[name] = self.tensor_digest(name)
        on_progress("digest", len(self.names), len(self.names))
        return combine_digests(digests)

    def close(self) -> None:
        """Drop the maps and their locks. Tensors that alias them stay valid, and keep the locks, until
        they are freed."""
        self._shards.clear()

    def _raw(self, name: str) -> Tensor:
        if name not in self.entries:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        entry = self.entries[name]
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        try:
            if entry.shard not in self._shards:
                with entry.shard.open("rb") as file:
                    lock_for_reading(file.fileno(), entry.shard)
                    # a private map: nothing is written to the file, whoever writes; it keeps the lock
                    self._shards[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flat = torch.frombuffer(
                self._shards[entry.shard], dtype=dtype, count=count, offset=entry.start
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{entry.shard}: {name} cannot be read: {error}") from error
        return flat.view(entry.shape)


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 (hex) over name, safetensors type, shape and values: see `manifest.tensor_hash`."""
    digest = _tensor_hash(name, tensor)
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in torch.split(flat, _CHUNK_BYTES):
        digest.update(chunk.numpy().data)
    return digest.hexdigest()


def _tensor_hash(name: str, tensor: Tensor) -> "hashlib._Hash":
    return tensor_hash(name, DTYPE_NAMES[tensor.dtype], tensor.shape)


def _is_finite(tensor: Tensor) -> bool:
    """On one thread: others may have something better to do than to be waited for."""
    kind, mask = _NOT_FINITE[tensor.dtype]
    flat = tensor.reshape(-1).view(torch.uint8).numpy().view(kind)
    chunks = range(0, flat.size, PIECE_BYTES // flat.itemsize)
    parts = (flat[start : start + chunks.step] for start in chunks)
    return all(int(np.bitwise_and(part, mask).max()) != mask for part in parts)


def _correct(config: RingConfig, entries: Mapping[str, TensorEntry], folder: Path) -> RingConfig:
    """The configuration with what only the tensors say: MTP layers, biases, shared width."""
    main, mtp = _count_layers(config, entries, folder)
    changes: dict[str, Any] = {"num_hidden_layers": main, "num_nextn_predict_layers": mtp}
    # biases and expert_bias go by presence (§1.2): any of a kind calls for all of them
    for field, suffix in (
        ("use_qkv_bias", "attention.query_key_value.bias"),
        ("use_bias", "attention.dense.bias"),
        ("moe_router_enable_expert_bias", "mlp.gate.expert_bias"),
    ):
        present = any(name.endswith(suffix) for name in entries)
        changes[field] = getattr(config, field) or present
    if config.num_experts and config.num_shared_experts:
        # the published definition ignores the key, other engines read it: the tensor decides
        plain = config.moe_intermediate_size * config.num_shared_experts
        suffix = "mlp.shared_experts.gate_proj.weight"
        shape = next((e.shape for n, e in entries.items() if n.endswith(suffix)), ())
        if shape and shape[0] == plain:
            changes["moe_shared_expert_intermediate_size"] = plain
    return replace(config, **changes)


def _count_layers(
    config: RingConfig, entries: Mapping[str, TensorEntry], folder: Path
) -> tuple[int, int]:
    """(main, MTP) layers: layer m is an MTP layer iff it has an `eh_proj` (MODEL.md §2.2)."""
    stated, nextn = config.num_hidden_layers, config.num_nextn_predict_layers
    found = [m for name in entries if (m := _LAYER.fullmatch(name))]
    mtp = sorted(int(m[1]) for m in found if m[2] == "eh_proj.weight")
    if not mtp:
        if nextn:
            log.event("checkpoint.mtp_missing", folder=str(folder), num_nextn_predict_layers=nextn)
        return stated, 0
    main, top = mtp[0], max(int(m[1]) for m in found)
    if main == 0:
        raise CheckpointError(
            f"{folder} is an MTP-only folder (layer 0 has eh_proj): it has no main layers to run; "
            f"accepted: the folder of the whole model"
        )
    if main not in (stated, stated - nextn):
        raise CheckpointError(
            f"{folder}: the first MTP layer (with eh_proj) is layer {main}; accepted: num_hidden_layers"
            f" = {stated}, or that minus num_nextn_predict_layers = {stated - nextn}"
        )
    if mtp != list(range(main, top + 1)) or (nextn and len(mtp) != nextn):
        raise CheckpointError(
            f"{folder}: layers {listed(map(str, mtp))} have eh_proj and the last layer is {top}; "
            f"accepted: the last {nextn or len(mtp)} layers (num_nextn_predict_layers)"
        )
    return main, len(mtp)


def _checking_tensors(
    config: RingConfig, entries: Mapping[str, TensorEntry], folder: Path
) -> Pieces[None]:
    """Compare names, shapes and types with what the configuration calls for."""
    left = dict(entries)
    missing: list[str] = []
    for count, spec in enumerate(expected_tensors(config)):
        if count % _PIECE_TENSORS == 0:
            yield
        entry = left.pop(spec.name, None)
        if entry is None:
            missing.append(spec.name)
            continue
        if entry.shape != spec.shape:
            _refuse(entry, spec.name, f"has shape {list(entry.shape)}", str(list(spec.shape)))
        if spec.quantisable and entry.dtype == "F8_E4M3":
            _check_scale(config.quant, spec, entry, left, missing)
        elif entry.dtype not in _FLOATS:
            accepted = [*_FLOATS, "F8_E4M3"] if spec.quantisable else _FLOATS
            _refuse(entry, spec.name, f"has type {entry.dtype}", ", ".join(accepted))
    faults = [f"missing {listed(missing)}"] if missing else []
    if left:
        faults.append(f"unknown {listed(left)}{_hint(left)}")
    if faults:
        raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(faults)}")


def _check_scale(
    quant: QuantFormat | None,
    spec: TensorSpec,
    entry: TensorEntry,
    left: dict[str, TensorEntry],
    missing: list[str],
) -> None:
    """Take the scale of an FP8 weight out of `left`, from whichever shard, and check it."""
    if quant is None:
        _refuse(entry, spec.name, "is F8_E4M3", "BF16, F16, F32 without a quantization_config")
    if is_ignored(spec.name.removesuffix(".weight"), quant.ignore):
        _refuse(entry, spec.name, "is F8_E4M3", "BF16, F16, F32: config.json excludes it from FP8")
    name = spec.name + quant.scale_suffix
    scale = left.pop(name, None)
    if scale is None:
        missing.append(name)
        return
    rows, columns = spec.shape
    accepted: dict[str, list[tuple[int, ...]]] = {
        "block": [(-(-rows // 128), -(-columns // 128))],
        "channel": [(rows, 1), (rows,)],
        "tensor": [(1,), (), (1, 1)],
    }
    shapes = accepted[quant.kind]
    if scale.shape not in shapes:
        shown = " or ".join(str(list(shape)) for shape in shapes)
        _refuse(scale, name, f"has shape {list(scale.shape)}", f"{shown} ({quant.kind} scales)")
    if scale.dtype not in _FLOATS:
        _refuse(scale, name, f"has type {scale.dtype}", ", ".join(_FLOATS))


def _hint(names: Mapping[str, TensorEntry]) -> str:
    for suffix, reason in (
        ("input_scale", "static activation scales are not supported"),
        ("zero_point", "asymmetric quantisation is not supported"),
    ):
        if any(name.endswith(suffix) for name in names):
            return f" ({reason})"
    return ""


def _refuse(entry: TensorEntry, name: str, fault: str, accepted: str) -> NoReturn:
    raise CheckpointError(f"{entry.shard}: {name} {fault}; accepted: {accepted}")
