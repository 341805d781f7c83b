"""Tiny random Ring/Ling 2.0 checkpoints over every switch of the definition, and their writer.

Nothing here comes from the engine: names, shapes and quantisers are written again from the
definition, so that a mistake of the engine's own writer cannot hide one of its reader.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

Format = Literal["none", "block", "channel"]


@dataclass(frozen=True)
class Draw:
    """One checkpoint: its config.json, and what decides about its tensors.

    mtp            "after": MTP layers follow num_hidden_layers layers; "inside": they are among them
    bias_center    expert_bias is drawn from N(center, spread²); a center of -3 makes every choice
                   score negative
    prompt         token ids to run
    """

    config: dict[str, Any]
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    fp8: Format = "none"
    shards: int = 1
    mtp: Literal["after", "inside"] = "after"
    bias_center: float = 0.0
    bias_spread: float = 0.1
    prompt: tuple[int, ...] = (1, 2, 3, 4, 5)

    def with_config(self, **changes: Any) -> "Draw":
        """The same draw with other config values."""
        return replace(self, config=self.config | changes)

    @property
    def main_layers(self) -> int:
        nextn: int = self.config.get("num_nextn_predict_layers", 0)
        layers: int = self.config["num_hidden_layers"]
        return layers - nextn if self.mtp == "inside" else layers


def base_config(**changes: Any) -> dict[str, Any]:
    """A complete small config: 2 layers, the first dense; grouped routing; one shared expert."""
    return {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "use_qkv_bias": False,
        "use_bias": False,
        "use_qk_norm": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 2,
        **changes,
    }


@st.composite
def ring_checkpoints(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    formats: tuple[str, ...] = ("none",),
    max_prompt: int = 24,
) -> Draw:
    """Any valid small checkpoint with a prompt for it."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    layers, mtp, fp8 = draw(st.integers(1, 4)), pick("after", "inside"), pick(*formats)
    experts = draw(expert_keys(layers))
    # an MTP layer is always MoE, so a model without experts has none
    mtp_layers = pick(0, 0, 1) if experts["num_experts"] else 0
    config = base_config(
        **draw(attention_keys()),
        **draw(rotary_keys()),
        **experts,
        vocab_size=draw(st.integers(40, 300)),
        hidden_size=draw(st.integers(16, 64)),
        # above 128 an FP8 matrix has more than one block, the last of them incomplete
        intermediate_size=pick(20, 33, 64, 150),
        moe_intermediate_size=pick(8, 17, 32, 136),
        num_hidden_layers=layers + mtp_layers if mtp == "inside" else layers,
        num_nextn_predict_layers=mtp_layers,
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=pick(1e-6, 1e-5, 1e-2),
    )
    dtype = "bfloat16" if fp8 != "none" else pick(*dtypes)
    config["torch_dtype"] = dtype
    token = st.integers(0, config["vocab_size"] - 1)
    return Draw(
        config=config,
        seed=draw(st.integers(0, 2**20)),
        dtype=dtype,
        fp8=fp8,
        shards=draw(st.integers(1, 3)),
        mtp=mtp,
        bias_center=pick(0.0, 0.0, -3.0),
        bias_spread=pick(0.01, 0.2, 2.0),
        prompt=tuple(draw(st.lists(token, min_size=1, max_size=max_prompt))),
    )


