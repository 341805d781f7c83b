"""Random checkpoints: published names and keys, streamed, refused before a byte is written."""

import json
import shutil
import weakref
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers

from everstep.engine.checkpoint.checkpoint import Checkpoint, dequantize
from everstep.engine.checkpoint.make_checkpoint import SHAPES, config_json, make_checkpoint, resize
from everstep.engine.checkpoint.random_tokenizer import byte_alphabet, special_tokens
from everstep.engine.checkpoint.safetensors_writer import Part, Unit, write_shards
from everstep.engine.errors import CheckpointError
from everstep.kernels.quant import quantize_block, quantize_channel

FORMATS = ["bf16", "f32", "fp8-block", "fp8-channel"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: make_checkpoint(root / name, format=name) for name in FORMATS}


def render(folder, messages, **options):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(messages=messages, **options)


@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_checkpoint_opens_and_every_value_is_finite(tmp_path, format, mtp):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", format=format, mtp=mtp))
    assert checkpoint.config.num_nextn_predict_layers == mtp
    assert checkpoint.config.defaults_used == ()
    for name in checkpoint.names:
        checkpoint.tensor(name)


def test_tiny_is_small(tiny):
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in tiny.values()]
    assert max(sizes) < 2_000_000


def test_same_seed_gives_the_same_content_however_it_is_sharded(tmp_path, tiny):
    digest = Checkpoint.open(tiny["bf16"]).content_digest()
    for name, options in (
        ("again", {}),
        ("shards", {"shards": 3}),
        ("bytes", {"max_shard_bytes": 100_000}),
    ):
        folder = make_checkpoint(tmp_path / name, **options)
        assert Checkpoint.open(folder).content_digest() == digest
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert Checkpoint.open(other).content_digest() != digest


def test_shards_are_named_and_indexed_as_published(tmp_path):
    folder = make_checkpoint(tmp_path / "m", shards=3)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    checkpoint = Checkpoint.open(folder)
    tensors = [checkpoint.tensor(name) for name in checkpoint.names]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)


def test_shards_keep_within_the_limit(tmp_path):
    folder = make_checkpoint(tmp_path / "m", max_shard_bytes=100_000)
    # headers come on top of the tensors' bytes
    assert max(p.stat().st_size for p in folder.glob("*.safetensors")) < 110_000


@pytest.mark.parametrize("format", ["fp8-block", "fp8-channel"])
def test_fp8_is_the_quantiser_applied_to_the_bf16_checkpoint(tiny, format):
    plain, quantised = Checkpoint.open(tiny["bf16"]), Checkpoint.open(tiny[format])
    for name, power_of_two in (
        ("model.layers.1.attention.dense", True),
        ("model.layers.1.attention.query_key_value", False),
        ("model.layers.2.mlp.experts.7.gate_proj", True),
        ("model.layers.2.mlp.experts.7.up_proj", True),
        ("model.layers.2.mlp.experts.7.down_proj", False),
        ("model.layers.2.mlp.shared_experts.gate_proj", False),
        ("model.layers.0.mlp.gate_proj", False),
    ):
        weight = plain.tensor(name + ".weight")
        if format == "fp8-block":
            qdata, scale = quantize_block(weight, power_of_two=power_of_two)
        else:
            qdata, scale = quantize_channel(weight, scale_dtype=torch.bfloat16)
        stored = quantised.linear(name)
        assert torch.equal(stored.weight.view(torch.uint8), qdata.view(torch.uint8))
        assert stored.scale is not None
        assert torch.equal(stored.scale, scale)


def test_stored_types_are_the_published_ones(tiny):
    def types(format):
        return {entry.dtype for entry in Checkpoint.open(tiny[format]).entries.values()}

    assert types("bf16") == {"BF16", "F32"}
    assert types("f32") == {"F32"}
    assert types("fp8-block") == {"BF16", "F32", "F8_E4M3"}
    assert types("fp8-channel") == {"BF16", "F8_E4M3"}
    bf16 = Checkpoint.open(tiny["bf16"]).entries
    assert {n.rpartition(".")[2] for n, e in bf16.items() if e.dtype == "F32"} == {"expert_bias"}


