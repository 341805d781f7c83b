"""The engine's forward pass against the float64 reference, over drawn checkpoints.

How far they may differ, with scale = max |logit| and std = the logits' standard deviation:

    float32            max |Δ| ≤ 2e-5·scale, mean |Δ| ≤ 1e-6·scale. Over 1800 draws the worst were
                       1.1e-5 (one ill-conditioned draw; 99.9 % are below 7e-6) and 4e-7. The
                       mistakes known to be possible cost 0.01·scale and more.
    bfloat16, replay   max |Δ| ≤ 0.07·std, mean |Δ| ≤ 0.01·std in every draw, and the median draw
                       ≤ 1e-5·std: casts stand at the same places, so most draws round alike to
                       the last bit. Worst of 900 draws: 0.034 and 0.006.
    bfloat16           pooled over draws: mean |Δlogprob| ≤ 0.003, 99th percentile ≤ 0.05.
    w8a8               a rounding that goes the other way costs an e4m3 step (1/8) and more follow:
                       mean |Δ| ≤ 0.1·std in every draw (worst of 500: 0.07); where no expert
                       layers amplify it, most draws agree to float32.

The engine's choice of experts is replayed, and must be the reference's own in each layer wherever
that decision is wider than 1e-5 (in float32 nearly everywhere). Every reference here is the float64 or bf16 one of
engine/proofs/reference.py, whose own tests use no engine.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from everstep.engine.errors import InvalidRequest
from everstep.engine.model import teacher
from everstep.engine.proofs.reference import Reference
from everstep.engine.proofs.verify import bounds_for, equal_choices, log_softmax, verify

from .ring_draws import Draw, base_config, ring_checkpoints, write_checkpoint

TIE = 1e-5
PROMPT = tuple(range(3, 27))

examples = settings(max_examples=35, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Writes a draw into a new folder."""
    return lambda draw: write_checkpoint(tmp_path_factory.mktemp("draw"), draw)


def by_layer(ids):
    """Routing ids of the teacher [T, moe_layers, K] → those of the reference [moe_layers, T, K]."""
    return np.ascontiguousarray(ids.transpose(1, 0, 2))


def assert_float32(folder, prompt, numerics="exact"):
    """Engine in float32 against the reference without rounding, up to float32 noise."""
    got = teacher.score(folder, list(prompt), dtype="float32", numerics=numerics)
    ids = by_layer(got.routing_ids)
    traces = []
    own = Reference(folder, numerics=numerics).forward(
        prompt, routes=ids, on_layer=lambda layer, trace: traces.append(trace)
    )
    assert ids.shape == own.routing_ids.shape
    # the engine's choice is replayed, so that each layer decides on the same input as the engine's
    for engine, routing in zip(ids, (t.routing for t in traces if t.routing), strict=True):
        wide = routing.slots >= TIE
        np.testing.assert_array_equal(engine[wide], routing.own[wide])
    assert own.slots.size == 0 or (own.slots >= TIE).mean() >= 0.9
    np.testing.assert_allclose(by_layer(got.routing_weights), own.routing_weights, atol=2e-5)
    for engine, trace in zip(got.hidden, traces, strict=True):
        difference = np.abs(engine - trace.hidden).max()
        assert difference <= 2e-5 * np.abs(trace.hidden).max(), f"layer {trace.layer}"
    scale = np.abs(own.logits).max()
    difference = np.abs(got.logits - own.logits)
    assert difference.max() <= 2e-5 * scale
    assert difference.mean() <= 1e-6 * scale
    return own


def replayed_difference(folder, prompt, numerics="exact", rope_tables="float32"):
    """|Δlogit|/std in bf16 [T, V], the reference following the engine's experts."""
    got = teacher.score(
        folder, list(prompt), dtype="bfloat16", numerics=numerics, rope_tables=rope_tables
    )
    model = Reference(folder, dtype="bfloat16", numerics=numerics, rope_tables=rope_tables)
    expected = model.forward(prompt, routes=by_layer(got.routing_ids))
    return np.abs(got.logits - expected.logits) / expected.logits.std()