@st.composite
def attention_keys(draw: st.DrawFn) -> dict[str, Any]:
    """Heads and switches of attention; heads·head_dim seldom equals the hidden size."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from((1, 2, 4))),
        "use_qk_norm": draw(st.booleans()),
        "use_qkv_bias": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
    }


@st.composite
def rotary_keys(draw: st.DrawFn) -> dict[str, Any]:
    """head_dim, the three ways to say how much of it rotates, and the three kinds of scaling."""
    head_dim = draw(st.sampled_from((4, 8, 12, 16)))
    keys: dict[str, Any] = {
        "head_dim": head_dim,
        "rope_theta": draw(st.sampled_from((600000.0, 10000.0))),
        **draw(
            st.sampled_from(
                (
                    {"partial_rotary_factor": 1.0},
                    {"partial_rotary_factor": 0.5},
                    {"partial_rotary_factor": None, "rotary_dim": head_dim // 2},
                    {"partial_rotary_factor": None},
                )
            )
        ),
    }
    kind = draw(st.sampled_from(("null", "null", "linear", "yarn")))
    if kind == "linear":
        keys["rope_scaling"] = {"type": "linear", "factor": 2.0}
    elif kind == "yarn":
        keys |= draw(yarn_keys())
    return keys


@st.composite
def yarn_keys(draw: st.DrawFn) -> dict[str, Any]:
    """YaRN over a context so short that prompts of this file leave it."""
    original, factor = draw(st.sampled_from(((8, 4.0), (16, 2.5), (64, 2.0))))
    extra = draw(
        st.sampled_from(
            (
                {},
                {"attention_factor": 1.3},
                {"mscale": 0.7, "mscale_all_dim": 1.4},
                {"beta_fast": 8, "beta_slow": 0.5},
                {"truncate": False},
            )
        )
    )
    scaling = {
        draw(st.sampled_from(("type", "rope_type"))): "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **extra,
    }
    return {"rope_scaling": scaling, "max_position_embeddings": int(original * factor)}


@st.composite
def expert_keys(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Experts, groups and dense layers; every combination that the definition allows."""
    experts = draw(st.sampled_from((None, 4, 8, 16)))
    keys: dict[str, Any] = {
        "num_experts": experts,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_shared_experts": draw(st.sampled_from((0, 1, 2))),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5))),
        "n_group": None,
        "topk_group": None,
    }
    available = experts or 4
    if experts and draw(st.booleans()):
        groups = draw(st.sampled_from([g for g in (1, 2, 4, 8) if experts // g >= 2]))
        kept = draw(st.integers(1, groups))
        keys |= {"n_group": groups, "topk_group": kept}
        available = kept * experts // groups
    keys["num_experts_per_tok"] = draw(st.sampled_from([k for k in (1, 2, 4) if k <= available]))
    return keys


# -- writer --------------------------------------------------------------------------------------


def make_tensors(draw: Draw) -> dict[str, torch.Tensor]:
    """Every tensor of a draw, in storage dtypes; scales stand beside FP8 weights."""
    writer = _Writer(draw)
    config = draw.config
    writer.normal(
        "model.word_embeddings.weight", (config["vocab_size"], config["hidden_size"]), 1.0
    )
    for layer in range(draw.main_layers):
        is_moe = bool(config["num_experts"]) and layer >= config["first_k_dense_replace"]
        writer.layer(layer, is_moe)
    for depth in range(config.get("num_nextn_predict_layers", 0)):
        writer.mtp_layer(draw.main_layers + depth)
    writer.norm("model.norm.weight", config["hidden_size"])
    if not config["tie_word_embeddings"]:
        writer.linear("lm_head", config["vocab_size"], config["hidden_size"], quantised=False)
    return writer.tensors


class _Writer:
    """Draws tensors in a fixed order from one generator."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.random = np.random.default_rng(draw.seed)
        self.dtype = getattr(torch, draw.dtype)
        self.tensors: dict[str, torch.Tensor] = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float, center: float = 0.0) -> None:
        values = self.random.normal(center, std, shape).astype(np.float32)
        self.tensors[name] = torch.from_numpy(values).to(self.dtype)

    def norm(self, name: str, size: int) -> None:
        self.normal(name, (size,), 0.2, center=1.0)

    def linear(self, module: str, out: int, width: int, *, quantised: bool = True) -> None:
        name = f"{module}.weight"
        self.normal(name, (out, width), 1.5 / math.sqrt(width))
        if not quantised or self.draw.fp8 == "none":
            return
        weight = self.tensors[name].float()
        if self.draw.fp8 == "block":
            power = module.endswith("attention.dense") or (
                ".experts." in module and not module.endswith("down_proj")
            )
            self.tensors[name], self.tensors[f"{name}_scale_inv"] = quantize_block(weight, power)
        else:
            self.tensors[name], self.tensors[f"{name}_scale"] = quantize_channel(weight)

    def mlp(self, prefix: str, width: int) -> None:
        hidden = self.draw.config["hidden_size"]
        self.linear(f"{prefix}.gate_proj", width, hidden)
        self.linear(f"{prefix}.up_proj", width, hidden)
        self.linear(f"{prefix}.down_proj", hidden, width)

    def layer(self, layer: int, is_moe: bool) -> None:
        config, at = self.draw.config, f"model.layers.{layer}."
        hidden, size = config["hidden_size"], config["head_dim"]
        query = config["num_attention_heads"] * size
        fused = query + 2 * config["num_key_value_heads"] * size
        self.norm(f"{at}input_layernorm.weight", hidden)
        self.norm(f"{at}post_attention_layernorm.weight", hidden)
        self.linear(f"{at}attention.query_key_value", fused, hidden)
        self.linear(f"{at}attention.dense", hidden, query)
        if config["use_qkv_bias"]:
            self.normal(f"{at}attention.query_key_value.bias", (fused,), 0.5)
        if config["use_bias"]:
            self.normal(f"{at}attention.dense.bias", (hidden,), 0.5)
        if config["use_qk_norm"]:
            self.norm(f"{at}attention.query_layernorm.weight", size)
            self.norm(f"{at}attention.key_layernorm.weight", size)
        if is_moe:
            self.experts(f"{at}mlp")
        else:
            self.mlp(f"{at}mlp", config["intermediate_size"])

    def experts(self, at: str) -> None:
        config = self.draw.config
        experts, width = config["num_experts"], config["moe_intermediate_size"]
        self.normal(f"{at}.gate.weight", (experts, config["hidden_size"]), 0.3)
        self.normal(
            f"{at}.gate.expert_bias", (experts,), self.draw.bias_spread, self.draw.bias_center
        )
        # the release keeps it in float32
        self.tensors[f"{at}.gate.expert_bias"] = self.tensors[f"{at}.gate.expert_bias"].float()
        for e in range(experts):
            self.mlp(f"{at}.experts.{e}", width)
        if config["num_shared_experts"]:
            self.mlp(f"{at}.shared_experts", width * config["num_shared_experts"])

    def mtp_layer(self, layer: int) -> None:
        hidden, at = self.draw.config["hidden_size"], f"model.layers.{layer}."
        self.layer(layer, is_moe=bool(self.draw.config["num_experts"]))
        for norm in ("enorm", "hnorm", "final_layernorm"):
            self.norm(f"{at}{norm}.weight", hidden)
        self.linear(f"{at}eh_proj", hidden, 2 * hidden, quantised=False)


def quantize_block(weight: torch.Tensor, power: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """CONV's quantiser: [out, in] → e4m3 and scales [ceil(out/128), ceil(in/128)], to multiply."""
    out, width = weight.shape
    grid = (math.ceil(out / 128), math.ceil(width / 128))
    scales, stored = torch.empty(grid), torch.empty(out, width)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale = max(float(weight[part].abs().max()), 1e-4) / 448
            if power:
                scale = 2.0 ** math.ceil(math.log2(max(scale, 1e-10)))
            scales[i, j] = scale
            stored[part] = weight[part] / scales[i, j]
    return stored.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def quantize_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """compressed-tensors, strategy channel: e4m3 and one bf16 scale per output row [out, 1]."""
    scales = (weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / 448).bfloat16()
    return (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scales


QUANTIZATION: dict[str, dict[str, Any]] = {
    "block": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*eh_proj$"],
        "kv_cache_scheme": None,
    },
}


def write_checkpoint(folder: Path, draw: Draw) -> Path:
    """config.json and 1 to 3 safetensors files; a weight and its scale often lie in different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in draw.config.items() if not _means_absent(key, value)}
    if draw.fp8 != "none":
        config["quantization_config"] = QUANTIZATION[draw.fp8]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make_tensors(draw)
    if draw.shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(draw.shards):
        file = f"model-{shard + 1:05}-of-{draw.shards:05}.safetensors"
        names = list(tensors)[shard :: draw.shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _means_absent(key: str, value: Any) -> bool:
    """The 1T files have no partial_rotary_factor at all; the other nulls are written as nulls."""
    return key == "partial_rotary_factor" and value is None