def test_weights_have_the_scale_that_keeps_logits_sensible(tiny):
    checkpoint = Checkpoint.open(tiny["f32"])
    for name, expected in (
        ("lm_head", 64**-0.5),
        ("model.layers.1.mlp.gate", 64**-0.5),
        ("model.layers.0.mlp.down_proj", 128**-0.5),
    ):
        assert dequantize(checkpoint.linear(name)).std().item() == pytest.approx(expected, rel=0.1)
    assert checkpoint.tensor("model.norm.weight").mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"use_qk_norm": False, "use_qkv_bias": True, "use_bias": True},
        {"num_shared_experts": 2},
        {"num_shared_experts": 0},
        {"num_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
        {"first_k_dense_replace": 0, "hidden_size": 72, "intermediate_size": 100},
        {"states_rotary_dim": True, "states_shared_width": False},
        {"moe_intermediate_size": 33, "vocab_size": 269},
    ],
)
@pytest.mark.parametrize("format", ["f32", "fp8-block", "fp8-channel"])
def test_any_ring_shape_can_be_made(tmp_path, changes, format):
    shape = replace(SHAPES["tiny"], **changes)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", shape=shape, format=format))
    for name in checkpoint.names:
        checkpoint.tensor(name)
    for key in changes.keys() - {"states_rotary_dim", "states_shared_width"}:
        assert getattr(checkpoint.config, key) == changes[key]


def test_published_shapes_spell_their_keys_as_released():
    tokens = special_tokens(157184)
    assert (tokens["<|endoftext|>"], tokens["<|role_end|>"], tokens["</role>"]) == (
        156892,
        156895,
        157152,
    )
    flash = config_json(SHAPES["flash"], "fp8-block", 0, tokens["<|endoftext|>"])
    assert flash["partial_rotary_factor"] == 0.5
    assert flash["moe_shared_expert_intermediate_size"] == 1024
    assert "rotary_dim" not in flash
    assert flash["quantization_config"]["weight_block_size"] == [128, 128]
    large = config_json(SHAPES["1T"], "fp8-channel", 0, tokens["<|endoftext|>"])
    assert large["rotary_dim"] == 64
    assert large["first_k_dense_replace"] == 4
    section = large["quantization_config"]
    assert section["format"] == "float-quantized"
    assert {"lm_head", "model.layers.4.mlp.gate"} <= set(section["ignore"])


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    make_checkpoint(tmp_path / "m", on_progress=lambda *progress: seen.append(progress))
    assert seen[-1][0] == "write"
    assert seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_writer_holds_one_piece_at_a_time(tmp_path):
    alive: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []

    def pieces():
        for _ in range(8):
            piece = torch.ones(1000)
            alive.append(weakref.ref(piece))
            most.append(sum(reference() is not None for reference in alive))
            yield 0, piece

    unit = Unit((Part("w", torch.float32, (8, 1000)),), pieces)
    write_shards(tmp_path, [unit])
    # the one before may still be bound while the next is made
    assert max(most) <= 2


# tokenizer and templates


