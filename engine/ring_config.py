"""`config.json` of a Ring/Ling 2.0 checkpoint as a checked, frozen value (MODEL.md §1, §7)."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, Literal, cast

from msgspec import Struct

from . import log
from .errors import CheckpointError

ARCHITECTURE = "BailingMoeV2ForCausalLM"
_SUPPORTED = f"Everstep runs {ARCHITECTURE} (Ring/Ling 2.0)"
_OTHER_MODEL_TYPES = {
    "bailing_hybrid": "Ling/Ring 2.5 and later, hybrid linear attention",
    "bailing_moe_linear": "Ring-linear, hybrid linear attention",
    "bailing_moe_v2": "Ming, multimodal",
}
# keys that only other architectures have, whatever their `architectures` say
_TELL_TALES = {
    "moba_block_size": "block-sparse attention",
    "layer_group_size": "hybrid linear attention",
    "group_norm_size": "hybrid linear attention",
    "linear_silu": "hybrid linear attention",
    "kv_lora_rank": "multi-head latent attention",
    "q_lora_rank": "multi-head latent attention",
    "llm_config": "multimodal",
    "vision_config": "multimodal",
    "audio_config": "multimodal",
    "image_gate": "multimodal router",
    "audio_gate": "multimodal router",
    "multi_gate": "multimodal router",
    "image_patch_token": "multimodal",
    "audio_patch_token": "multimodal",
}
_YARN_KEYS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "finetuned"),
    *("original_max_position_embeddings", "max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim"),
    "truncate",
}
_MISSING = object()


class YarnScaling(Struct, frozen=True, kw_only=True):
    """`rope_scaling` of type yarn (MODEL.md §3.3); `attention_factor` is m, resolved."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


class LinearScaling(Struct, frozen=True, kw_only=True):
    """`rope_scaling` of type linear: positions divided by `factor`."""

    factor: float


class QuantFormat(Struct, frozen=True, kw_only=True):
    """How the FP8 tensors of a checkpoint are scaled (MODEL.md §2.3).

    kind         block: [ceil(out/128), ceil(in/128)] scales; channel: [out, 1]; tensor: one
    scale_suffix what follows `.weight`: `_scale_inv` (format A) or `_scale` (format B)
    activations  group: 1×128 groups; token: one scale per row; none: weight-only
    """

    kind: Literal["block", "channel", "tensor"]
    scale_suffix: Literal["_scale_inv", "_scale"]
    activations: Literal["group", "token", "none"]
    ignore: tuple[str, ...] = ()


