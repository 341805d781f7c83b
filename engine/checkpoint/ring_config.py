"""`config.json` of a Ring/Ling 2.0 checkpoint as a checked, frozen value (MODEL.md §1, §7)."""

import json
from pathlib import Path
from typing import Any, Literal, cast

from msgspec import Struct

from .. import log
from ..errors import CheckpointError
from .json_keys import Keys, read_json
from .quant_format import QuantFormat, read_quant_format
from .rope_config import (
    LinearScaling,
    YarnScaling,
    read_rope_scaling,
    read_rope_section,
    read_rope_theta,
    read_rotary_dim,
)

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


def parse_config(data: dict[str, Any], generation: dict[str, Any] | None = None) -> RingConfig:
    """Check and resolve a decoded config.json; raises CheckpointError naming the key.

    data        config.json; missing keys take the defaults of the published class (MODEL.md §1.2)
    generation  generation_config.json, for its eos ids

    `num_hidden_layers` is the file's number: which of them are MTP layers only the tensors say
    (§2.2), so `Checkpoint.open` corrects it.
    """
    _refuse_other_architectures(data)
    keys = Keys(data)
    _refuse_other_variants(keys)
    rope = read_rope_section(keys)
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
        rotary_dim=read_rotary_dim(keys, rope, head_dim),
        use_qkv_bias=keys.boolean("use_qkv_bias", False),
        use_bias=keys.boolean("use_bias", False),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=read_rope_theta(keys, rope),
        rope_scaling=read_rope_scaling(rope, max_positions),
        max_position_embeddings=max_positions,
        **_experts(keys),
        first_k_dense_replace=keys.integer("first_k_dense_replace", 1, low=0),
        moe_router_enable_expert_bias=keys.boolean("moe_router_enable_expert_bias", True),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        use_qk_norm=keys.boolean("use_qk_norm", True),
        num_nextn_predict_layers=keys.integer("num_nextn_predict_layers", 0, low=0, null=0),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        dtype=_dtype(keys),
        eos_token_ids=_eos_ids(keys, Keys(generation or {}, "generation_config.json"), vocab_size),
        quant=read_quant_format(keys),
        defaults_used=tuple(keys.defaults_used),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {heads}, not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config


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


def _refuse_other_variants(keys: Keys) -> None:
    """Values that the published definition does not compute."""
    keys.only("hidden_act", "silu")
    keys.only("norm_topk_prob", True)
    keys.only("score_function", "sigmoid")
    keys.only("use_rmsnorm", True)
    keys.only("norm_head", False)
    keys.only("norm_softmax", False)
    keys.only("use_sliding_window", False)


def _experts(keys: Keys) -> dict[str, int]:
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


def _dtype(keys: Keys) -> Literal["bfloat16", "float32", "float16"]:
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


def _eos_ids(keys: Keys, generation: Keys, vocab_size: int) -> tuple[int, ...]:
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
