"""A Ring/Ling 2.0 checkpoint folder: checked from its headers, read tensor by tensor (MODEL.md §2).

`Checkpoint.open` reads config.json, the index and the header of every shard, and compares them with
the exact set of tensors that the configuration calls for; no tensor data is touched. Reading maps
the shards, so that no more than one tensor is held beyond the page cache.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.quant import dequantize_block, dequantize_channel
from . import log
from .errors import CheckpointError
from .hub import Progress, ignore_progress
from .ring_config import QuantFormat, RingConfig, read_config, read_json

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The tensor types of a checkpoint, by their safetensors names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = ("BF16", "F16", "F32")
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 24
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a configuration calls for; `quantisable`: it may be FP8 with a scale."""

    name: str
    shape: tuple[int, ...]
    quantisable: bool = False


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor that a shard's header lists."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]


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


def expected_tensors(config: RingConfig) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint without its scales, MTP layers after the main ones.

    In the order in which checkpoints list them: embedding, layers, final norm, head.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    yield TensorSpec("model.word_embeddings.weight", (vocab, hidden))
    main = config.num_hidden_layers
    for layer in range(main + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        yield from _attention_tensors(config, prefix)
        if layer >= main or config.is_moe_layer(layer):
            yield from _moe_tensors(config, prefix)
        else:
            yield from _mlp_tensors(prefix + "mlp.", hidden, config.intermediate_size)
        if layer >= main:
            for norm in ("enorm", "hnorm", "final_layernorm"):
                yield TensorSpec(f"{prefix}{norm}.weight", (hidden,))
            yield TensorSpec(prefix + "eh_proj.weight", (hidden, 2 * hidden))
    yield TensorSpec("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (vocab, hidden))


def _attention_tensors(config: RingConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, head = config.hidden_size, config.head_dim
    queries = config.num_attention_heads * head
    fused = queries + 2 * config.num_key_value_heads * head
    yield TensorSpec(prefix + "input_layernorm.weight", (hidden,))
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (hidden,))
    attention = prefix + "attention."
    yield TensorSpec(attention + "query_key_value.weight", (fused, hidden), True)
    if config.use_qkv_bias:
        yield TensorSpec(attention + "query_key_value.bias", (fused,))
    if config.use_qk_norm:
        yield TensorSpec(attention + "query_layernorm.weight", (head,))
        yield TensorSpec(attention + "key_layernorm.weight", (head,))
    yield TensorSpec(attention + "dense.weight", (hidden, queries), True)
    if config.use_bias:
        yield TensorSpec(attention + "dense.bias", (hidden,))


def _mlp_tensors(prefix: str, hidden: int, width: int) -> Iterator[TensorSpec]:
    yield TensorSpec(prefix + "gate_proj.weight", (width, hidden), True)
    yield TensorSpec(prefix + "up_proj.weight", (width, hidden), True)
    yield TensorSpec(prefix + "down_proj.weight", (hidden, width), True)


def _moe_tensors(config: RingConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, mlp = config.hidden_size, prefix + "mlp."
    yield TensorSpec(mlp + "gate.weight", (config.num_experts, hidden))
    if config.moe_router_enable_expert_bias:
        yield TensorSpec(mlp + "gate.expert_bias", (config.num_experts,))
    for expert in range(config.num_experts):
        yield from _mlp_tensors(f"{mlp}experts.{expert}.", hidden, config.moe_intermediate_size)
    if config.num_shared_experts:
        width = config.moe_shared_expert_intermediate_size
        yield from _mlp_tensors(mlp + "shared_experts.", hidden, width)


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
        self._shards: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check everything that headers can tell.

        Raises CheckpointError for a configuration that cannot be run, a missing, truncated or
        malformed shard, an index that disagrees with the shards, and any missing, unknown,
        mis-shaped or mis-typed tensor.
        """
        stated = read_config(folder)
        entries = {
            name: entry
            for name, entry in _read_entries(folder).items()
            if not ("rotary_emb.inv_freq" in name or "v_head" in name)
        }
        if stated.tie_word_embeddings:
            entries.pop("lm_head.weight", None)
        config = _correct(stated, entries, folder)
        _check_tensors(config, entries, folder)
        return cls(folder, config, entries)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored type, on the CPU; it may alias the file's map: do not write to it.

        Raises CheckpointError for an unknown name and for any value that is not finite.
        """
        tensor = self._raw(name)
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{self.entries[name].shard}: {name} holds a value that is not finite"
            )
        return tensor

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
        """sha256 (hex) of all tensors in sorted name order: see `combine_digests` below."""
        digests = {}
        for done, name in enumerate(self.names):
            on_progress("digest", done, len(self.names))
            digests[name] = self.tensor_digest(name)
        on_progress("digest", len(self.names), len(self.names))
        return combine_digests(digests)

    def close(self) -> None:
        """Drop the maps. Tensors that alias them stay valid until they are freed."""
        self._shards.clear()

    def _raw(self, name: str) -> Tensor:
        if name not in self.entries:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        path = self.entries[name].shard
        try:
            if path not in self._shards:
                self._shards[path] = safe_open(path, framework="pt")
            return cast(Tensor, self._shards[path].get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 (hex) over name, safetensors type, shape and the row-major little-endian bytes.

    The head is `name \\0 type \\0 d0,d1,… \\0` in UTF-8; a scalar has an empty shape.
    """
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{name}\0{DTYPE_NAMES[tensor.dtype]}\0{shape}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in torch.split(flat, _CHUNK_BYTES):
        digest.update(chunk.numpy().data)
    return digest.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """The digest of a whole model: sha256 (hex) over its tensors' digests in sorted name order.

    Built from the parts so that an update of some tensors need not hash the others again.
    """
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(bytes.fromhex(digests[name]))
    return total.hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:
        flat = tensor.reshape(-1).view(torch.uint8)
        # e4m3fn has no infinity; NaN is 0x7f with either sign
        return not any(bool(((c & 0x7F) == 0x7F).any()) for c in torch.split(flat, _CHUNK_BYTES))
    # both ends propagate NaN, and no mask of the tensor's size is made
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of all shards by name, checked against the index if there is one."""
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
    if absent := weight_map.keys() - entries.keys():
        name = min(absent)
        raise CheckpointError(
            f"{folder / weight_map[name]} lacks {_listed(absent)}: {index.name} lists it there"
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
            entries[name] = TensorEntry(path, item["dtype"], tuple(map(int, item["shape"])))
            begin, stop = map(int, item["data_offsets"])
            if (dtype := DTYPES.get(item["dtype"])) is not None:
                needed = math.prod(entries[name].shape) * dtype.itemsize
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
    if main not in (stated, stated - nextn) or main == 0:
        raise CheckpointError(
            f"{folder}: the first MTP layer (with eh_proj) is layer {main}; accepted: num_hidden_layers"
            f" = {stated}, or that minus num_nextn_predict_layers = {stated - nextn}, and not 0"
        )
    if mtp != list(range(main, top + 1)) or (nextn and len(mtp) != nextn):
        raise CheckpointError(
            f"{folder}: layers {_listed(map(str, mtp))} have eh_proj and the last layer is {top}; "
            f"accepted: the last {nextn or len(mtp)} layers (num_nextn_predict_layers)"
        )
    return main, len(mtp)


def _check_tensors(config: RingConfig, entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Compare names, shapes and types with what the configuration calls for."""
    left = dict(entries)
    missing: list[str] = []
    for spec in expected_tensors(config):
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
    faults = [f"missing {_listed(missing)}"] if missing else []
    if left:
        faults.append(f"unknown {_listed(left)}{_hint(left)}")
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


def is_ignored(module: str, ignore: tuple[str, ...]) -> bool:
    """Whether a module is on a list of exceptions: names, their ends or parents, `re:` patterns."""
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else f".{entry}." in f".{module}."
        for entry in ignore
    )


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


def _listed(names: Any) -> str:
    """Names on one line, the first five and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more