class RingConfig(Struct, frozen=True, kw_only=True):
    """The architecture, every key resolved; names are the checkpoint's own where one exists."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Main layers: MTP layers are not counted (MODEL.md §2.2)."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    use_qkv_bias: bool = False
    use_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    rope_scaling: YarnScaling | LinearScaling | None = None
    max_position_embeddings: int = 32768
    num_experts: int = 256
    """0: every layer is dense."""
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    moe_shared_expert_intermediate_size: int = 512
    """Width of the shared MLP, times num_shared_experts already."""
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 1
    moe_router_enable_expert_bias: bool = True
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = True
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    """Union of config.json and generation_config.json (MODEL.md §5.2)."""
    quant: QuantFormat | None = None
    defaults_used: tuple[str, ...] = ()
    """Keys that were missing, for the log."""

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.first_k_dense_replace


def context_length(config: RingConfig) -> int:
    """Positions that may be used: native, or factor · original under YaRN (MODEL.md §1.2)."""
    if isinstance(config.rope_scaling, YarnScaling):
        scaling = config.rope_scaling
        return int(scaling.factor * scaling.original_max_position_embeddings)
    return config.max_position_embeddings


def read_config(folder: Path) -> RingConfig:
    """`parse_config` of the files in a checkpoint folder, logging every default it used.

    Raises CheckpointError if config.json is missing, is not JSON, or cannot be run.
    """
    path = folder / "config.json"
    data = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else None
    config = parse_config(data, generation)
    if config.defaults_used:
        # published files never leave this one out, and without it every expert is scaled wrongly
        serious = config.num_experts > 0 and "routed_scaling_factor" in config.defaults_used
        log.event(
            "checkpoint.defaults",
            level="warning" if serious else "info",
            file=str(path),
            keys=",".join(config.defaults_used),
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {path.name}"
        raise CheckpointError(f"{path.parent} is not a model folder: {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {_json_type(data)}; a JSON object is accepted")
    return data


def parse_config(data: dict[str, Any], generation: dict[str, Any] | None = None) -> RingConfig:
    """Check and resolve a decoded config.json; raises CheckpointError naming the key.

    data        config.json; missing keys take the defaults of the published class (MODEL.md §1.2)
    generation  generation_config.json, for its eos ids

    `num_hidden_layers` is the file's number: which of them are MTP layers only the tensors say
    (§2.2), so `Checkpoint.open` corrects it.
    """
    _refuse_other_architectures(data)
    keys = _Keys(data)
    _refuse_other_variants(keys)
    rope = _rope_section(keys)
    heads = keys.integer("num_attention_heads", 16)
    hidden = keys.integer("hidden_size", 2048)
    head_dim = keys.integer("head_dim", 128, low=0, null=0) or hidden // heads
    max_positions = keys.integer("max_position_embeddings", 32768)
    vocab_size = keys.integer("vocab_size", 157184)
    config = RingConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", 5120),
        num_hidden_layers=keys.integer("num_hidden_layers", 20),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        rotary_dim=_rotary_dim(keys, rope, head_dim),
        use_qkv_bias=keys.boolean("use_qkv_bias", False),
        use_bias=keys.boolean("use_bias", False),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(keys, rope),
        rope_scaling=_rope_scaling(rope, max_positions),
        max_position_embeddings=max_positions,
        **_experts(keys),
        first_k_dense_replace=keys.integer("first_k_dense_replace", 1, low=0),
        moe_router_enable_expert_bias=keys.boolean("moe_router_enable_expert_bias", True),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        use_qk_norm=keys.boolean("use_qk_norm", True),
        num_nextn_predict_layers=keys.integer("num_nextn_predict_layers", 0, low=0, null=0),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        dtype=_dtype(keys),
        eos_token_ids=_eos_ids(keys, _Keys(generation or {}, "generation_config.json"), vocab_size),
        quant=_quant_format(keys),
        defaults_used=tuple(keys.defaults_used),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {heads}, not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config


class _Keys:
    """Typed access to a JSON object; a wrong type or range is a CheckpointError naming the key."""

    def __init__(self, data: dict[str, Any], where: str = "config.json") -> None:
        self.data = data
        self.where = where
        self.defaults_used: list[str] = []

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.data.get(key) is not None

    def wrong(self, key: str, accepted: str) -> CheckpointError:
        value = json.dumps(self.data.get(key))
        shown = value if len(value) <= 80 else value[:77] + "..."
        return CheckpointError(f"{self.where}: {key} is {shown}; accepted: {accepted}")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.data:
            if default is _MISSING:
                raise CheckpointError(f"{self.where}: {key} is missing")
            self.defaults_used.append(key)
            return default
        return self.data[key]

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 1, null: Any = None) -> int:
        """An integer ≥ low; `null` is what JSON null means, if it means anything."""
        value = self._get(key, default)
        if value is None and null is not None:
            value = null
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.wrong(key, f"an integer >= {low}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, low: float = 0.0) -> float:
        """A finite number, > 0 and ≥ low."""
        value = self._get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        # the upper end also keeps integers that no float holds out
        if not good or not 0 < value <= sys.float_info.max or value < low:
            raise self.wrong(key, f"a finite number >= {low:g}" if low else "a finite number > 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def section(self, key: str) -> "_Keys | None":
        """The object under a key, or None if missing or null."""
        if not self.has(key):
            return None
        if not isinstance(self.data[key], dict):
            raise self.wrong(key, "an object or null")
        return _Keys(self.data[key], f"{self.where}: {key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; missing or null is empty."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings or null")
        return tuple(value)

    def only(self, key: str, *accepted: Any) -> None:
        """The key, if present and not null, must hold one of these values."""
        value = self.data.get(key)
        # `1 == True` and `0 == False` in Python, not in JSON
        if value is not None and not any(
            value == item and type(value) is type(item) for item in accepted
        ):
            raise self.wrong(key, " or ".join(json.dumps(item) for item in accepted))


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _refuse_other_architectures(data: dict[str, Any]) -> None:
    names = data.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"config.json: architectures is {json.dumps(names)}; "
            f'accepted: ["{ARCHITECTURE}"], since {_SUPPORTED}'
        )
    reason = ""
    if names[0] != ARCHITECTURE:
        reason = {"BailingMoeForCausalLM": "Ling/Ring 1.x"}.get(names[0], "another architecture")
    elif meaning := _OTHER_MODEL_TYPES.get(str(data.get("model_type"))):
        reason = f"model_type {data['model_type']}: {meaning}"
    elif data.get("norm_head"):
        reason = "norm_head: Ling/Ring 1.x"
    else:
        for key, meaning in _TELL_TALES.items():
            # a null, false or 0 says that the feature is off
            if data.get(key):
                reason = f"{key}: {meaning}"
                break
    if reason:
        name = json.dumps(names[0])[1:-1]
        raise CheckpointError(f"unsupported architecture {name} ({reason}); {_SUPPORTED}")
    layers = data.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        other = next((k for k in layers if k != "full_attention"), layers)
        raise CheckpointError(
            f"unsupported architecture {names[0]} (layer_types has {json.dumps(other)}); "
            f"{_SUPPORTED}"
        )


def _refuse_other_variants(keys: _Keys) -> None:
    """Values that the published definition does not compute."""
    keys.only("hidden_act", "silu")
    keys.only("norm_topk_prob", True)
    keys.only("score_function", "sigmoid")
    keys.only("use_rmsnorm", True)
    keys.only("norm_head", False)
    keys.only("norm_softmax", False)
    keys.only("use_sliding_window", False)


def _experts(keys: _Keys) -> dict[str, int]:
    """The fields of RingConfig about experts and groups, checked against each other."""
    num_experts = keys.integer("num_experts", 256, low=0, null=0)
    shared = keys.integer("num_shared_experts", 1, low=0, null=0)
    width = keys.integer("moe_intermediate_size", 512)
    top_k = keys.integer("num_experts_per_tok", 8)
    shared_width = width
    if keys.has("moe_shared_expert_intermediate_size"):
        shared_width = keys.integer("moe_shared_expert_intermediate_size")
    groups = keys.integer("n_group", 8, low=0, null=0)
    kept = keys.integer("topk_group", 4, low=0, null=0)
    if groups <= 1 or kept == 0 or num_experts == 0:
        groups = kept = 1
    if num_experts:
        _check_routing(num_experts, top_k, groups, kept)
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_shared_experts": shared,
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": shared_width * shared,
        "n_group": groups,
        "topk_group": kept,
    }


def _check_routing(num_experts: int, top_k: int, groups: int, kept: int) -> None:
    size, rest = divmod(num_experts, groups)
    fault = ""
    if top_k > num_experts:
        fault = f"num_experts_per_tok is {top_k}; accepted: 1..num_experts = {num_experts}"
    elif rest or (groups > 1 and size < 2):
        fault = f"n_group is {groups}; accepted: a divisor of num_experts {num_experts} that leaves 2 per group"
    elif kept > groups:
        fault = f"topk_group is {kept}; accepted: 1..n_group = {groups}"
    elif kept * size < top_k:
        fault = f"topk_group is {kept}: {kept * size} experts are kept, num_experts_per_tok needs {top_k}"
    if fault:
        raise CheckpointError(f"config.json: {fault}")


def _rope_section(keys: _Keys) -> _Keys:
    """`rope_scaling`, or what transformers ≥ 5 calls `rope_parameters`; both must agree."""
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    if old is not None and new is not None:
        for key in old.data.keys() & new.data.keys():
            if old.data[key] != new.data[key]:
                raise new.wrong(key, f"{json.dumps(old.data[key])}, as in rope_scaling")
        return _Keys(old.data | new.data, new.where)
    return old or new or _Keys({}, "config.json: rope_scaling")


def _rope_theta(keys: _Keys, rope: _Keys) -> float:
    if not rope.has("rope_theta"):
        return keys.number("rope_theta", 600000.0)
    theta = rope.number("rope_theta")
    if keys.has("rope_theta") and keys.number("rope_theta") != theta:
        raise rope.wrong("rope_theta", f"{keys.number('rope_theta'):g}, as at the top level")
    return theta


def _rotary_dim(keys: _Keys, rope: _Keys, head_dim: int) -> int:
    """partial_rotary_factor, else rotary_dim, else the whole head (MODEL.md §1.2)."""
    stated: dict[str, int] = {}
    for source in (keys, rope):
        if source.has("partial_rotary_factor"):
            name = f"{source.where}: partial_rotary_factor"
            stated[name] = int(head_dim * source.number("partial_rotary_factor"))
    if keys.has("rotary_dim"):
        stated["config.json: rotary_dim"] = keys.integer("rotary_dim")
    if not stated:
        keys.defaults_used.append("rotary_dim")
        stated["config.json: head_dim"] = head_dim
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{name} gives {value}" for name, value in stated.items())
        raise CheckpointError(f"the rotary dimension is stated twice: {said}; accepted: one value")
    name, value = next(iter(stated.items()))
    if value < 2 or value > head_dim or value % 2:
        raise CheckpointError(
            f"{name} gives {value} rotary dimensions; accepted: an even number 2..head_dim = {head_dim}"
        )
    return value


def _rope_scaling(rope: _Keys, max_positions: int) -> YarnScaling | LinearScaling | None:
    rope.only("type", "yarn", "linear", "default")
    rope.only("rope_type", "yarn", "linear", "default")
    kinds = {rope.data[key] for key in ("type", "rope_type") if rope.has(key)}
    if len(kinds) > 1:
        raise rope.wrong("rope_type", f"{json.dumps(rope.data['type'])}, as in type")
    if not kinds:
        if unknown := sorted(rope.data.keys() - {"rope_theta", "partial_rotary_factor"}):
            raise CheckpointError(f"{rope.where} has {unknown[0]} but no type or rope_type")
        return None
    kind = kinds.pop()
    if kind == "linear":
        return LinearScaling(factor=rope.number("factor", low=1.0))
    return _yarn(rope, max_positions) if kind == "yarn" else None


def _yarn(rope: _Keys, max_positions: int) -> YarnScaling:
    if unknown := sorted(rope.data.keys() - _YARN_KEYS):
        raise CheckpointError(
            f"{rope.where}: {unknown[0]} is not a known key of type yarn; "
            f"accepted: {', '.join(sorted(_YARN_KEYS))}"
        )
    factor = rope.number("factor", low=1.0)
    original = max_positions
    if rope.has("original_max_position_embeddings"):
        original = rope.integer("original_max_position_embeddings")
        if not math.isclose(factor, max_positions / original):
            # transformers 4.52.3 computes the quotient and never looks at the factor
            log.event(
                "checkpoint.yarn_factor",
                level="warning",
                factor=factor,
                quotient=max_positions / original,
                used="factor",
            )
    if rope.has("extrapolation_factor") and rope.number("extrapolation_factor") != 1.0:
        raise rope.wrong("extrapolation_factor", "1")
    # 0 and null mean "not given" to the published code
    beta_fast = rope.number("beta_fast") if rope.data.get("beta_fast") else 32.0
    beta_slow = rope.number("beta_slow") if rope.data.get("beta_slow") else 1.0
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.boolean("truncate", True),
    )


def _attention_factor(rope: _Keys, factor: float) -> float:
    """m of MODEL.md §3.3, in whichever spelling the file has; the spellings must agree.

    attention_factor is m itself; mscale and mscale_all_dim give a quotient; attn_factor (SGLang,
    vLLM) multiplies the standard value.
    """

    def standard(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    stated: dict[str, float] = {}
    if rope.has("attention_factor"):
        stated["attention_factor"] = rope.number("attention_factor")
    elif rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        quotient = standard(rope.number("mscale")) / standard(rope.number("mscale_all_dim"))
        stated["mscale / mscale_all_dim"] = quotient
    if rope.has("attn_factor"):
        stated["attn_factor"] = rope.number("attn_factor") * standard(1.0)
    values = list(stated.values()) or [standard(1.0)]
    if not math.isclose(values[0], values[-1], rel_tol=1e-6):
        said = ", ".join(f"{name} gives {value:.6g}" for name, value in stated.items())
        raise CheckpointError(
            f"{rope.where}: the attention factor is stated twice: {said}; accepted: one value"
        )
    return values[0]


def _dtype(keys: _Keys) -> Literal["bfloat16", "float32", "float16"]:
    accepted = ("bfloat16", "float32", "float16")
    stated = set()
    for key in ("dtype", "torch_dtype"):
        if keys.has(key):
            value = keys.data[key]
            name = value.removeprefix("torch.") if isinstance(value, str) else ""
            if name not in accepted:
                raise keys.wrong(key, ", ".join(accepted))
            stated.add(name)
    if len(stated) > 1:
        raise keys.wrong("dtype", f"{json.dumps(keys.data['torch_dtype'])}, as in torch_dtype")
    if not stated:
        keys.defaults_used.append("dtype")
        return "bfloat16"
    return cast(Literal["bfloat16", "float32", "float16"], stated.pop())


def _eos_ids(keys: _Keys, generation: _Keys, vocab_size: int) -> tuple[int, ...]:
    """Union of both files' `eos_token_id`, each an integer, a list or null (MODEL.md §5.2)."""
    found: list[int] = []
    for source in (keys, generation):
        value = source.data.get("eos_token_id")
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < vocab_size:
                raise source.wrong("eos_token_id", f"ids in 0..{vocab_size - 1}, or null")
            found.append(item)
    if "eos_token_id" not in keys.data and vocab_size > 156892:
        keys.defaults_used.append("eos_token_id")
        found.append(156892)
    return tuple(dict.fromkeys(found))