def test_text_is_its_bytes_and_round_trips(tiny):
    tokenizer = Tokenizer.from_file(str(tiny["bf16"] / "tokenizer.json"))
    text = "Hello, wörld! 123\n\t😀"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_every_id_of_the_vocabulary_decodes(tiny):
    tokenizer = Tokenizer.from_file(str(tiny["bf16"] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPES["tiny"].vocab_size
    assert all(tokenizer.id_to_token(i) is not None for i in range(SHAPES["tiny"].vocab_size))


def test_special_tokens_are_single_and_tags_stay_visible(tiny):
    folder = tiny["bf16"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = special_tokens(SHAPES["tiny"].vocab_size)
    for token, index in tokens.items():
        assert tokenizer.encode(token).ids == [index]
    ids = tokenizer.encode("<role>ASSISTANT</role><think>x</think><tool_call>").ids
    assert tokenizer.decode(ids) == "ASSISTANT<think>x</think><tool_call>"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokens["<|endoftext|>"], tokens["<|role_end|>"]]


def test_simple_template_is_the_published_form(tiny):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert render(tiny["bf16"], messages, add_generation_prompt=True) == (
        "<role>SYSTEM</role>S<role>HUMAN</role>Hi<role>ASSISTANT</role>Hello."
        "<role>HUMAN</role>Bye<role>ASSISTANT</role><think>\n"
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("full") / "m", template="full")


def test_full_template_is_the_published_form(full):
    user = [{"role": "user", "content": "Hi"}]
    off = "detailed thinking off<|role_end|>"
    assert render(full, user, add_generation_prompt=True) == (
        f"<role>SYSTEM</role>{off}<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    )
    turns = [{"role": "system", "content": "Be brief."}, *user]
    turns += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]
    assert render(full, turns, add_generation_prompt=True) == (
        f"<role>SYSTEM</role>Be brief.\n{off}<role>HUMAN</role>Hi<|role_end|>"
        "<role>ASSISTANT</role>Hello.<|role_end|><role>HUMAN</role>Bye<|role_end|><role>ASSISTANT</role>"
    )


def test_full_template_prints_tools_calls_and_results(full):
    tools = [{"type": "function", "function": {"name": "a", "description": "é"}}]
    head = render(full, [{"role": "user", "content": "Hi"}], tools=tools)
    assert head.startswith("<role>SYSTEM</role># Tools\n\nYou may call one or more functions")
    assert (
        '<tools>\n{"type": "function", "function": {"name": "a", "description": "é"}}\n</tools>'
        in head
    )
    assert head.endswith(
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
        "detailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|>"
    )
    calls = [{"function": {"name": "a", "arguments": {"x": 1}}}, {"name": "b", "arguments": "{}"}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ok.", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
    ]
    call = '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>'
    assert render(full, messages).split("Hi<|role_end|>")[1] == (
        f"<role>ASSISTANT</role>Ok.\n{call}\n"
        '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|role_end|>"
        f"<role>ASSISTANT</role>{call}<|role_end|>"
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Ok.", "reasoning_content": "because"},
        {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nOk."},
    ],
)
def test_full_template_keeps_only_the_reasoning_after_the_last_user_message(full, turn):
    user = {"role": "user", "content": "Hi"}
    kept = render(full, [user, turn])
    assert kept.endswith("<role>ASSISTANT</role>\n<think>\nbecause\n</think>\n\nOk.<|role_end|>")
    dropped = render(full, [user, turn, user])
    assert "<role>ASSISTANT</role>Ok.<|role_end|>" in dropped
    result = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    assert "because" in render(full, [user, turn, result])


# refusals


def refusal(*arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        make_checkpoint(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_preset_is_refused_with_the_known_ones(tmp_path):
    message = refusal(tmp_path / "m", shape="huge")
    assert "huge" in message
    assert "tiny, mini, flash, 1T" in message


def test_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    assert "vocab_size is 268" in refusal(
        tmp_path / "m", shape=replace(SHAPES["tiny"], vocab_size=268)
    )


def test_sizes_that_no_ring_model_has_are_refused(tmp_path):
    assert "n_group" in refusal(tmp_path / "m", shape=replace(SHAPES["tiny"], n_group=3))
    assert not (tmp_path / "m").exists()


def test_folder_that_is_not_empty_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not an empty folder" in refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_target_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refusal(tmp_path / "file")
    assert "cannot be written" in refusal(tmp_path / "file" / "m")


def test_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # the suite may run as root, whom no mode bits stop
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "permission denied" in refusal(tmp_path / "m")


def test_disk_that_is_too_small_is_refused_with_both_figures(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 500_000_000))
    message = refusal(tmp_path / "m", shape="mini")
    assert "needs 32.5" in message
    assert "0.500 GB are free" in message
    assert not (tmp_path / "m").exists()


def test_disk_that_fills_up_is_one_line_and_can_be_retried(tmp_path, monkeypatch):
    def full_disk(path, units):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("everstep.engine.checkpoint.safetensors_writer._write_shard", full_disk)
    assert "No space left" in refusal(tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []
    monkeypatch.undo()
    make_checkpoint(tmp_path / "m")


def test_a_size_of_a_preset_can_be_changed_by_name():
    shape = resize("tiny", ["hidden_size=96", "rope_theta=1e4", "tie_word_embeddings=true"])
    assert (shape.hidden_size, shape.rope_theta, shape.tie_word_embeddings) == (96, 1e4, True)
    assert shape.num_hidden_layers == SHAPES["tiny"].num_hidden_layers


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("width=3", "unknown size 'width'; accepted: vocab_size, hidden_size"),
        ("hidden_size=many", "size hidden_size must be a whole number, got 'many'"),
        ("use_bias=maybe", "size use_bias must be true or false, got 'maybe'"),
        ("use_bias", "size 'use_bias' must be KEY=VALUE"),
    ],
)
def test_a_size_that_cannot_be_is_named(size, message):
    with pytest.raises(CheckpointError, match=message):
        resize("tiny", [size])
