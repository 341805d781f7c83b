"""config.json: resolved as published, refused by name (MODEL.md §1, §2.3, §3.3, §7)."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine import log
from everstep.engine.checkpoint.make_checkpoint import SHAPES, config_json
from everstep.engine.checkpoint.ring_config import context_length, parse_config, read_config
from everstep.engine.checkpoint.rope_config import LinearScaling, YarnScaling
from everstep.engine.errors import CheckpointError

ARCHITECTURE = "BailingMoeV2ForCausalLM"


def mini(**changes):
    """A published mini config.json with changes; a value of ... removes the key."""
    data = config_json(SHAPES["mini"], "bf16", 0, 156892) | changes
    return {key: value for key, value in data.items() if value is not ...}


def yarn(**changes):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaling |= changes
    return {key: value for key, value in scaling.items() if value is not ...}


def refusal(data, generation=None):
    with pytest.raises(CheckpointError) as caught:
        parse_config(data, generation)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def events(monkeypatch):
    seen = []
    monkeypatch.setattr(log, "event", lambda name, **fields: seen.append((name, fields)))
    return seen


def test_published_sizes_are_read_as_published():
    config = parse_config(mini())
    assert (config.hidden_size, config.num_hidden_layers, config.rotary_dim) == (2048, 20, 64)
    assert (config.num_experts, config.n_group, config.topk_group) == (256, 8, 4)
    assert config.routed_scaling_factor == 2.5
    assert config.defaults_used == ()


def test_rotary_dim_is_read_where_the_factor_is_absent():
    data = config_json(SHAPES["1T"], "bf16", 0, 156892)
    assert "partial_rotary_factor" not in data
    assert "moe_shared_expert_intermediate_size" not in data
    config = parse_config(data)
    assert config.rotary_dim == 64
    assert config.moe_shared_expert_intermediate_size == 2048


def test_rotation_is_full_without_either_key():
    config = parse_config(mini(partial_rotary_factor=...))
    assert config.rotary_dim == 128
    assert "rotary_dim" in config.defaults_used


def test_disagreeing_rotary_keys_are_refused():
    message = refusal(mini(rotary_dim=32))
    assert "partial_rotary_factor gives 64" in message
    assert "rotary_dim gives 32" in message
    assert parse_config(mini(rotary_dim=64)).rotary_dim == 64


def test_missing_keys_take_the_published_defaults_and_are_recorded():
    config = parse_config({"architectures": [ARCHITECTURE]})
    assert (config.hidden_size, config.vocab_size, config.num_experts) == (2048, 157184, 256)
    assert config.routed_scaling_factor == 1.0
    assert config.eos_token_ids == (156892,)
    assert {"hidden_size", "routed_scaling_factor", "eos_token_id"} <= set(config.defaults_used)


def test_lost_routed_scaling_factor_is_a_warning(tmp_path, events):
    (tmp_path / "config.json").write_text(json.dumps(mini(routed_scaling_factor=...)))
    assert read_config(tmp_path).routed_scaling_factor == 1.0
    assert events[0][0] == "checkpoint.defaults"
    assert events[0][1]["level"] == "warning"
    assert "routed_scaling_factor" in events[0][1]["keys"]


@pytest.mark.parametrize("value", [None, 0])
def test_null_sizes_mean_what_the_published_class_says(value):
    config = parse_config(
        mini(head_dim=value, num_experts=value, num_shared_experts=value, n_group=value)
    )
    assert config.head_dim == 2048 // 16
    assert config.num_experts == 0
    assert config.num_shared_experts == 0
    assert (config.n_group, config.topk_group) == (1, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "2048"),
        ("hidden_size", 2048.5),
        ("hidden_size", True),
        ("hidden_size", -1),
        ("hidden_size", None),
        ("vocab_size", 0),
        ("num_key_value_heads", []),
        ("use_qk_norm", 1),
        ("use_qk_norm", "true"),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 0.0),
        ("rope_theta", -1.0),
        ("rope_theta", math.inf),
        ("rope_theta", 10**400),
        ("rope_scaling", "yarn"),
        ("routed_scaling_factor", False),
        ("eos_token_id", "x"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", 157184),
        ("torch_dtype", "int8"),
        ("torch_dtype", 16),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.005),
        ("first_k_dense_replace", -1),
        ("hidden_act", "gelu"),
        ("norm_topk_prob", False),
        ("score_function", "softmax"),
        ("use_rmsnorm", False),
        ("norm_softmax", True),
        ("use_sliding_window", True),
        ("quantization_config", []),
    ],
)
def test_wrong_value_is_refused_by_its_key(key, value):
    message = refusal(mini(**{key: value}))
    assert key in message
    assert "accepted" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 7}, "n_group"),
        ({"n_group": 256}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"n_group": 64, "topk_group": 1}, "topk_group"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"num_attention_heads": 15}, "num_attention_heads"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(changes, named):
    assert named in refusal(mini(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["BailingMoeForCausalLM"]}, "Ling/Ring 1.x"),
        ({"architectures": ["BailingMoeV2_5ForCausalLM"]}, "BailingMoeV2_5ForCausalLM"),
        ({"architectures": ["BailingMoeV3ForCausalLM"]}, "BailingMoeV3ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"architectures": ...}, "architectures"),
        ({"norm_head": True}, "norm_head"),
        ({"model_type": "bailing_hybrid"}, "bailing_hybrid"),
        ({"model_type": "bailing_moe_linear"}, "bailing_moe_linear"),
        ({"model_type": "bailing_moe_v2"}, "Ming"),
        ({"llm_config": {"hidden_size": 1}}, "llm_config"),
        ({"moba_block_size": 1024}, "moba_block_size"),
        ({"layer_group_size": 8}, "layer_group_size"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_other_architectures_are_refused_with_their_reason(changes, reason):
    message = refusal(mini(**changes))
    assert reason in message
    assert "Everstep runs BailingMoeV2ForCausalLM" in message


def test_tell_tale_keys_that_are_switched_off_do_no_harm():
    parse_config(mini(kv_lora_rank=None, layer_types=["full_attention"] * 20, norm_head=False))


def test_eos_ids_are_the_union_of_both_files():
    config = parse_config(mini(), {"eos_token_id": [156892, 156895]})
    assert config.eos_token_ids == (156892, 156895)
    message = refusal(mini(), {"eos_token_id": "end"})
    assert "generation_config.json" in message


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": ..., "dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_dtype_is_read_in_either_spelling(stated, dtype):
    assert parse_config(mini(**stated)).dtype == dtype


def test_disagreeing_dtypes_are_refused():
    assert "dtype" in refusal(mini(dtype="float32"))


def test_yarn_recipe_gives_the_published_attention_factor():
    scaling = parse_config(mini(rope_scaling=yarn())).rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(1.1386294361, abs=1e-10)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)


@pytest.mark.parametrize(
    ("keys", "m"),
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"attn_factor": 1.0}, 0.1 * math.log(4) + 1),
        ({"attn_factor": 0.5}, 0.5 * (0.1 * math.log(4) + 1)),
        ({"attn_factor": 1.0, "attention_factor": 0.1 * math.log(4) + 1}, 0.1 * math.log(4) + 1),
        ({"extrapolation_factor": 1.0}, 0.1 * math.log(4) + 1),
    ],
)
def test_attention_factor_is_resolved_in_every_spelling(keys, m):
    scaling = parse_config(mini(rope_scaling=yarn(**keys))).rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(m, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"attn_factor": 1.0, "attention_factor": 1.0}, "attn_factor gives"),
        ({"extrapolation_factor": 0.5}, "extrapolation_factor"),
        ({"factor": ...}, "factor"),
        ({"factor": 0.5}, "factor"),
        ({"factor": "4"}, "factor"),
        ({"rope_type": "linear"}, "rope_type"),
        ({"type": "dynamic"}, "type"),
        ({"type": "longrope"}, "type"),
        ({"mrope_section": [1, 2]}, "mrope_section"),
        ({"type": ...}, "no type"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"truncate": 1}, "truncate"),
    ],
)
def test_unusable_rope_scaling_is_refused_by_its_key(keys, named):
    assert named in refusal(mini(rope_scaling=yarn(**keys)))


def test_context_under_yarn_is_factor_times_original():
    config = parse_config(mini(rope_scaling=yarn()))
    assert config.max_position_embeddings == 32768
    assert context_length(config) == 131072
    assert context_length(parse_config(mini())) == 32768


def test_missing_original_length_is_the_native_context():
    scaling = parse_config(
        mini(rope_scaling=yarn(original_max_position_embeddings=...))
    ).rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.original_max_position_embeddings == 32768


def test_factor_that_differs_from_the_quotient_is_a_warning(events):
    parse_config(mini(rope_scaling=yarn()))
    assert events[0][0] == "checkpoint.yarn_factor"
    assert (events[0][1]["factor"], events[0][1]["quotient"]) == (4.0, 1.0)
    events.clear()
    parse_config(mini(rope_scaling=yarn(), max_position_embeddings=131072))
    assert events == []


def test_linear_and_default_scaling():
    linear = parse_config(mini(rope_scaling={"rope_type": "linear", "factor": 2}))
    assert linear.rope_scaling == LinearScaling(factor=2.0)
    assert parse_config(mini(rope_scaling={"type": "default"})).rope_scaling is None


def test_rope_parameters_of_newer_files_are_read():
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config = parse_config(
        mini(rope_theta=..., partial_rotary_factor=..., rope_parameters=parameters)
    )
    assert (config.rope_theta, config.rotary_dim, config.rope_scaling) == (10000.0, 32, None)
    assert "rope_theta" in refusal(mini(partial_rotary_factor=..., rope_parameters=parameters))
    both = mini(rope_scaling=yarn(), rope_parameters=yarn(factor=2.0))
    assert "factor" in refusal(both)


def block_section(**changes):
    section = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    return section | changes


def channel_section(weights=None, inputs=None, **changes):
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False} | (weights or {}),
        "input_activations": number | {"strategy": "token", "dynamic": True} | (inputs or {}),
    }
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return section | changes


def test_both_fp8_formats_are_recognised():
    block = parse_config(
        mini(quantization_config=block_section(modules_to_not_convert=["lm_head"]))
    ).quant
    assert block is not None
    assert (block.kind, block.scale_suffix, block.activations) == ("block", "_scale_inv", "group")
    assert block.ignore == ("lm_head",)
    for key in ("quantization_config", "compression_config"):
        channel = parse_config(mini(**{key: channel_section()})).quant
        assert channel is not None
        assert (channel.kind, channel.scale_suffix) == ("channel", "_scale")
        assert (channel.activations, channel.ignore) == ("token", ("lm_head",))


def test_compressed_strategies_and_activations_are_read():
    def scheme(**keys):
        quant = parse_config(mini(quantization_config=channel_section(**keys))).quant
        assert quant is not None
        return quant.kind, quant.activations

    grouped = {"strategy": "group", "group_size": 128}
    blocks = {"strategy": "block", "block_structure": [128, 128]}
    assert scheme(weights=blocks, inputs=grouped) == ("block", "group")
    assert scheme(weights={"strategy": "tensor"}) == ("tensor", "token")
    section = channel_section()
    section["config_groups"]["group_0"]["input_activations"] = None
    quant = parse_config(mini(quantization_config=section)).quant
    assert quant is not None
    assert quant.activations == "none"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4}, "quant_method"),
        (block_section(activation_scheme="static"), "activation_scheme"),
        (block_section(fmt="e5m2"), "fmt"),
        (block_section(weight_block_size=[64, 64]), "weight_block_size"),
        (block_section(weight_block_size=None), "weight_block_size"),
        (block_section(ignored_layers="lm_head"), "ignored_layers"),
        (channel_section(format="pack-quantized"), "format"),
        (channel_section(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (channel_section(config_groups={}), "config_groups"),
        (channel_section(config_groups={"group_0": {}}), "group_0"),
        (channel_section(ignore=["re:["]), "re:["),
        (channel_section(weights={"num_bits": 4}), "num_bits"),
        (channel_section(weights={"type": "int"}), "type"),
        (channel_section(weights={"symmetric": False}), "symmetric"),
        (channel_section(weights={"strategy": "group"}), "strategy"),
        (channel_section(weights={"strategy": "block"}), "block_structure"),
        (channel_section(inputs={"dynamic": False}), "dynamic"),
        (channel_section(inputs={"strategy": "tensor"}), "strategy"),
        (channel_section(inputs={"strategy": "group", "group_size": 64}), "group_size"),
    ],
)
def test_other_quantisations_are_refused_by_the_key(section, named):
    assert named in refusal(mini(quantization_config=section))


def test_groups_with_different_schemes_are_refused():
    section = channel_section()
    groups = section["config_groups"]
    groups["group_1"] = groups["group_0"] | {"input_activations": None}
    assert "group_1" in refusal(mini(quantization_config=section))


def verdict(data):
    """The message of a refusal, or nothing."""
    try:
        parse_config(data)
    except CheckpointError as error:
        return str(error)
    return ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(key=st.sampled_from(sorted(mini())), value=json_values)
def test_any_json_value_is_accepted_or_refused_in_one_line(key, value):
    assert "\n" not in verdict(mini(**{key: value}))


@settings(deadline=None, max_examples=200)
@given(
    key=st.sampled_from(["quantization_config", "rope_scaling"]),
    field=st.sampled_from([*block_section(), *channel_section(), *yarn(), "beta_fast", "mscale"]),
    value=json_values,
)
def test_any_value_inside_a_section_is_accepted_or_refused_in_one_line(key, field, value):
    sections = [yarn()] if key == "rope_scaling" else [block_section(), channel_section()]
    for section in sections:
        assert "\n" not in verdict(mini(**{key: section | {field: value}}))


@settings(deadline=None, max_examples=50)
@given(
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(2, 5),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    dense=st.integers(0, 3),
)
def test_written_shapes_are_read_back(groups, per_group, heads, kv_heads, dense):
    data = mini(
        num_experts=groups * per_group,
        n_group=groups,
        topk_group=1,
        num_experts_per_tok=2,
        num_attention_heads=heads * kv_heads,
        num_key_value_heads=kv_heads,
        first_k_dense_replace=dense,
    )
    config = parse_config(json.loads(json.dumps(data)))
    for key in ("num_experts", "n_group", "num_attention_heads", "first_k_dense_replace"):
        assert getattr(config, key) == data[key]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1'])
def test_malformed_config_json_is_refused_by_its_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_folder_without_config_json_is_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="not a model folder"):
        read_config(tmp_path)