def _quant_format(keys: _Keys) -> QuantFormat | None:
    """`quantization_config` of either FP8 format, or None (MODEL.md §2.3)."""
    section = keys.section("quantization_config")
    old = keys.section("compression_config")
    if section is not None and old is not None and section.data != old.data:
        raise CheckpointError(
            "config.json: quantization_config and compression_config differ; accepted: one of them"
        )
    section = section or old
    if section is None:
        return None
    method = section.data.get("quant_method")
    if method == "fp8":
        found = _block_format(section)
    elif method == "compressed-tensors":
        found = _compressed_format(section)
    else:
        raise section.wrong("quant_method", '"fp8" or "compressed-tensors"')
    for entry in found.ignore:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise CheckpointError(
                    f"{section.where}: the pattern {entry!r} cannot be compiled: {error}"
                ) from error
    return found


def _block_format(section: _Keys) -> QuantFormat:
    section.only("activation_scheme", "dynamic")
    section.only("fmt", "e4m3")
    if section.data.get("weight_block_size") != [128, 128]:
        raise section.wrong("weight_block_size", "[128, 128]")
    ignore = section.strings("modules_to_not_convert") + section.strings("ignored_layers")
    return QuantFormat(kind="block", scale_suffix="_scale_inv", activations="group", ignore=ignore)


