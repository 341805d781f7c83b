"""The demo's model before it has learned anything: a small Ring MoE, and its tokenizer.

Sizes were tried (docs/howto/demo.md): 459 thousand parameters learn to subtract in minutes on two
cores, and have all that Ring-1T's layers have: groups of experts, a shared one, QK norm, half-rotary.
"""

import math
from pathlib import Path

import torch

from ...engine.checkpoint.expected_tensors import TensorSpec, expected_tensors
from ...engine.checkpoint.hub import new_folder
from ...engine.checkpoint.json_keys import write_json
from ...engine.checkpoint.make_checkpoint import RingShape, config_json
from ...engine.checkpoint.ring_config import RingConfig, parse_config
from ...engine.checkpoint.safetensors_writer import Part, Unit, write_shards
from ...engine.rollout import derive_seed
from .euclid import EOS, EOS_ID, IDS, PAD, TOKENS

SHAPE = RingShape(
    vocab_size=16,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
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
    rope_theta=10000.0,
    max_position_embeddings=512,
)
TEMPLATE = "{{ messages[-1].content }}{% if add_generation_prompt %}<think>{% endif %}"
"""`everstep chat` asks with the four digits of a pair."""


def write_model(folder: Path, seed: int) -> Path:
    """Write the checkpoint, in float32; returns the folder. Raises CheckpointError if it is taken."""
    data = config_json(SHAPE, "f32", 0, EOS_ID)
    config = parse_config(data)
    units = [_unit(config, spec, seed) for spec in expected_tensors(config)]
    with new_folder(folder, sum(unit.num_bytes for unit in units)):
        write_shards(folder, units)
        write_tokenizer(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID})
        write_json(folder / "config.json", data)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A token per character, and the tags."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    specials = [token for token in TOKENS if len(token) > 1]
    tokenizer.add_tokens(
        [AddedToken(token, special=token in (PAD, EOS), normalized=False) for token in specials]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": EOS, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHAPE.max_position_embeddings,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", named | settings)
    write_json(folder / "special_tokens_map.json", named)


def _unit(config: RingConfig, spec: TensorSpec, seed: int) -> Unit:
    mean, deviation = _mean_and_deviation(config, spec)
    draw = torch.Generator().manual_seed(derive_seed("euclid model", seed, spec.name))
    values = torch.randn(spec.shape, generator=draw) * deviation + mean
    return Unit((Part(spec.name, torch.float32, spec.shape),), lambda: iter([(0, values)]))


def _mean_and_deviation(config: RingConfig, spec: TensorSpec) -> tuple[float, float]:
    """Of the normal numbers that a tensor begins with."""
    name = spec.name
    if name.endswith("norm.weight"):
        return 1.0, 0.0
    if name.endswith("bias"):
        return 0.0, 0.0
    if name == "model.word_embeddings.weight":
        return 0.0, 1.0
    if name == "lm_head.weight" or name.endswith("mlp.gate.weight"):
        return 0.0, 0.02
    deviation = 1 / math.sqrt(spec.shape[-1])
    if name.endswith(("attention.dense.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    return 0.0, deviation