# -- drawn checkpoints


@given(draw=ring_checkpoints())
@examples
def test_float32_agrees_to_float32_noise(store, draw):
    assert_float32(store(draw), draw.prompt)


@given(draw=ring_checkpoints(formats=("block", "channel")))
@examples
def test_float32_agrees_on_dequantised_fp8(store, draw):
    assert_float32(store(draw), draw.prompt)


@pytest.mark.parametrize("formats", [("none",), ("block",), ("channel",)])
def test_bf16_rounds_at_the_same_places(store, formats):
    worst = []

    @given(draw=ring_checkpoints(dtypes=("bfloat16",), formats=formats))
    @examples
    def check(draw):
        difference = replayed_difference(store(draw), draw.prompt)
        assert difference.max() <= 0.07
        assert difference.mean() <= 0.01
        worst.append(difference.max())

    check()
    assert np.median(worst) <= 1e-5


def test_bf16_without_replay_agrees_by_quantiles(store):
    pooled, agreement = [], []

    @given(draw=ring_checkpoints(dtypes=("bfloat16",), formats=("none", "block")))
    @examples
    def check(draw):
        folder = store(draw)
        got = teacher.score(folder, list(draw.prompt), dtype="bfloat16")
        own = Reference(folder, dtype="bfloat16").forward(draw.prompt)
        pooled.append(np.abs(log_softmax(got.logits.astype(float)) - log_softmax(own.logits)))
        for engine, reference in zip(by_layer(got.routing_ids), own.routing_ids, strict=True):
            agreement.append(equal_choices(engine, reference))

    check()
    difference = np.concatenate([d.ravel() for d in pooled])
    assert difference.mean() <= 0.003
    assert np.quantile(difference, 0.99) <= 0.05
    assert np.mean(agreement) >= 0.98


@given(draw=ring_checkpoints(dtypes=("bfloat16",)))
@examples
def test_bf16_agrees_with_tables_in_the_model_dtype(store, draw):
    difference = replayed_difference(store(draw), draw.prompt, rope_tables="model")
    assert difference.max() <= 0.07
    assert difference.mean() <= 0.01


@pytest.mark.parametrize("formats", [("block",), ("channel",)])
def test_w8a8_stays_within_e4m3_noise(store, formats):
    @given(draw=ring_checkpoints(formats=formats))
    @examples
    def check(draw):
        assert replayed_difference(store(draw), draw.prompt, numerics="w8a8").mean() <= 0.1

    check()


def one_layer(fp8, seed, **changes):
    """A checkpoint of one layer, so that no other layer amplifies a rounding."""
    config = base_config(num_hidden_layers=1, intermediate_size=150, **changes)
    return Draw(config, seed=seed, dtype="bfloat16", fp8=fp8, prompt=PROMPT)


def share_of_other_bits(store, draw):
    """Share of the residual stream after the only layer that is not bit-equal in bf16 W8A8."""
    folder = store(draw)
    got = teacher.score(folder, list(draw.prompt), dtype="bfloat16", numerics="w8a8")
    model = Reference(folder, dtype="bfloat16", numerics="w8a8")
    seen = []
    model.forward(
        draw.prompt,
        routes=by_layer(got.routing_ids),
        on_layer=lambda layer, trace: seen.append(trace.hidden),
    )
    return float((got.hidden[0] != seen[0]).mean())


@pytest.mark.parametrize("fp8", ["block", "channel"])
def test_w8a8_dense_layer_is_bit_equal_for_most_seeds(store, fp8):
    shares = [
        share_of_other_bits(store, one_layer(fp8, seed, num_experts=None)) for seed in range(7)
    ]
    assert np.median(shares) == 0.0
    assert max(shares) <= 0.1