def _compressed_format(section: _Keys) -> QuantFormat:
    section.only("format", "float-quantized")
    if section.has("kv_cache_scheme"):
        raise section.wrong("kv_cache_scheme", "null")
    sparsity = section.section("sparsity_config")
    if sparsity is not None:
        sparsity.only("format", "dense")
    groups = section.section("config_groups")
    if groups is None or not groups.data:
        raise section.wrong("config_groups", "an object with at least one group")
    found = {name: _config_group(groups, name) for name in groups.data}
    first, kinds = next(iter(found)), next(iter(found.values()))
    for name, other in found.items():
        if other != kinds:
            raise CheckpointError(
                f"{groups.where}: {first} is {'/'.join(kinds)} and {name} is {'/'.join(other)}; "
                f"accepted: one scheme for all groups"
            )
    return QuantFormat(
        kind=cast(Literal["block", "channel", "tensor"], kinds[0]),
        scale_suffix="_scale",
        activations=cast(Literal["group", "token", "none"], kinds[1]),
        ignore=section.strings("ignore"),
    )


def _config_group(groups: _Keys, name: str) -> tuple[str, str]:
    """(weights' strategy, activations) of one entry of `config_groups`."""
    group = groups.section(name)
    weights = group.section("weights") if group is not None else None
    if group is None or weights is None:
        raise groups.wrong(name, "an object with weights")
    group.only("format", "float-quantized")
    if group.has("output_activations"):
        raise group.wrong("output_activations", "null")
    _check_e4m3(weights)
    weights.only("dynamic", False)
    weights.only("strategy", "channel", "tensor", "block")
    strategy = weights.data.get("strategy")
    if strategy is None:
        raise weights.wrong("strategy", '"channel", "tensor" or "block"')
    if strategy == "block" and weights.data.get("block_structure") != [128, 128]:
        raise weights.wrong("block_structure", "[128, 128]")
    inputs = group.section("input_activations")
    if inputs is None:
        return strategy, "none"
    _check_e4m3(inputs)
    if inputs.data.get("dynamic") is not True:
        raise inputs.wrong("dynamic", "true (scales stored in the file are not supported)")
    scheme = inputs.data.get("strategy")
    if scheme == "group":
        inputs.only("group_size", 128)
    elif scheme != "token":
        raise inputs.wrong("strategy", '"token" or "group"')
    return strategy, scheme


def _check_e4m3(scheme: _Keys) -> None:
    for key, value in (("num_bits", 8), ("type", "float")):
        if scheme.data.get(key) != value:
            raise scheme.wrong(key, json.dumps(value))
    scheme.only("symmetric", True)
