"""`config.json` of a Ring/Ling 2.0 checkpoint as a checked, frozen value (MODEL.md §1, §7)."""

from pathlib import Path
from typing import Any, Literal

from msgspec import Struct


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


def parse_config(data: dict[str, Any], generation: dict[str, Any] | None = None) -> RingConfig:
    """Check and resolve a decoded config.json; raises CheckpointError naming the key."""
    raise NotImplementedError


def read_config(folder: Path) -> RingConfig:
    """`parse_config` of the files in a checkpoint folder; raises CheckpointError."""
    raise NotImplementedError
