"""The reference against hand-made cases: nothing here runs the engine."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.errors import CheckpointError
from everstep.engine.proofs import reference as ref
from everstep.engine.proofs.reference import MLP, Reference, dense

from .ring_draws import (
    Draw,
    base_config,
    make_tensors,
    quantize_block,
    ring_checkpoints,
    write_checkpoint,
)


def make_shape(**changes):
    """Shape of the base config with some keys of config.json changed."""
    return ref.read_shape(base_config(**changes))


def identity_mlp(size, factor=1.0):
    """An MLP whose output is factor · silu(x) · x."""
    eye = np.eye(size)
    return MLP(dense(eye), dense(eye), dense(factor * eye))


# -- number formats


def test_bf16_rounding_is_torch_rounding_to_nearest_even():
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ties = np.float32([1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 9.2e-41, 3.4e38])
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).bfloat16().double().numpy()
    np.testing.assert_array_equal(ref.to_bf16(values.astype(np.float64)), expected)


def test_bf16_rounding_of_a_float64_is_one_rounding():
    # just above the tie: rounding to float32 first would fall back onto it, and then to even
    assert ref.to_bf16(np.array([1.0 + 2**-8 + 2**-40]))[0] == 1.0 + 2**-7


def test_e4m3_table_and_rounding_agree_with_torch():
    bytes_ = np.arange(256, dtype=np.uint8)
    stored = torch.from_numpy(bytes_).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(ref.decode(bytes_, "F8_E4M3"), stored)
    values = np.concatenate([np.linspace(-448, 448, 40001), np.linspace(-0.05, 0.05, 4001)])
    values = values.astype(np.float32).astype(np.float64)
    expected = torch.from_numpy(values).float().to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(ref.to_e4m3(values), expected)
    assert ref.to_e4m3(np.array([1e9, -460.0])).tolist() == [448.0, -448.0]


def test_activation_groups_do_not_share_scales_and_the_last_may_be_shorter():
    x = np.ones((2, 200))
    x[0, 130] = 1e6
    x[1] = 0.0
    q = ref.quantize_groups(x, 128)
    np.testing.assert_allclose(q[0, :128], 1.0, rtol=1e-6)
    assert q[0, 131] == 0.0  # 1 beside 1000000 is below the smallest step
    assert not q[1].any()
    assert ref.quantize_groups(x, None)[0, 0] == 0.0


def test_dequantisation_multiplies_by_the_block_scale(tmp_path):
    draw = Draw(
        base_config(intermediate_size=150, hidden_size=40), fp8="block", dtype="bfloat16", shards=3
    )
    stored = make_tensors(draw)
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[f"{name}_scale_inv"].shape == (1, 2)
    scale = stored[f"{name}_scale_inv"].double().repeat_interleave(128, 1)[:, :150]
    expected = (stored[name].double() * scale).numpy()
    model = Reference(write_checkpoint(tmp_path, draw))
    got = model.linear("model.layers.0.mlp.down_proj")
    np.testing.assert_array_equal(got.rows(0, 40), expected)
    np.testing.assert_array_equal(got.rows(7, 9), expected[7:9])
    # in bf16 the float32 product is rounded once
    rounded = (stored[name].float() * scale.float()).bfloat16().double().numpy()
    model = Reference(tmp_path, dtype="bfloat16")
    np.testing.assert_array_equal(model.linear("model.layers.0.mlp.down_proj").rows(0, 40), rounded)


def test_power_of_two_scales_are_rounded_up():
    weight = torch.full((3, 3), 1.0)
    stored, scale = quantize_block(weight, power=True)
    assert float(scale) == 2.0**-8
    assert float(stored.float()[0, 0]) * float(scale) == 1.0


# -- configuration


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"partial_rotary_factor": 0.5}, 64),
        ({"rotary_dim": 64}, 64),
        ({"rotary_dim": 64, "partial_rotary_factor": 0.5}, 64),
        ({}, 128),
    ],
)
def test_rotary_dim_is_read_from_either_key(keys, expected):
    assert ref.read_shape(keys).rotary_dim == expected


def test_disagreeing_rotary_keys_are_refused():
    with pytest.raises(CheckpointError, match="disagrees"):
        ref.read_shape({"partial_rotary_factor": 0.5, "rotary_dim": 32})


def test_defaults_are_those_of_the_published_class():
    shape = ref.read_shape({})
    assert (shape.experts, shape.topk, shape.groups, shape.topk_groups) == (256, 8, 8, 4)
    assert (shape.routed_scale, shape.theta, shape.dense_layers) == (1.0, 600000.0, 1)
    assert ref.read_shape({"head_dim": None}).head_dim == 128  # 2048 / 16
    assert ref.read_shape({"n_group": 0, "topk_group": 0}).groups == 1


# -- rotary


def yarn_shape(factor, original):
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return make_shape(head_dim=128, rope_scaling=scaling)


def test_yarn_agrees_with_the_published_values():
    shape = yarn_shape(4.0, 32768)
    assert ref.yarn_range(shape) == (12, 21)
    inverse, m = ref.inverse_frequencies(shape)
    assert m == pytest.approx(1.1386294361, rel=1e-9)
    expected = {
        10: 1.5643276953e-2,
        14: 2.4710275184e-3,
        17: 4.9690565840e-4,
        20: 8.1570704614e-5,
        31: 6.3147474305e-7,
    }
    for pair, value in expected.items():  # published as float32
        assert inverse[pair] == pytest.approx(value, rel=3e-7)
    shape = yarn_shape(2.0, 65536)
    assert ref.yarn_range(shape) == (13, 23)
    inverse, m = ref.inverse_frequencies(shape)
    assert m == pytest.approx(1.0693147181, rel=1e-9)
    assert inverse[17] == pytest.approx(6.8147067e-4, rel=3e-7)
    unscaled, _ = ref.inverse_frequencies(make_shape(head_dim=128))
    assert unscaled[31] == pytest.approx(2.5258989722e-6, rel=3e-7)


def test_linear_scaling_divides_every_frequency():
    scaled, m = ref.inverse_frequencies(make_shape(rope_scaling={"type": "linear", "factor": 2.0}))
    np.testing.assert_array_equal(scaled * 2, ref.inverse_frequencies(make_shape())[0])
    assert m == 1.0


def test_attention_factor_beats_mscale_beats_the_default():
    assert ref.yarn_attention_factor({"factor": 4.0, "attention_factor": 1.5}) == 1.5
    gain = lambda c: 0.1 * c * math.log(4) + 1  # noqa: E731
    pair = {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4}
    assert ref.yarn_attention_factor(pair) == pytest.approx(gain(0.7) / gain(1.4))
    assert ref.yarn_attention_factor({"factor": 4.0, "mscale": 0.7}) == pytest.approx(gain(1))
    assert ref.yarn_attention_factor({"factor": 0.5}) == 1.0


def test_rotation_turns_halves_and_leaves_the_rest():
    u = np.arange(1.0, 7.0).reshape(1, 1, 6)  # R = 4: pairs (1, 3) and (2, 4); 5 and 6 pass
    cos, sin = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    turned = ref.rotate(u, cos, sin, ref.keep)
    assert turned[0, 0].tolist() == [-3.0, 2.0, 1.0, 4.0, 5.0, 6.0]


def test_rotated_scores_depend_on_the_distance_only():
    shape = make_shape()
    u = np.random.default_rng(0).normal(size=(1, 1, 8))
    cos, sin = ref.rope_tables(shape, np.array([3, 5, 103, 105]))
    r = [ref.rotate(u, cos[i : i + 1], sin[i : i + 1], ref.keep).ravel() for i in range(4)]
    assert r[0] @ r[1] == pytest.approx(r[2] @ r[3], rel=1e-9)


def test_float32_tables_are_the_float32_formula():
    shape = make_shape(head_dim=16)
    cos, _ = ref.rope_tables(shape, np.arange(300), "float32")
    inverse = 1.0 / (600000.0 ** (torch.arange(0, 8, 2).float() / 8))
    angle = torch.arange(300).float()[:, None] * inverse
    np.testing.assert_allclose(cos, angle.cos().numpy(), atol=2e-5)
    np.testing.assert_allclose(cos[:, 0], angle.cos().numpy()[:, 0], atol=1e-7)


# -- modules


def test_rms_by_hand_and_its_two_roundings():
    x, w = np.array([[3.0, 4.0]]), np.array([1.0, 2.0])
    np.testing.assert_allclose(ref.rms(x, w, 0.0), [[3 / 12.5**0.5, 8 / 12.5**0.5]])
    w = ref.to_bf16(np.array([1.1, 1.1]))
    rounded = ref.rms(x, w, 0.0, ref.to_bf16)
    assert rounded[0, 0] == ref.to_bf16(w[:1] * ref.to_bf16(np.array([3 / 12.5**0.5])))[0]


def test_mlp_by_hand():
    assert ref.mlp(np.array([[2.0]]), identity_mlp(1, 3.0))[0, 0] == pytest.approx(
        3 * 2 * 2 / (1 + math.exp(-2))
    )
    assert ref.sigmoid(np.array([-800.0, 800.0])).tolist() == [0.0, 1.0]


def attention_weights(shape, seed=0):
    random = np.random.default_rng(seed)
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = random.normal(size=(rows, shape.hidden)) / 4
    out = random.normal(size=(shape.hidden, shape.heads * shape.head_dim)) / 4
    return random, qkv, out


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_against_loops_over_heads_and_positions(qk_norm):
    # heads·D = 32 is not the hidden size, R = 2 is less than D = 8
    shape = make_shape(hidden_size=20, head_dim=8, partial_rotary_factor=0.25)
    random, qkv, out = attention_weights(shape)
    bias, y = random.normal(size=len(qkv)), random.normal(size=(5, 20))
    norms = (random.normal(size=8), random.normal(size=8)) if qk_norm else None
    tables = ref.rope_tables(shape, np.arange(5))
    got = ref.attention(y, dense(qkv, bias), dense(out), norms, shape, tables)

    def head(row, index, norm):
        part = qkv[index * 8 : index * 8 + 8] @ y[row] + bias[index * 8 : index * 8 + 8]
        if norm is not None:
            part = part / math.sqrt((part**2).mean() + shape.eps) * norm
        c, s = math.cos(row), math.sin(row)  # inverse frequency of pair 0 is 1
        return np.array([part[0] * c - part[1] * s, part[1] * c + part[0] * s, *part[2:]])

    for t in range(5):
        mixed = []
        for h in range(4):
            q = head(t, h, norms and norms[0])
            keys = [head(u, 4 + h // 2, norms and norms[1]) for u in range(t + 1)]
            base = (6 + h // 2) * 8
            values = [qkv[base : base + 8] @ y[u] + bias[base : base + 8] for u in range(t + 1)]
            share = np.exp([q @ k / math.sqrt(8) for k in keys])
            mixed.append(share / share.sum() @ np.array(values))
        np.testing.assert_allclose(got[t], out @ np.concatenate(mixed), atol=1e-12)


def test_attention_in_query_chunks_is_the_same(monkeypatch):
    random = np.random.default_rng(1)
    q, k, v = random.normal(size=(3, 11, 4))
    whole = ref.causal_mix(q, k, v)
    monkeypatch.setattr(ref, "QUERY_ROWS", 4)
    np.testing.assert_allclose(ref.causal_mix(q, k, v), whole, atol=1e-15)


def route(scores, bias, **changes):
    """Routing of tokens whose expert scores (after the sigmoid) are given."""
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    shape = make_shape(num_experts=scores.shape[1], **changes)
    logits = np.log(scores / (1 - scores))
    return ref.router(logits, np.eye(scores.shape[1]), np.asarray(bias, dtype=np.float64), shape)


def test_router_by_hand():
    r = route([0.1, 0.4, 0.2, 0.3], np.zeros(4), n_group=1, topk_group=1)
    assert r.ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(r.weights, [[2.5 * 4 / 7, 2.5 * 3 / 7]])
    assert r.margin[0] == pytest.approx(0.1)


def test_bias_chooses_but_does_not_weigh():
    r = route([0.1, 0.4, 0.2, 0.3], [5.0, 0, 0, 0], n_group=0, topk_group=0)
    assert r.ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(r.weights, [[2.5 * 0.2, 2.5 * 0.8]])


def test_losing_groups_are_masked_below_any_negative_score():
    # all choice scores are negative; a mask of 0 would pick experts 2 and 3
    scores = [0.5, 0.45, 0.6, 0.1]
    r = route(scores, np.full(4, -3.0), n_group=2, topk_group=1)
    assert r.ids.tolist() == [[0, 1]]
    assert route(scores, np.zeros(4), n_group=1, topk_group=1).ids.tolist() == [[2, 0]]


def test_a_group_counts_by_its_two_best():
    # by maximum, or by sum over all, the other group would win
    scores = [0.7, 0.1, 0.1, 0.45, 0.44, 0.01]
    r = route(scores, np.zeros(6), n_group=2, topk_group=1)
    assert r.ids.tolist() == [[3, 4]]
    assert r.margin[0] == pytest.approx(0.09)
    scores = [0.7, 0.2, 0.01, 0.4, 0.4, 0.4]
    assert route(scores, np.zeros(6), n_group=2, topk_group=1).ids.tolist() == [[0, 1]]


def test_ties_go_to_the_lower_index():
    r = route(np.full((1, 8), 0.5), np.zeros(8), n_group=4, topk_group=2, num_experts_per_tok=3)
    assert r.ids.tolist() == [[0, 1, 2]]
    assert r.margin[0] == 0


def test_one_expert_is_not_normalised():
    r = route([0.1, 0.4, 0.2, 0.3], np.zeros(4), n_group=1, topk_group=1, num_experts_per_tok=1)
    assert r.ids.tolist() == [[1]]
    assert r.weights[0, 0] == pytest.approx(2.5 * 0.4)


def test_all_experts_have_no_margin_to_lose():
    r = route([0.1, 0.4], np.zeros(2), n_group=1, topk_group=1)
    assert math.isinf(r.margin[0])
    assert r.slots[0] == pytest.approx(0.3)


def test_replayed_experts_get_weights_of_the_own_scores_in_the_given_order():
    shape = make_shape(num_experts=4, n_group=1, topk_group=1)
    logits = np.log(np.array([[1 / 9, 2 / 3, 1 / 4, 3 / 7]]))
    r = ref.router(logits, np.eye(4), np.zeros(4), shape, np.array([[2, 0]]))
    assert r.ids.tolist() == [[2, 0]]
    assert r.own.tolist() == [[1, 3]]
    np.testing.assert_allclose(r.weights, [[2.5 * 2 / 3, 2.5 / 3]])


def test_moe_sums_scaled_experts_and_the_unscaled_shared_one():
    y = np.array([[1.0, 2.0], [3.0, -1.0]])
    ids = np.array([[2, 0], [0, 1]])
    weights = np.array([[0.5, 0.25], [2.0, 1.0]])
    none = np.zeros(2)
    routing = ref.Routing(ids, weights, ids, none, none)
    one = ref.mlp(y, identity_mlp(2))
    got = ref.moe(y, routing, lambda e: identity_mlp(2, e + 1.0), None)
    factors = np.array([[0.5 * 3 + 0.25 * 1], [2.0 * 1 + 1.0 * 2]])
    np.testing.assert_allclose(got, factors * one)
    with_shared = ref.moe(y, routing, lambda e: identity_mlp(2, e + 1.0), identity_mlp(2, 10.0))
    np.testing.assert_allclose(with_shared, got + 10 * one)


# -- whole checkpoints


@given(draw=ring_checkpoints(formats=("none", "block", "channel")))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_drawn_checkpoint_runs_and_is_causal(tmp_path_factory, draw):
    folder = write_checkpoint(tmp_path_factory.mktemp("draw"), draw)
    model = Reference(folder)
    out = model.forward(draw.prompt)
    rows = len(draw.prompt)
    assert out.logits.shape == (rows, draw.config["vocab_size"])
    assert np.isfinite(out.logits).all()
    assert model.num_layers == draw.main_layers
    assert out.routing_ids.shape[:2] == (model.num_moe_layers, rows)
    shorter = model.forward(draw.prompt[: (rows + 1) // 2])
    np.testing.assert_allclose(shorter.logits, out.logits[: (rows + 1) // 2], atol=1e-9)


@given(draw=ring_checkpoints(dtypes=("bfloat16",)))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_replaying_the_own_routing_changes_nothing(tmp_path_factory, draw):
    folder = write_checkpoint(tmp_path_factory.mktemp("draw"), draw)
    for dtype in ("float64", "bfloat16"):
        model = Reference(folder, dtype=dtype)
        out = model.forward(draw.prompt)
        again = model.forward(draw.prompt, routes=out.routing_ids)
        np.testing.assert_array_equal(again.logits, out.logits)
        np.testing.assert_array_equal(again.routing_weights, out.routing_weights)


def test_bf16_values_are_bf16_everywhere_but_in_the_logits(tmp_path):
    folder = write_checkpoint(tmp_path, Draw(base_config(), dtype="bfloat16"))
    seen = []
    model = Reference(folder, dtype="bfloat16")
    out = model.forward((1, 2, 3), on_layer=lambda layer, trace: seen.append(trace))
    assert [trace.layer for trace in seen] == [0, 1]
    assert [trace.routing is None for trace in seen] == [True, False]
    for trace in seen:
        np.testing.assert_array_equal(trace.hidden, ref.to_bf16(trace.hidden))
    rounded = Reference(folder, dtype="bfloat16", head_rounds=True).forward((1, 2, 3))
    np.testing.assert_array_equal(rounded.logits, ref.to_bf16(out.logits))
    assert (rounded.logits != out.logits).any()


def test_tied_head_is_the_embedding(tmp_path):
    draw = Draw(base_config(tie_word_embeddings=True))
    model = Reference(write_checkpoint(tmp_path, draw))
    assert "lm_head.weight" not in model.tensors
    embedding = make_tensors(draw)["model.word_embeddings.weight"].double().numpy()
    hidden = np.random.default_rng(0).normal(size=(3, 32))
    norm = model.vector("model.norm.weight")
    expected = ref.rms(hidden, norm, 1e-6) @ embedding.T
    np.testing.assert_allclose(model.head(hidden), expected, atol=1e-12)


@pytest.mark.parametrize("mtp", ["after", "inside"])
def test_mtp_layers_are_not_run_under_either_index_rule(tmp_path, mtp):
    plain = Draw(base_config(num_hidden_layers=2), seed=5)
    layers = 3 if mtp == "inside" else 2
    config = base_config(num_hidden_layers=layers, num_nextn_predict_layers=1)
    stored = write_checkpoint(tmp_path / "plain", plain)
    with_mtp = write_checkpoint(tmp_path / "mtp", Draw(config, seed=5, mtp=mtp))
    assert Reference(with_mtp).num_layers == 2
    # the draws agree up to the last layer, so the residual stream must too
    hidden = [list(Reference(folder).layers((1, 2, 3)))[-1].hidden for folder in (stored, with_mtp)]
    np.testing.assert_array_equal(hidden[0], hidden[1])


def test_a_stripped_checkpoint_runs_all_layers(tmp_path):
    folder = write_checkpoint(tmp_path, Draw(base_config(num_hidden_layers=2)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert Reference(folder).num_layers == 2


def test_mtp_layer_at_an_odd_place_is_refused(tmp_path):
    draw = Draw(base_config(num_hidden_layers=2, num_nextn_predict_layers=1))
    folder = write_checkpoint(tmp_path, draw)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="first MTP layer is 2"):
        Reference(folder)


def test_biases_norms_and_shared_experts_all_matter(tmp_path):
    """Each optional tensor, once stored, changes the logits: none is silently skipped."""
    switched_on = base_config(use_qkv_bias=True, use_bias=True)
    full = Draw(switched_on, seed=3)
    base = Reference(write_checkpoint(tmp_path / "full", full)).forward((1, 2, 3, 4)).logits
    for key in ("attention.query_key_value.bias", "attention.dense.bias", "shared_experts.down"):
        folder = write_checkpoint(tmp_path / key, full)
        model = Reference(folder)
        model.tensors = {
            name: stored
            for name, stored in model.tensors.items()
            if key.removesuffix(".down") not in name
        }
        assert np.abs(model.forward((1, 2, 3, 4)).logits - base).max() > 1e-3
    model = Reference(tmp_path / "full")
    model.shape = replace(model.shape, qk_norm=False)
    assert np.abs(model.forward((1, 2, 3, 4)).logits - base).max() > 1e-3


@pytest.mark.parametrize("fp8", ["block", "channel"])
def test_w8a8_differs_from_dequantised_by_activation_rounding_only(tmp_path, fp8):
    draw = Draw(base_config(hidden_size=60), dtype="bfloat16", fp8=fp8, shards=2)
    folder = write_checkpoint(tmp_path, draw)
    exact = Reference(folder).forward((1, 2, 3, 4))
    quantised = Reference(folder, numerics="w8a8").forward((1, 2, 3, 4), routes=exact.routing_ids)
    error = np.abs(quantised.logits - exact.logits)
    assert 0.005 < error.mean() / exact.logits.std() < 0.1
    # norms, router and head see no quantised input
    model = Reference(folder, numerics="w8a8")
    assert model.linear("lm_head").quantize is None
    assert model.linear("model.layers.1.mlp.experts.0.up_proj").quantize is not None


def test_w8a8_sum_is_the_grouped_integer_formula(tmp_path):
    draw = Draw(base_config(intermediate_size=150), dtype="bfloat16", fp8="block")
    model = Reference(write_checkpoint(tmp_path, draw), numerics="w8a8")
    stored = make_tensors(draw)
    name = "model.layers.0.mlp.down_proj.weight"
    q_w, s_w = stored[name].double().numpy(), stored[f"{name}_scale_inv"].double().numpy()
    x = ref.to_bf16(np.random.default_rng(0).normal(size=(3, 150)))
    y = np.zeros((3, 32))
    for k, part in enumerate((slice(0, 128), slice(128, 150))):
        s_x = (np.abs(x[:, part]).max(1).astype(np.float32) / np.float32(448)).astype(np.float64)
        q_x = torch.from_numpy(x[:, part] / s_x[:, None]).float().to(torch.float8_e4m3fn)
        y += q_x.double().numpy() @ q_w[:, part].T * s_x[:, None] * s_w[0, k]
    np.testing.assert_allclose(model.linear("model.layers.0.mlp.down_proj")(x), y, atol=1e-12)


def test_missing_tensor_and_missing_file_are_named(tmp_path):
    folder = write_checkpoint(tmp_path, Draw(base_config(), shards=2))
    model = Reference(folder)
    del model.tensors["model.layers.1.mlp.gate.expert_bias"]
    with pytest.raises(CheckpointError, match=r"gate\.expert_bias is missing"):
        model.forward((1,))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        Reference(folder)


@given(st.integers(0, 2**20))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_matrix_slices_do_not_depend_on_the_chunk(tmp_path_factory, seed):
    draw = Draw(base_config(intermediate_size=150), seed=seed, dtype="bfloat16", fp8="channel")
    model = Reference(write_checkpoint(tmp_path_factory.mktemp("draw"), draw))
    matrix = model.linear("model.layers.0.mlp.gate_proj")
    x = np.random.default_rng(seed).normal(size=(2, 32))
    whole = matrix(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ref, "CHUNK", 32 * 7)
        np.testing.assert_allclose(matrix(x), whole, atol=1e-12)
