"""A checkpoint folder is checked from its headers and read tensor by tensor (MODEL.md §2)."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from everstep.engine.checkpoint.checkpoint import (
    Checkpoint,
    StoredLinear,
    dequantize,
    tensor_digest,
)
from everstep.engine.checkpoint.expected_tensors import expected_tensors
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import combine_digests
from everstep.engine.checkpoint.quant_format import is_ignored
from everstep.engine.errors import CheckpointError

EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Tiny checkpoints by format, made once; tests change copies of them."""
    root = tmp_path_factory.mktemp("originals")
    return {
        name: make_checkpoint(root / name, format=name, mtp=1)
        for name in ("f32", "bf16", "fp8-block", "fp8-channel")
    }


@pytest.fixture
def copy(originals, tmp_path):
    def build(format="bf16"):
        return Path(shutil.copytree(originals[format], tmp_path / format))

    return build


def edit_config(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_tensors(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def shard(folder, put_in_second):
    """Cut model.safetensors in two with an index; returns both paths."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[put_in_second(name)] for name in tensors}
    for file in names:
        part = {n: t.clone() for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
    return folder / names[0], folder / names[1]


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


# reading


@pytest.mark.parametrize("format", ["f32", "bf16", "fp8-block", "fp8-channel"])
def test_every_tensor_is_read_as_it_is_stored(originals, format):
    checkpoint = Checkpoint.open(originals[format])
    stored = load_file(originals[format] / "model.safetensors")
    assert checkpoint.names == tuple(sorted(stored))
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8))


@pytest.mark.parametrize(
    ("format", "kind", "step"),
    [("bf16", "plain", 0), ("fp8-block", "block", 16), ("fp8-channel", "channel", 16)],
)
def test_linear_dequantises_to_the_weight_that_was_quantised(originals, format, kind, step):
    plain = Checkpoint.open(originals["bf16"])
    checkpoint = Checkpoint.open(originals[format])
    for name in (EXPERT, "model.layers.0.mlp.down_proj", "model.layers.4.attention.dense"):
        linear = checkpoint.linear(name)
        assert linear.kind == kind
        assert linear.bias is None
        weight = plain.tensor(name + ".weight").float()
        bound = weight.abs() / step + weight.abs().max() * 2**-16 if step else 0.0
        assert torch.all((dequantize(linear) - weight).abs() <= bound)
    router = checkpoint.linear("model.layers.1.mlp.gate")
    assert router.kind == "plain"
    assert checkpoint.linear("model.layers.4.eh_proj").kind == "plain"


def test_scale_in_another_shard_is_found(copy):
    folder = copy("fp8-block")
    shard(folder, lambda name: name.endswith("_scale_inv"))
    linear = Checkpoint.open(folder).linear(EXPERT)
    assert linear.kind == "block"
    assert linear.scale is not None
    assert linear.scale.dtype == torch.float32


def test_channel_scales_of_either_shape_and_type_are_columns(copy):
    folder = copy("fp8-channel")

    def flatten(tensors):
        for name in [n for n in tensors if n.endswith("_scale")]:
            tensors[name] = tensors[name].reshape(-1).float()

    before = Checkpoint.open(folder).linear(EXPERT).scale
    edit_tensors(folder, flatten)
    after = Checkpoint.open(folder).linear(EXPERT).scale
    assert before is not None
    assert after is not None
    assert before.shape == (32, 1)
    assert torch.equal(before, after)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_per_tensor_is_expanded_to_rows(copy, shape):
    folder = copy("fp8-channel")
    data = json.loads((folder / "config.json").read_text())
    group = data["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["strategy"] = "tensor"
    edit_config(folder, quantization_config=data["quantization_config"])

    def one_scale(tensors):
        for name in [n for n in tensors if n.endswith("_scale")]:
            tensors[name] = torch.full(shape, 0.5)

    edit_tensors(folder, one_scale)
    linear = Checkpoint.open(folder).linear(EXPERT)
    assert linear.kind == "channel"
    assert linear.scale is not None
    assert torch.equal(linear.scale, torch.full((32, 1), 0.5))


def test_unquantised_layers_inside_an_fp8_checkpoint_load(copy):
    folder = copy("fp8-block")

    def widen(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.4.")]:
            if name + "_scale_inv" in tensors:
                del tensors[name + "_scale_inv"]
                tensors[name] = tensors[name].bfloat16()

    edit_tensors(folder, widen)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.linear("model.layers.4.attention.dense").kind == "plain"
    assert checkpoint.linear("model.layers.3.attention.dense").kind == "block"


def test_biases_are_loaded_by_presence(copy):
    folder = copy("f32")

    def add_biases(tensors):
        for layer in range(5):
            tensors[f"model.layers.{layer}.attention.query_key_value.bias"] = torch.ones(256)
            tensors[f"model.layers.{layer}.attention.dense.bias"] = torch.ones(64)

    edit_tensors(folder, add_biases)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.use_qkv_bias
    assert checkpoint.config.use_bias
    bias = checkpoint.linear("model.layers.2.attention.dense").bias
    assert bias is not None
    assert torch.equal(bias, torch.ones(64))


def test_plain_linear_dequantises_to_itself_in_float32():
    weight = torch.randn(3, 4).bfloat16()
    assert torch.equal(dequantize(StoredLinear(weight, None, "plain")), weight.float())


# MTP layers (§2.2)


def test_mtp_layers_are_recognised_under_both_index_conventions(copy):
    folder = copy()
    after = Checkpoint.open(folder).config
    edit_config(folder, num_hidden_layers=5)
    inside = Checkpoint.open(folder).config
    for config in (after, inside):
        assert (config.num_hidden_layers, config.num_nextn_predict_layers) == (4, 1)


def test_stripped_checkpoint_has_no_mtp_layers(copy):
    folder = copy()

    def strip(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.4.")]:
            del tensors[name]

    edit_tensors(folder, strip)
    config = Checkpoint.open(folder).config
    assert (config.num_hidden_layers, config.num_nextn_predict_layers) == (4, 0)


def test_mtp_layer_is_never_run_as_a_main_layer(copy):
    folder = copy()
    edit_config(folder, num_hidden_layers=5, num_nextn_predict_layers=0)
    message = refusal(folder)
    assert "first MTP layer" in message
    assert "layer 4" in message


def test_mtp_count_that_disagrees_is_refused(copy):
    folder = copy()
    edit_config(folder, num_nextn_predict_layers=2)
    assert "num_nextn_predict_layers" in refusal(folder)


@pytest.mark.parametrize("nextn", [0, 1])
def test_folder_of_an_mtp_layer_alone_is_refused_as_such(copy, nextn):
    folder = copy()

    def keep_mtp(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("model.layers.4."):
                tensors[name.replace("layers.4.", "layers.0.")] = tensor

    edit_tensors(folder, keep_mtp)
    edit_config(
        folder, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=nextn
    )
    message = refusal(folder)
    assert "MTP-only" in message
    assert "whole model" in message
    assert "\n" not in message


# what is ignored


def test_published_leftovers_are_ignored(copy):
    folder = copy()

    def add(tensors):
        tensors["model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["v_head.weight"] = torch.ones(1, 64)

    clean = Checkpoint.open(folder)
    digest = clean.content_digest()
    edit_tensors(folder, add)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names == clean.names
    assert checkpoint.content_digest() == digest


def test_head_of_a_tied_model_is_ignored(copy):
    folder = copy()
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(folder).names


def test_expert_bias_may_be_absent_only_if_it_is_switched_off(copy):
    folder = copy()

    def drop(tensors):
        for name in [n for n in tensors if n.endswith("expert_bias")]:
            del tensors[name]

    edit_tensors(folder, drop)
    assert "expert_bias" in refusal(folder)
    edit_config(folder, moe_router_enable_expert_bias=False)
    assert not Checkpoint.open(folder).config.moe_router_enable_expert_bias


def test_shared_width_is_taken_from_the_tensor(copy):
    folder = copy()
    edit_config(folder, moe_shared_expert_intermediate_size=48)
    assert Checkpoint.open(folder).config.moe_shared_expert_intermediate_size == 32

    def widen(tensors):
        for layer in range(1, 5):
            prefix = f"model.layers.{layer}.mlp.shared_experts."
            tensors[prefix + "gate_proj.weight"] = torch.zeros(48, 64).bfloat16()
            tensors[prefix + "up_proj.weight"] = torch.zeros(48, 64).bfloat16()
            tensors[prefix + "down_proj.weight"] = torch.zeros(64, 48).bfloat16()

    edit_tensors(folder, widen)
    assert Checkpoint.open(folder).config.moe_shared_expert_intermediate_size == 48
    edit_config(folder, moe_shared_expert_intermediate_size=56)
    assert "shared_experts" in refusal(folder)


# faults of tensors


def test_missing_tensor_is_named(copy):
    folder = copy()
    edit_tensors(folder, lambda tensors: tensors.pop(EXPERT + ".weight"))
    assert f"missing {EXPERT}.weight" in refusal(folder)


def test_many_missing_tensors_are_counted_on_one_line(copy):
    folder = copy()

    def drop(tensors):
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]

    edit_tensors(folder, drop)
    assert f"and {4 * 8 * 3 - 5} more" in refusal(folder)


def test_unknown_tensor_is_named(copy):
    folder = copy()
    edit_tensors(folder, lambda tensors: tensors.update({"model.surprise": torch.ones(1)}))
    assert "unknown model.surprise" in refusal(folder)


def test_layer_beyond_the_last_is_refused(copy):
    folder = copy()
    edit_config(folder, num_hidden_layers=3, num_nextn_predict_layers=0)
    assert "layer 4" in refusal(folder)


def test_mis_shaped_tensor_is_named_with_both_shapes(copy):
    folder = copy()
    wrong = torch.zeros(32, 65).bfloat16()
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT + ".weight": wrong}))
    message = refusal(folder)
    assert f"{EXPERT}.weight has shape [32, 65]; accepted: [32, 64]" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (EXPERT + ".weight", torch.zeros(32, 64, dtype=torch.int8)),
        (EXPERT + ".weight", torch.zeros(32, 64, dtype=torch.float8_e5m2)),
        (EXPERT + ".weight", torch.zeros(32, 64, dtype=torch.float64)),
        (EXPERT + ".weight", torch.zeros(32, 64).to(torch.float8_e4m3fn)),
        ("model.norm.weight", torch.zeros(64).to(torch.float8_e4m3fn)),
        ("model.layers.1.mlp.gate.weight", torch.zeros(8, 64, dtype=torch.int64)),
    ],
)
def test_mis_typed_tensor_is_named_with_the_accepted_types(copy, name, tensor):
    folder = copy()
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    message = refusal(folder)
    assert name in message
    assert "accepted: BF16, F16, F32" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT + ".weight", "model.layers.2.mlp.gate.expert_bias"])
def test_value_that_is_not_finite_is_refused_when_read(copy, name, value):
    folder = copy()
    edit_tensors(folder, lambda tensors: tensors[name].view(-1).__setitem__(7, value))
    checkpoint = Checkpoint.open(folder)
    checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=rf"{name} holds a value that is not finite"):
        checkpoint.tensor(name)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan_is_refused_when_read(copy, code):
    folder = copy("fp8-block")
    name = EXPERT + ".weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(torch.uint8)[3].fill_(code))
    with pytest.raises(CheckpointError, match="not finite"):
        Checkpoint.open(folder).linear(EXPERT)


def test_unknown_name_is_refused_when_read(originals):
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing"):
        Checkpoint.open(originals["bf16"]).tensor("model.nothing")


# faults of FP8


def test_fp8_weight_without_its_scale_is_refused(copy):
    folder = copy("fp8-block")
    edit_tensors(folder, lambda tensors: tensors.pop(EXPERT + ".weight_scale_inv"))
    assert f"missing {EXPERT}.weight_scale_inv" in refusal(folder)


def test_scale_beside_a_plain_weight_is_refused(copy):
    folder = copy("fp8-block")
    plain = torch.zeros(32, 64).bfloat16()
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT + ".weight": plain}))
    assert f"unknown {EXPERT}.weight_scale_inv" in refusal(folder)


def test_scale_of_the_wrong_shape_is_refused(copy):
    folder = copy("fp8-channel")
    name = EXPERT + ".weight_scale"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(31, 1)}))
    assert f"{name} has shape [31, 1]; accepted: [32, 1] or [32]" in refusal(folder)


@pytest.mark.parametrize(
    ("suffix", "reason"), [("input_scale", "static"), ("weight_zero_point", "asymmetric")]
)
def test_static_scales_and_zero_points_are_refused_with_the_reason(copy, suffix, reason):
    folder = copy("fp8-channel")
    name = f"{EXPERT}.{suffix}"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    message = refusal(folder)
    assert name in message
    assert reason in message


def test_fp8_without_a_quantization_config_is_refused(copy):
    folder = copy("fp8-block")
    edit_config(folder, quantization_config=None)
    assert "quantization_config" in refusal(folder)


def test_fp8_tensor_of_an_excluded_module_is_refused(copy):
    folder = copy("fp8-block")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    section["modules_to_not_convert"] = ["model.layers.2.attention"]
    edit_config(folder, quantization_config=section)
    message = refusal(folder)
    assert "model.layers.2.attention" in message
    assert "excludes" in message


@pytest.mark.parametrize(
    ("module", "entry", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.1.mlp.gate", "mlp.gate", True),
        ("model.layers.1.mlp.gate_proj", "mlp.gate", False),
        ("model.layers.1.mlp.gate_proj", "model.layers.1", True),
        ("model.layers.11.mlp.gate_proj", "model.layers.1", False),
        ("model.layers.1.mlp.gate", r"re:.*mlp\.gate$", True),
        ("model.layers.1.mlp.gate_proj", r"re:.*mlp\.gate$", False),
    ],
)
def test_exceptions_match_whole_words_or_patterns(module, entry, ignored):
    assert is_ignored(module, (entry,)) is ignored


# faults of files


def test_missing_shard_is_named(copy):
    folder = copy()
    _, second = shard(folder, lambda name: ".experts." in name)
    Checkpoint.open(folder)
    second.unlink()
    assert f"{second} is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file_is_named(copy, keep):
    folder = copy()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    message = refusal(folder)
    assert str(path) in message
    assert "truncated" in message or "not a safetensors file" in message


def test_trailing_bytes_are_refused(copy):
    folder = copy()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "trailing bytes" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [b"{}]", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'],
)
def test_malformed_header_is_refused(copy, header):
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert str(path) in refusal(folder)


def test_tensor_that_the_index_lists_but_no_shard_holds_is_named(copy):
    folder = copy()
    shard(folder, lambda name: ".experts." in name)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    assert "lacks model.ghost" in refusal(folder)


def test_tensor_in_another_shard_than_the_index_says_is_named(copy):
    folder = copy()
    shard(folder, lambda name: ".experts." in name)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][EXPERT + ".weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    assert f"holds {EXPERT}.weight" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": "../outside.safetensors"}, {"a": 3}])
def test_unusable_index_is_refused(copy, weight_map):
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refusal(folder)


def test_folder_without_weights_or_config_is_refused(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)
    (folder / "config.json").unlink()
    assert "not a model folder" in refusal(folder)


# digests


def test_digest_depends_on_content_and_not_on_files(copy):
    folder = copy()
    single = Checkpoint.open(folder)
    digest = single.content_digest()
    shard(folder, lambda name: ".experts." in name)
    seen = []
    sharded = Checkpoint.open(folder)
    assert sharded.content_digest(lambda *progress: seen.append(progress)) == digest
    assert seen[0] == ("digest", 0, len(sharded.names))
    assert seen[-1] == ("digest", len(sharded.names), len(sharded.names))


def test_digest_changes_with_a_name_a_type_a_shape_or_a_bit():
    tensor = torch.arange(6, dtype=torch.float32)
    digests = {
        tensor_digest("a", tensor),
        tensor_digest("b", tensor),
        tensor_digest("a", tensor.view(2, 3)),
        tensor_digest("a", tensor.view(3, 2)),
        tensor_digest("a", tensor.bfloat16()),
        tensor_digest("a", tensor + 1e-6),
    }
    assert len(digests) == 6


def test_digest_is_the_documented_one():
    tensor = torch.tensor([[1.0, 2.0]])
    head = b"w\0F32\0" + b"1,2" + b"\0"
    expected = hashlib.sha256(head + tensor.numpy().tobytes()).hexdigest()
    assert tensor_digest("w", tensor) == expected
    assert tensor_digest("w", torch.stack([tensor[0], tensor[0]])[:1]) == expected
    total = hashlib.sha256(bytes.fromhex(expected) * 2).hexdigest()
    assert combine_digests({"w": expected, "x": expected}) == total


def test_parameter_counts_of_published_sizes_are_the_published_ones():
    import math

    from everstep.engine.checkpoint.make_checkpoint import SHAPES, config_json
    from everstep.engine.checkpoint.ring_config import parse_config

    for name, billions in (("mini", 16.256), ("flash", 102.890), ("1T", 999.705)):
        config = parse_config(config_json(SHAPES[name], "bf16", 0, 156892))
        total = sum(math.prod(spec.shape) for spec in expected_tensors(config))
        assert round(total / 1e9, 3) == billions
