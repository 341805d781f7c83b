"""Random-weight checkpoints of any Ring shape, written exactly as the published ones are.

The writer streams: it holds one piece of one tensor at a time, so a checkpoint of 2 TB needs no
more memory than a small one. Each tensor has its own random stream (seed and name), so that it
does not depend on shards, order or format.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.quant import quantize_block, quantize_channel
from .checkpoint import DTYPE_NAMES, TensorSpec, expected_tensors
from .errors import CheckpointError
from .hub import Progress, ignore_progress, new_folder
from .ring_config import RingConfig, parse_config

Format = Literal["bf16", "f32", "fp8-block", "fp8-channel"]
_PIECE_ELEMENTS = 1 << 24
_SLACK_BYTES = 16 << 20
_PUBLISHED_SHARD_BYTES = 10 << 30


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
        if shape not in SHAPES:
            raise CheckpointError(f"unknown shape {shape!r}; accepted: {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    tokens = special_tokens(shape.vocab_size)
    data = config_json(shape, format, mtp, tokens["<|endoftext|>"])
    config = parse_config(data)
    units = [_unit(config, spec, format, seed) for spec in expected_tensors(config)]
    with new_folder(folder, sum(unit.num_bytes for unit in units) + _SLACK_BYTES):
        write_shards(
            folder, units, shards=shards, max_shard_bytes=max_shard_bytes, on_progress=on_progress
        )
        _write_tokenizer(folder, shape.vocab_size, tokens, template)
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
    if format == "fp8-block":
        data["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
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
    if spec.quantisable and format == "fp8-block":
        rows, columns = spec.shape
        scale_shape = (-(-rows // 128), -(-columns // 128))
        scale = Part(spec.name + "_scale_inv", torch.float32, scale_shape)
        power_of_two = _has_power_of_two_scales(spec.name)

        def quantize(piece: Tensor) -> tuple[Tensor, Tensor]:
            return quantize_block(piece, power_of_two=power_of_two)

    elif spec.quantisable and format == "fp8-channel":
        scale = Part(spec.name + "_scale", torch.bfloat16, (spec.shape[0], 1))

        def quantize(piece: Tensor) -> tuple[Tensor, Tensor]:
            qdata, rows = quantize_channel(piece, scale_dtype=torch.bfloat16)
            return qdata, rows.bfloat16()

    else:
        keeps_f32 = format == "f32" or (
            # releases in format B hold only BF16 and F8_E4M3 (MODEL.md §2.1)
            spec.name.endswith("expert_bias") and format != "fp8-channel"
        )
        dtype = torch.float32 if keeps_f32 else torch.bfloat16
        part = Part(spec.name, dtype, spec.shape)
        return Unit((part,), lambda: ((0, piece.to(dtype)) for piece in make.pieces()))

    def pieces() -> Iterator[tuple[int, Tensor]]:
        # what is quantised is the bf16 weight, as in a conversion of a trained model
        for piece in make.pieces():
            qdata, scales = quantize(piece.bfloat16())
            yield 0, qdata
            yield 1, scales

    return Unit((Part(spec.name, torch.float8_e4m3fn, spec.shape), scale), pieces)


def _has_power_of_two_scales(name: str) -> bool:
    routed = ".experts." in name and ("gate_proj" in name or "up_proj" in name)
    return routed or name.endswith("attention.dense.weight")


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
        step = max(128, _PIECE_ELEMENTS // width // 128 * 128)
        for start in range(0, rows, step):
            size = (min(step, rows - start), *self.spec.shape[1:])
            yield torch.randn(size, generator=generator).mul_(deviation).add_(mean)


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


def _write_shard(path: Path, units: Sequence[Unit]) -> Iterator[int]:
    """Write one safetensors file; yields the bytes of each piece.

    Wide types come first in the file, so that every tensor is aligned whatever its size.
    """
    parts = [part for unit in units for part in unit.parts]
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
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for unit in units:
            cursors = [8 + len(text) + offsets[part.name] for part in unit.parts]
            for index, piece in unit.pieces():
                file.seek(cursors[index])
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data.data)
                cursors[index] += data.nbytes
                yield data.nbytes


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_PUBLISHED_SPECIALS = {
    "<|startoftext|>": 156891,
    "<|endoftext|>": 156892,
    "[CLS]": 156893,
    "[gMASK]": 156894,
    "<|role_end|>": 156895,
    "<think>": 156896,
    "</think>": 156897,
    "<tool_call>": 156898,
    "</tool_call>": 156899,
    "<tool_response>": 156900,
    "</tool_response>": 156901,
    "<role>": 157151,
    "</role>": 157152,
}
# tags that parsers must still see in decoded text
_VISIBLE = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

SIMPLE_TEMPLATE = """\
{% for message in messages %}
{% set role = {'user': 'HUMAN'}.get(message['role'], message['role'] | upper) %}
{{ '<role>' + role + '</role>' + message['content'] }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<role>ASSISTANT</role><think>\\n' }}
{%- endif %}
"""
"""Ring-mini's form (MODEL.md §5.3): no separators, no end tokens, thinking opened by the prompt."""

FULL_TEMPLATE = """\
{% set thinking_option = 'off' %}
{% set last = namespace(user=-1) %}
{% for message in messages %}
{% if message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{% set last.user = loop.index0 %}
{% endif %}
{% endfor %}
{{ '<role>SYSTEM</role>' }}
{%- if messages and messages[0].role == 'system' %}
{{ messages[0].content + '\\n' }}
{%- endif %}
{% if tools %}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}
{{ '\\n' + (tool | tojson) }}
{%- endfor %}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\\n' }}
{%- endif %}
{{ 'detailed thinking ' + thinking_option + '<|role_end|>' }}
{%- for message in messages %}
{% set content = message.content or '' %}
{% if message.role == 'user' %}
{{ '<role>HUMAN</role>' + content + '<|role_end|>' }}
{%- elif message.role == 'system' and not loop.first %}
{{ '<role>SYSTEM</role>' + content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}
{% set reasoning = message.reasoning_content or '' %}
{% if not reasoning and '</think>' in content %}
{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{% endif %}
{% if '</think>' in content %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<role>ASSISTANT</role>' }}
{%- if reasoning and loop.index0 > last.user %}
{{ '\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{%- endif %}
{{ content }}
{%- for call in message.tool_calls or [] %}
{% set function = call.function or call %}
{{ ('\\n' if content or not loop.first else '') + '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{ '<|role_end|>' }}
{%- elif message.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{ '<role>OBSERVATION</role>' }}
{%- endif %}
{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{ '<|role_end|>' }}
{%- endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<role>ASSISTANT</role>' }}
{%- endif %}
"""
"""The chat models' form (MODEL.md §5.3): every turn ends with <|role_end|>, tools and reasoning."""


def special_tokens(vocab_size: int) -> dict[str, int]:
    """Special tokens and their ids: the published ones, or the last ids of a smaller vocabulary.

    Raises CheckpointError if the vocabulary has no room for them and 256 byte tokens.
    """
    if vocab_size > max(_PUBLISHED_SPECIALS.values()):
        return dict(_PUBLISHED_SPECIALS)
    first = vocab_size - len(_PUBLISHED_SPECIALS)
    if first < 256:
        raise CheckpointError(
            f"vocab_size is {vocab_size}; accepted: at least {256 + len(_PUBLISHED_SPECIALS)} "
            f"(256 bytes and {len(_PUBLISHED_SPECIALS)} special tokens)"
        )
    return {token: first + i for i, token in enumerate(_PUBLISHED_SPECIALS)}


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(b)) if b in others else chr(b) for b in range(256)]


def _write_tokenizer(
    folder: Path, vocab_size: int, tokens: dict[str, int], template: Literal["simple", "full"]
) -> None:
    """Byte-level BPE without merges: text is its bytes; the other ids decode to made-up words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    vocab |= tokens
    taken = set(tokens.values())
    # ids that no text encodes to, but that a random model samples all the time
    top = max(taken) if vocab_size > max(_PUBLISHED_SPECIALS.values()) else vocab_size - 1
    vocab |= {_filler_word(i): i for i in range(256, top + 1) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(t, special=t not in _VISIBLE, normalized=False) for t in tokens]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>" if template == "full" else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "gmask_token": "[gMASK]",
        "model_max_length": 10**30,
        "chat_template": FULL_TEMPLATE if template == "full" else SIMPLE_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", named | settings)
    write_json(folder / "special_tokens_map.json", named)


def _filler_word(number: int) -> str:
    """A space and letters, unique to the number."""
    word = ""
    while number:
        number, letter = divmod(number, 26)
        word = chr(ord("a") + letter) + word
    return "Ġ" + word
