"""The two models, each in the layout of every side, made once into a folder.

default  SmolLM2-135M: ours in Ring's layout (four experts, all chosen), peers the dense twin
moe      random weights: ours in Ring's layout, peers Qwen3-MoE, the nearest architecture they
         have, at the same sizes (softmax instead of sigmoid routing; the same work per token)
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from everstep.engine.checkpoint.convert import convert_default
from everstep.engine.checkpoint.hub import resolve
from everstep.engine.checkpoint.make_checkpoint import Format, RingShape, make_checkpoint

SEED = 0


@dataclass(frozen=True)
class Sizes:
    """What the work of a model is computed from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    chosen: int
    width: int
    vocab: int


SIZES = {
    "default": Sizes(30, 576, 9, 3, 64, 4, 4, 384, 49152),
    "moe": Sizes(8, 1024, 16, 4, 64, 64, 4, 256, 49152),
}
PEER_OF = {"default": "Llama, the dense twin", "moe": "Qwen3-MoE of the same sizes"}


def ring_shape(name: str) -> RingShape:
    s = SIZES[name]
    return RingShape(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.experts * s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        rotary_dim=s.head_dim,
        moe_intermediate_size=s.width,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_shared_experts=0,
        tie_word_embeddings=name == "default",
        use_qk_norm=name == "moe",
    )


def ours(folder: Path, name: str, kind: str) -> Path:
    """Our checkpoint; FP8 weights are random (speed does not depend on them)."""
    if name == "default" and kind == "bf16":
        return resolve("default")
    target = folder / f"{name}-{kind}"
    if not target.exists():
        written: Format = "fp8-block" if kind == "8bit" else "bf16"
        make_checkpoint(target, shape=ring_shape(name), format=written, seed=SEED)
    return target


def peers(folder: Path, name: str) -> Path:
    """The Hugging Face folder that peers load."""
    target = folder / f"{name}-peers"
    dense = folder / "default-peers"
    if not dense.exists():
        convert_default(dense, dense=True)
    if not target.exists():
        _write_qwen3_moe(target, SIZES[name], dense)
    return target


def gguf(folder: Path, name: str, kind: str, source: Path, python: Path) -> Path:
    """The peers' folder as GGUF (BF16 or Q8_0), by llama.cpp's own converter."""
    outtype = "q8_0" if kind == "8bit" else "bf16"
    target = folder / f"{name}-{outtype}.gguf"
    if not target.exists():
        part = target.with_suffix(".part")
        script = source / "convert_hf_to_gguf.py"
        command = [python, script, peers(folder, name), "--outtype", outtype, "--outfile", part]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"convert_hf_to_gguf.py: {done.stderr.splitlines()[-1:]}")
        part.rename(target)
    return target


def _write_qwen3_moe(target: Path, s: Sizes, tokenizer: Path) -> None:
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # tokens are given as ids; llama.cpp's converter wants a tokenizer all the same
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, part)
    save_file(dict(_qwen3_moe_tensors(s)), part / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.experts * s.width,
        "moe_intermediate_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "num_experts": s.experts,
        "num_experts_per_tok": s.chosen,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (part / "config.json").write_text(json.dumps(config, indent=1))
    part.rename(target)


def _qwen3_moe_tensors(s: Sizes) -> Iterator[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        x: torch.Tensor = torch.randn(rows, columns, generator=draw) / columns**0.5
        return x.bfloat16()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield "model.embed_tokens.weight", matrix(s.vocab, s.hidden)
    for layer in range(s.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", ones(s.hidden)
        yield at + "post_attention_layernorm.weight", ones(s.hidden)
        yield at + "self_attn.q_norm.weight", ones(s.head_dim)
        yield at + "self_attn.k_norm.weight", ones(s.head_dim)
        yield at + "self_attn.q_proj.weight", matrix(queries, s.hidden)
        yield at + "self_attn.k_proj.weight", matrix(keys, s.hidden)
        yield at + "self_attn.v_proj.weight", matrix(keys, s.hidden)
        yield at + "self_attn.o_proj.weight", matrix(s.hidden, queries)
        yield at + "mlp.gate.weight", matrix(s.experts, s.hidden)
        for expert in range(s.experts):
            yield f"{at}mlp.experts.{expert}.gate_proj.weight", matrix(s.width, s.hidden)
            yield f"{at}mlp.experts.{expert}.up_proj.weight", matrix(s.width, s.hidden)
            yield f"{at}mlp.experts.{expert}.down_proj.weight", matrix(s.hidden, s.width)
    yield "model.norm.weight", ones(s.hidden)
    yield "lm_head.weight", matrix(s.vocab, s.hidden)
