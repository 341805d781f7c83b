"""The exact set of tensors that a configuration calls for (MODEL.md §2.1, §2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass

from .ring_config import RingConfig


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a configuration calls for; `quantisable`: it may be FP8 with a scale."""

    name: str
    shape: tuple[int, ...]
    quantisable: bool = False


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
