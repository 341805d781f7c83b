"""Random-weight checkpoints of any Ring shape, written exactly as the published ones are.

Each tensor has its own random stream (seed and name), so that it does not depend on shards, order
or format; tensors are made piece by piece, as the writer asks for them.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from ...kernels.quant import quantize_channel
from ..errors import CheckpointError
from .expected_tensors import TensorSpec, expected_tensors
from .fp8_policy import Fp8Format, quantization_config
from .hub import Progress, ignore_progress, new_folder
from .json_keys import write_json
from .quantize import rows_of_a_piece, stored_unit
from .random_tokenizer import special_tokens, write_tokenizer
from .ring_config import RingConfig, parse_config
from .safetensors_writer import Part, Unit, write_shards
from .stored_format import StoredFormat

Format = Literal["bf16", "f32", Fp8Format, "fp8-channel"]
_SLACK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """Sizes of a model by the checkpoint's own names; `published` says how a release spells them.

    states_rotary_dim    write rotary_dim (1T) instead of partial_rotary_factor (mini, flash)
    states_shared_width  write moe_shared_expert_intermediate_size (not in 1T)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    num_shared_experts: int = 1
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    states_rotary_dim: bool = False
    states_shared_width: bool = True


def _published(**sizes: Any) -> RingShape:
    common = {
        "vocab_size": 157184,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 1,
    }
    return RingShape(**(common | sizes))


SHAPES = {
    # n_h · d differs from H, and the rotary part is half a head: mistakes there cannot hide
    "tiny": RingShape(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    ),
    "mini": _published(
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        moe_intermediate_size=512,
    ),
    "flash": _published(
        hidden_size=4096,
        intermediate_size=9216,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=4,
        moe_intermediate_size=1024,
    ),
    "1T": _published(
        hidden_size=8192,
        intermediate_size=18432,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=4,
        max_position_embeddings=65536,
        states_rotary_dim=True,
        states_shared_width=False,
    ),
}
"""Published sizes (MODEL.md §1.1), and one for tests of about 700 kB in bf16."""


def resize(shape: str, sizes: Sequence[str]) -> RingShape:
    """A preset with some sizes changed, each given as `name=value`.

    Raises CheckpointError naming the shape, the size or the value, and what is accepted.
    """
    if shape not in SHAPES:
        raise CheckpointError(f"unknown shape {shape!r}; accepted: {', '.join(SHAPES)}")
    types = {f.name: f.type for f in fields(RingShape) if not f.name.startswith("states_")}
    kinds: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    changes = {}
    for size in sizes:
        name, equals, value = size.partition("=")
        if not equals:
            raise CheckpointError(f"size {size!r} must be KEY=VALUE, as in hidden_size=1024")
        if name not in types:
            raise CheckpointError(f"unknown size {name!r}; accepted: {', '.join(types)}")
        try:
            changes[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError:
            kind = kinds[types[name]]
            raise CheckpointError(f"size {name} must be {kind}, got {value!r}") from None
    return replace(SHAPES[shape], **changes)


def make_checkpoint(
    folder: Path,
    *,
    shape: str | RingShape = "tiny",
    format: Format = "bf16",
    shards: int | None = None,
    max_shard_bytes: int | None = None,
    seed: int = 0,
    mtp: int = 0,
    template: Literal["simple", "full"] = "simple",
    on_progress: Progress = ignore_progress,
) -> Path:
    """Write a random checkpoint with tokenizer and template; returns the folder.

    shape            a preset ("tiny", "mini", "flash", "1T") or sizes
    shards           how many files; without it, files of at most `max_shard_bytes` (default 10 GiB)
    mtp              MTP layers after the main ones (num_nextn_predict_layers)

    Weights are N(0, 1/fan_in), so logits have a standard deviation of about 1 and routing spreads.
    Raises CheckpointError for an unknown preset, sizes that no Ring model has, a target that is not
    empty or cannot be written, and a disk that is too small (with both figures).
    """
    if isinstance(shape, str):
        shape = resize(shape, [])
    tokens = special_tokens(shape.vocab_size)
    data = config_json(shape, format, mtp, tokens["<|endoftext|>"])
    config = parse_config(data)
    units = [_unit(config, spec, format, seed) for spec in expected_tensors(config)]
    with new_folder(folder, sum(unit.num_bytes for unit in units) + _SLACK_BYTES):
        write_shards(
            folder, units, shards=shards, max_shard_bytes=max_shard_bytes, on_progress=on_progress
        )
        write_tokenizer(folder, shape.vocab_size, tokens, template)
        generation = {
            "bos_token_id": tokens["<|startoftext|>"],
            "eos_token_id": [tokens["<|endoftext|>"], tokens["<|role_end|>"]],
            "pad_token_id": tokens["<|endoftext|>"],
        }
        write_json(folder / "generation_config.json", generation)
        # last: a folder without it is not a model, so an interrupted run leaves none
        write_json(folder / "config.json", data)
    return folder


def config_json(shape: RingShape, format: Format, mtp: int, end_of_text: int) -> dict[str, Any]:
    """config.json as the published converter writes it."""
    data: dict[str, Any] = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe",
        "hidden_act": "silu",
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "use_rmsnorm": True,
        "norm_head": False,
        "norm_softmax": False,
        "rope_scaling": None,
        "num_nextn_predict_layers": mtp,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "torch_dtype": "float32" if format == "f32" else "bfloat16",
    }
    data |= asdict(shape)
    del data["states_rotary_dim"], data["states_shared_width"]
    if not shape.states_rotary_dim:
        data["partial_rotary_factor"] = data.pop("rotary_dim") / shape.head_dim
    if shape.states_shared_width and shape.num_shared_experts:
        data["moe_shared_expert_intermediate_size"] = shape.moe_intermediate_size
    if format == "fp8-block" or format == "fp8-experts":
        data["quantization_config"] = quantization_config(parse_config(data), format)
    elif format == "fp8-channel":
        data["quantization_config"] = _compressed_tensors(shape, mtp)
    return data