@pytest.mark.parametrize("fp8", ["block", "channel"])
def test_w8a8_expert_layer_rounds_where_fp8_serving_does(store, fp8):
    draws = [one_layer(fp8, seed, first_k_dense_replace=0) for seed in range(7)]
    assert np.median([share_of_other_bits(store, draw) for draw in draws]) <= 0.01


# -- one trap each: what small random checkpoints seldom have


RELEASED = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
TRAPS = {
    "rotary_dim alone": Draw(base_config(partial_rotary_factor=None, rotary_dim=4)),
    "no rotary key: all of the head": Draw(base_config(partial_rotary_factor=None)),
    "heads times head_dim is not hidden": Draw(base_config(hidden_size=44, head_dim=16)),
    "expert_bias larger than the scores": Draw(base_config(), bias_spread=5.0),
    "every choice score negative": Draw(base_config(), bias_center=-4.0, bias_spread=0.3),
    "no shared expert": Draw(base_config(num_shared_experts=0)),
    "two shared experts": Draw(base_config(num_shared_experts=2)),
    "one expert per token": Draw(base_config(num_experts_per_tok=1)),
    "all experts": Draw(base_config(num_experts=4, num_experts_per_tok=4, n_group=2)),
    "no groups written as 0": Draw(base_config(n_group=0, topk_group=0)),
    "one group kept of eight": Draw(base_config(num_experts=16, n_group=8, topk_group=1)),
    "routed scaling of one": Draw(base_config(routed_scaling_factor=1.0)),
    "tied head": Draw(base_config(tie_word_embeddings=True)),
    "biases without qk norm": Draw(
        base_config(use_qkv_bias=True, use_bias=True, use_qk_norm=False)
    ),
    "yarn far beyond the original context": Draw(
        base_config(
            rope_scaling={
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
            },
            max_position_embeddings=64,
        ),
        prompt=tuple(range(3, 53)),
    ),
    # a ramp from pair 1 to 6; taken with head_dim for the rotary size it would be 2 to 11
    "yarn of a partly rotated head": Draw(
        base_config(
            head_dim=64,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            max_position_embeddings=2048,
        ),
        prompt=tuple(range(3, 53)),
    ),
    "linear scaling": Draw(base_config(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "mtp after the main layers": Draw(base_config(num_nextn_predict_layers=1)),
    "mtp counted among the layers": Draw(
        base_config(num_hidden_layers=3, num_nextn_predict_layers=1), mtp="inside"
    ),
    # 256 experts in 8 groups, 8 of 4 of them; 128 dimensions a head, half of them rotated
    "heads and routing of mini": Draw(base_config(**RELEASED, num_attention_heads=16)),
    "heads and routing of flash": Draw(base_config(**RELEASED, num_attention_heads=32)),
    "heads, routing and keys of 1T": Draw(
        base_config(
            **RELEASED | {"num_key_value_heads": 8},
            num_attention_heads=64,
            num_hidden_layers=5,
            first_k_dense_replace=4,
            partial_rotary_factor=None,
            rotary_dim=64,
        )
    ),
    "routing of the releases, with a strong bias": Draw(
        base_config(**RELEASED, num_attention_heads=16), bias_center=-1.0, bias_spread=1.0
    ),
    "only dense layers": Draw(base_config(first_k_dense_replace=2)),
    "only expert layers": Draw(base_config(first_k_dense_replace=0)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_trap(store, name):
    draw = TRAPS[name]
    if len(draw.prompt) < len(PROMPT):
        draw = replace(draw, prompt=PROMPT)
    folder = store(draw)
    assert_float32(folder, draw.prompt)
    assert Reference(folder).num_layers == draw.main_layers


def test_trap_yarn_factor_wins_over_the_ratio_of_contexts(store):
    """Old transformers used max_position_embeddings/O, here 1: no scaling at all."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    yarn = Draw(base_config(rope_scaling=scaling, max_position_embeddings=32), seed=1)
    scaled = assert_float32(store(yarn), PROMPT)
    plain = assert_float32(store(yarn.with_config(rope_scaling=None)), PROMPT)
    assert np.abs(scaled.logits - plain.logits).max() > 0.05


def test_equal_choice_scores_go_to_the_lower_expert(store):
    """With a router of zeros every score ties, in any arithmetic."""
    folder = store(Draw(base_config(first_k_dense_replace=0)))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".mlp.gate." in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors")
    got = teacher.score(folder, list(PROMPT), dtype="float32")
    assert (got.routing_ids == [0, 1]).all()
    assert (Reference(folder).forward(PROMPT).routing_ids == [0, 1]).all()


def test_engine_replays_the_experts_of_the_reference(store):
    folder = store(Draw(base_config(num_hidden_layers=3), seed=4))
    model = Reference(folder)
    own = model.forward(PROMPT)
    routes = (own.routing_ids + 1) % 8
    expected = model.forward(PROMPT, routes=routes)
    got = teacher.score(folder, list(PROMPT), dtype="float32", replay_routes=routes)
    np.testing.assert_array_equal(by_layer(got.routing_ids), routes)
    np.testing.assert_allclose(by_layer(got.routing_weights), expected.routing_weights, atol=2e-5)
    assert np.abs(got.logits - expected.logits).max() <= 2e-5 * np.abs(expected.logits).max()
    assert np.abs(expected.logits - own.logits).max() > 0.1


# -- verify


@given(draw=ring_checkpoints(formats=("none", "block", "channel")))
@settings(examples, max_examples=25)
def test_verify_passes_every_checkpoint_in_both_dtypes(store, draw):
    folder = store(draw)
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and draw.dtype == "float32":
            continue
        report = verify(folder, prompt_ids=draw.prompt, dtype=dtype)
        assert report.failures == []
        assert report.passed
        assert len(report.layers) == draw.main_layers
        assert len(report.rows()) == 1 + draw.main_layers


def test_verify_streams_what_score_computes_and_tells_its_progress(store):
    folder, seen = store(Draw(base_config(num_hidden_layers=3), seed=2)), []
    report = verify(
        folder, num_tokens=9, dtype="float32", on_progress=lambda *step: seen.append(step)
    )
    assert seen == [("layers", 1, 3), ("layers", 2, 3), ("layers", 3, 3), ("head", 1, 1)]
    assert report.num_tokens == 9
    assert report.argmax_agreement == 1.0
    assert report.experts == 1.0
    assert [row.experts for row in report.layers] == [None, 1.0, 1.0]
    ids = list(range(9))
    *_, last = teacher.layers(folder, ids, dtype="float32")
    np.testing.assert_array_equal(last.logits, teacher.score(folder, ids, dtype="float32").logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_fails_an_engine_that_forgets_the_routed_scale(store, monkeypatch, dtype):
    folder = store(Draw(base_config(num_hidden_layers=4), seed=2, dtype="bfloat16"))
    read = Reference.__init__

    def forgetful(self, *args, **kwargs):
        read(self, *args, **kwargs)
        self.shape = replace(self.shape, routed_scale=1.0)

    monkeypatch.setattr(Reference, "__init__", forgetful)
    report = verify(folder, dtype=dtype)
    assert not report.passed
    assert any("max |Δlogit|" in line for line in report.failures)


def test_bounds_grow_with_the_root_of_the_depth():
    shallow, deep = (bounds_for("bfloat16", "exact", layers, 1.5) for layers in (3, 15))
    assert deep.max_logit == 2 * shallow.max_logit
    assert deep.experts == shallow.experts


def test_verify_refuses_ids_outside_the_vocabulary(store):
    folder = store(Draw(base_config()))
    for wrong in ([], [64], [-1]):
        with pytest.raises(InvalidRequest, match="prompt_ids"):
            verify(folder, prompt_ids=wrong)
    with pytest.raises(InvalidRequest, match="num_tokens"):
        verify(folder, num_tokens=0)