def _compressed_tensors(shape: RingShape, mtp: int) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    layers = range(shape.first_k_dense_replace, shape.num_hidden_layers + mtp)
    ignore = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in layers)]
    main = shape.num_hidden_layers
    ignore += [f"model.layers.{layer}.eh_proj" for layer in range(main, main + mtp)]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | {"strategy": "channel", "dynamic": False},
                "input_activations": common | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _unit(config: RingConfig, spec: TensorSpec, format: Format, seed: int) -> Unit:
    """How one tensor is made in this format."""
    make = _RandomTensor(spec, seed, _mean_and_deviation(config, spec))
    if format == "fp8-channel":
        return _channel_unit(spec, make)
    fp8 = format if format == "fp8-experts" or format == "fp8-block" else None
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    return stored_unit(StoredFormat(config, dtype, fp8), spec, make.pieces)


def _channel_unit(spec: TensorSpec, make: "_RandomTensor") -> Unit:
    """Format B, whose releases hold only BF16 and F8_E4M3 (MODEL.md §2.1)."""
    if not spec.quantisable:
        part = Part(spec.name, torch.bfloat16, spec.shape)
        return Unit((part,), lambda: ((0, piece.bfloat16()) for piece in make.pieces()))
    scale = Part(spec.name + "_scale", torch.bfloat16, (spec.shape[0], 1))

    def pieces() -> Iterator[tuple[int, Tensor]]:
        # what is quantised is the bf16 weight, as in a conversion of a trained model
        for piece in make.pieces():
            qdata, rows = quantize_channel(piece.bfloat16(), scale_dtype=torch.bfloat16)
            yield 0, qdata
            yield 1, rows.bfloat16()

    return Unit((Part(spec.name, torch.float8_e4m3fn, spec.shape), scale), pieces)


def _mean_and_deviation(config: RingConfig, spec: TensorSpec) -> tuple[float, float]:
    if spec.name.endswith(("norm.weight", "layernorm.weight")):
        return 1.0, 0.1
    if spec.name.endswith("bias"):
        return 0.0, 0.05
    if spec.name == "model.word_embeddings.weight" and not config.tie_word_embeddings:
        return 0.0, 1.0
    return 0.0, spec.shape[-1] ** -0.5


@dataclass(frozen=True, slots=True)
class _RandomTensor:
    """Normal numbers in float32, in whole bands of 128 rows that depend on seed and name alone."""

    spec: TensorSpec
    seed: int
    mean_and_deviation: tuple[float, float]

    def pieces(self) -> Iterator[Tensor]:
        mean, deviation = self.mean_and_deviation
        digest = hashlib.sha256(f"{self.seed}/{self.spec.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows = self.spec.shape[0]
        width = math.prod(self.spec.shape[1:])
        step = rows_of_a_piece(width)
        for start in range(0, rows, step):
            size = (min(step, rows - start), *self.spec.shape[1:])
            yield torch.randn(size, generator=generator).mul_(deviation).add_(mean)
