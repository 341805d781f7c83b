"""Every loss against the reference, and what holds for all: no NaN, exact zeros, no shape matters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.errors import ConfigError
from everstep.trainer_bridge.losses.config import (
    ClipConfig,
    GatesConfig,
    IcePopConfig,
    IpoConfig,
    KlConfig,
    KPopConfig,
    LossConfig,
    MisConfig,
    TisConfig,
)
from everstep.trainer_bridge.losses.corrections import bernoulli_kl
from everstep.trainer_bridge.losses.losses import BatchSize, LossInputs, make_loss

from . import loss_reference as reference
from .loss_batches import packed, padded, per_sequence
from .loss_reference import Token

GATES = {"geometric_low": 0.8, "geometric_high": 1.3, "product_low": 0.2, "veto": 0.3}
# the same settings twice: for the code, and for the reference
METHODS = {
    "none": (LossConfig(name="none"), {}),
    "tis": (LossConfig(name="tis"), {"high": 2.0}),
    "tis low": (LossConfig(name="tis", tis=TisConfig(low=0.5)), {"low": 0.5, "high": 2.0}),
    "mis": (LossConfig(name="mis"), {"high": 2.0}),
    "mis sequence": (
        LossConfig(name="mis", mis=MisConfig(level="sequence", low=0.1, high=3.0)),
        {"level": "sequence", "low": 0.1, "high": 3.0},
    ),
    "icepop": (LossConfig(), {"alpha": 0.5, "beta": 5.0}),
    "icepop gated": (
        LossConfig(gates=GatesConfig(**GATES)),
        {"alpha": 0.5, "beta": 5.0, "gates": GATES},
    ),
    "kpop": (LossConfig(name="kpop"), {"phi": 0.02}),
    "ipo": (LossConfig(name="ipo"), {"threshold": 0.3}),
    "none gated": (LossConfig(name="none", gates=GatesConfig(**GATES)), {"gates": GATES}),
    "icepop kl": (
        LossConfig(clip=ClipConfig(eps_high=0.28), kl=KlConfig(coef=0.1)),
        {"alpha": 0.5, "beta": 5.0, "eps": (0.2, 0.28), "kl": 0.1},
    ),
    "icepop kl kept": (
        LossConfig(kl=KlConfig(coef=0.1, on_kept_only=True)),
        {"alpha": 0.5, "beta": 5.0, "kl": 0.1, "kept_only": True},
    ),
}
METHOD_NAMES = st.sampled_from(list(METHODS))

lps = st.floats(-12.0, -1e-3)
broken = st.sampled_from([-math.inf, math.inf, math.nan])


@st.composite
def tokens(draw, may_break=True):
    infer = draw(lps)
    values = {
        "infer": infer,
        "old": min(-1e-4, infer + draw(st.floats(-3, 3))),
        "new": min(-1e-4, infer + draw(st.floats(-3, 3))),
        "ref": draw(lps),
    }
    if may_break:
        for name in draw(st.lists(st.sampled_from(sorted(values)), max_size=1, unique=True)):
            values[name] = draw(broken)
        # a logprob that is lost is seldom alone
        if draw(st.integers(0, 15)) == 0:
            values["old"] = values["new"] = -math.inf
    advantage = draw(st.sampled_from([-1.5, -0.3, 0.0, 0.7, 2.0]))
    return Token(**values, advantage=advantage, is_response=draw(st.integers(0, 4)) > 0)


def batches(may_break=True, max_size=4):
    sequence = st.lists(tokens(may_break), max_size=6)
    return st.lists(sequence, min_size=1, max_size=max_size)


def is_near_an_edge(batch, margin=1e-6):
    """Whether rounding may decide what the reference decides; such draws are left out."""

    def is_near(value, edges):
        return any(abs(value - edge) < margin for edge in edges)

    logs = [math.log(edge) for edge in (0.1, 0.2, 0.3, 0.5, 0.8, 1.3, 2.0, 3.0, 5.0)]
    clips = [math.log(edge) for edge in (0.8, 1.2, 1.28)]
    for sequence in batch:
        response = [t for t in sequence if t.is_response and reference.is_valid(t)]
        total = sum(t.old - t.infer for t in response)
        if is_near(total, logs) or is_near(total / max(1, len(response)), logs):
            return True
        for t in response:
            kls = (
                reference.bernoulli_kl(t.old, t.infer),
                reference.bernoulli_kl(t.infer, t.old),
            )
            apart = abs(math.exp(t.old) - math.exp(t.infer))
            if (
                is_near(t.old - t.infer, logs)
                or is_near(t.new - t.old, clips)
                or any(is_near(kl, [0.02]) for kl in kls)
                or is_near(apart, [0.3])
            ):
                return True
    return False


def with_aggregation(config, aggregation):
    fields = {name: getattr(config, name) for name in config.__struct_fields__}
    return LossConfig(**{**fields, "aggregation": aggregation, "fixed_tokens": 7.0})


def run(config, inputs):
    """(loss, output, gradient); a loss without gradient has gradient 0."""
    out = make_loss(config)(inputs)
    out.loss.backward()
    assert inputs.lp_new.grad is not None
    return out.loss.item(), out, inputs.lp_new.grad


def is_clean(out, grad):
    columns = (out.loss, out.objective, out.weight, out.ratio, out.log_ratio, out.kl, grad)
    return all(bool(torch.isfinite(column).all()) for column in columns)


@settings(max_examples=150, deadline=None)
@given(batches(), METHOD_NAMES, st.sampled_from(["seq_mean", "token_mean", "fixed"]))
def test_every_loss_is_the_reference_and_never_nan(batch, name, aggregation):
    if is_near_an_edge(batch):
        return
    config, settings_of = METHODS[name]
    config = with_aggregation(config, aggregation)
    loss, out, grad = run(config, padded(batch, with_ref=True))
    expected, slopes, kept = reference.objective(
        config.name, batch, aggregation=aggregation, fixed=7.0, **settings_of
    )
    assert is_clean(out, grad)
    assert loss == pytest.approx(-expected, rel=1e-9, abs=1e-12)
    assert per_sequence(batch, out.keep) == kept
    for found, wanted in zip(per_sequence(batch, grad), slopes, strict=True):
        assert found == pytest.approx([-slope for slope in wanted], rel=1e-9, abs=1e-12)


anything = st.one_of(
    st.floats(-60, 0, width=32), st.floats(width=32, allow_subnormal=False), broken
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(*[anything] * 4), min_size=1, max_size=5), max_size=3),
    METHOD_NAMES,
    st.sampled_from([torch.float32, torch.float64]),
)
def test_no_numbers_make_a_nan(rows, name, dtype):
    batch = [
        [Token(new, old, infer, ref=ref, advantage=1.0 - index) for new, old, infer, ref in row]
        for index, row in enumerate(rows)
    ]
    _, out, grad = run(METHODS[name][0], padded(batch, dtype=dtype, with_ref=True))
    assert is_clean(out, grad)
    assert not bool((out.keep & ~out.valid).any())


@settings(max_examples=60, deadline=None)
@given(batches(), METHOD_NAMES)
def test_what_is_masked_has_gradient_exactly_zero(batch, name):
    config = METHODS[name][0]
    if config.kl.coef and not config.kl.on_kept_only:
        config = LossConfig()
    inputs = padded(batch, with_ref=True, left=1)
    _, out, grad = run(config, inputs)
    assert not grad[~out.keep].any()
    assert not out.objective[~out.keep].any()
    assert not out.weight[~out.keep].any()


@settings(max_examples=60, deadline=None)
@given(batches(may_break=False), METHOD_NAMES, st.data())
def test_gradients_are_those_of_finite_differences(batch, name, data):
    if is_near_an_edge(batch, margin=1e-4) or not any(batch):
        return
    config = METHODS[name][0]
    inputs = padded(batch, with_ref=True)
    _, _, grad = run(config, inputs)
    row = data.draw(st.sampled_from([index for index, sequence in enumerate(batch) if sequence]))
    place = data.draw(st.integers(0, len(batch[row]) - 1))
    step = 1e-6

    def loss_at(by):
        new = inputs.lp_new.detach().clone()
        new[row, place] += by
        moved = LossInputs(
            **{**vars(inputs), "lp_new": new, "lp_old": inputs.lp_old, "batch": None}
        )
        return make_loss(config)(moved).loss.item()

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert grad[row, place].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@st.composite
def layouts(draw, num):
    """Rows of a packed batch: every sequence in one of them, in any order."""
    order = draw(st.permutations(range(num)))
    cuts = sorted(draw(st.lists(st.integers(0, num), max_size=3)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, num], strict=True) if a != b]


@settings(max_examples=80, deadline=None)
@given(batches(), METHOD_NAMES, st.sampled_from(["seq_mean", "token_mean", "fixed"]), st.data())
def test_padding_and_packing_change_no_bit(batch, name, aggregation, data):
    batch = [sequence or [Token(-1.0, -1.0, -1.0, is_response=False)] for sequence in batch]
    config = with_aggregation(METHODS[name][0], aggregation)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    loss, out, grad = run(config, padded(batch, dtype=dtype, with_ref=True))
    wide, wide_out, wide_grad = run(
        config, padded(batch, dtype=dtype, width=19, left=3, with_ref=True)
    )
    assert per_sequence(batch, grad) == per_sequence(batch, wide_grad, left=3)
    assert per_sequence(batch, out.keep) == per_sequence(batch, wide_out.keep, left=3)
    rows_of = data.draw(layouts(len(batch)))
    gap = data.draw(st.integers(0, 2))
    tight, tight_out, tight_grad = run(
        config, packed(batch, rows_of, dtype=dtype, gap=gap, with_ref=True)
    )
    for row, numbers in enumerate(rows_of):
        place = 0
        for number in numbers:
            end = place + len(batch[number])
            assert tight_grad[row, place:end].tolist() == per_sequence(batch, grad)[number]
            assert tight_out.keep[row, place:end].tolist() == per_sequence(batch, out.keep)[number]
            place = end + gap
    # the sum is float64 and rounded once
    assert wide == pytest.approx(loss, rel=1e-15 if dtype == torch.float64 else 0, abs=1e-15)
    assert tight == pytest.approx(loss, rel=1e-15 if dtype == torch.float64 else 0, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(batches(max_size=5), METHOD_NAMES, st.sampled_from(["seq_mean", "token_mean", "fixed"]))
def test_parts_of_an_update_add_up_to_it(batch, name, aggregation):
    config = with_aggregation(METHODS[name][0], aggregation)
    loss, _, grad = run(config, padded(batch, with_ref=True))
    num_tokens = sum(t.is_response for sequence in batch for t in sequence)
    size = BatchSize(sequences=len(batch), tokens=num_tokens)
    total, parts = 0.0, []
    for sequence in batch:
        part, _, part_grad = run(config, padded([sequence], with_ref=True, batch=size))
        total += part
        parts += per_sequence([sequence], part_grad)
    assert total == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert parts == per_sequence(batch, grad)


def test_a_batch_of_nothing_has_loss_zero():
    for batch in ([], [[]], [[Token(-1.0, -1.0, -1.0, is_response=False)]]):
        loss, _, _ = run(LossConfig(), padded(batch))
        assert loss == 0.0
    loss, out, _ = run(LossConfig(), packed([[]], [[0]], gap=3))
    assert loss == 0.0
    assert out.sequences.count == 0


def test_a_sequence_without_tokens_counts():
    some = [Token(-1.0, -1.0, -1.0, advantage=1.0)]
    assert run(LossConfig(), padded([some]))[0] == -1.0
    assert run(LossConfig(), padded([some, []]))[0] == -0.5
    prompt = [Token(-1.0, -1.0, -1.0, is_response=False)]
    assert run(LossConfig(), packed([some, prompt], [[0, 1]]))[0] == -0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    column = torch.zeros(1, 2, dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"lp_new is {dtype}: logprobs .* are float32"):
        make_loss(LossConfig())(LossInputs(column, column, torch.ones(1, 1), mask))
    wide = column.float()
    with pytest.raises(ValueError, match=f"lp_infer is {dtype}, lp_new torch.float32"):
        make_loss(LossConfig())(LossInputs(wide, column, torch.ones(1, 1), mask))


def wrong(**changes):
    zeros = torch.zeros(2, 3)
    fields = {
        "lp_new": zeros,
        "lp_infer": zeros,
        "advantages": torch.ones(2, 1),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    return LossInputs(**{**fields, **changes})


@pytest.mark.parametrize(
    ("inputs", "config", "message"),
    [
        (wrong(lp_old=torch.zeros(2, 2)), LossConfig(), r"lp_old has shape \(2, 2\), lp_new"),
        (wrong(mask=torch.ones(2, 3)), LossConfig(), "mask is torch.float32: bool"),
        (wrong(advantages=torch.ones(3, 1)), LossConfig(), r"advantages has shape \(3, 1\)"),
        (
            wrong(advantages=torch.tensor([[1.0], [math.nan]])),
            LossConfig(),
            "advantages is not finite at row 1, token 0",
        ),
        (wrong(), LossConfig(kl=KlConfig(coef=0.1)), "lp_ref is missing"),
        (
            wrong(
                advantages=torch.ones(2, 3),
                sequence_ids=torch.tensor([[0, 0, 1], [-1, 2, 2]]),
            ),
            LossConfig(),
            "negative sequence id",
        ),
        (
            wrong(sequence_ids=torch.zeros(2, 3, dtype=torch.int64)),
            LossConfig(),
            r"advantages has shape \(2, 1\)",
        ),
        (
            wrong(lp_infer=torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 0.0]])),
            LossConfig(strict=True),
            "lp_infer is -inf at row 1, token 1: the engine sampled",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, config, message):
    with pytest.raises(ValueError, match=message):
        make_loss(config)(inputs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(icepop=IcePopConfig(alpha=5, beta=0.5)), "loss.icepop.alpha must be below"),
        (LossConfig(mis=MisConfig(low=3)), "loss.mis.low must be below loss.mis.high, got 3 and 2"),
        (LossConfig(gates=GatesConfig(veto=0.0, geometric_low=2, geometric_high=1)), "geometric"),
        (LossConfig(aggregation="fixed"), "divides by loss.fixed_tokens: set it"),
        (LossConfig(icepop=IcePopConfig(alpha=math.nan)), "loss.icepop.alpha"),
    ],
)
def test_settings_that_contradict_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(config)


def test_weights_can_be_one():
    token = [Token(-1.0, -1.0, -1.5)]
    for config in (
        LossConfig(icepop=IcePopConfig(weight="one")),
        LossConfig(name="mis", mis=MisConfig(weight="one")),
        LossConfig(name="kpop", kpop=KPopConfig(phi=1.0, weight="one")),
        LossConfig(name="ipo", ipo=IpoConfig(weight="one")),
    ):
        assert make_loss(config)(padded([token])).weight.item() == 1.0


def test_dppo_masks_only_what_the_advantage_would_widen():
    config = LossConfig(name="ipo", ipo=IpoConfig(threshold=0.2, by_advantage=True))
    high, low = math.log(0.6), math.log(0.3)
    kept = {}
    for advantage in (1.0, -1.0, 0.0):
        batch = [[Token(high, high, low, advantage)], [Token(low, low, high, advantage)]]
        kept[advantage] = make_loss(config)(padded(batch)).keep.flatten().tolist()
    assert kept == {1.0: [False, True], -1.0: [True, False], 0.0: [True, True]}


def test_one_sided_kpop_is_one_direction():
    # D_B both ways of example D's last row: 6.7e-3 and 1.4e-2
    token = [Token(*[math.log(0.999)] * 2, math.log(0.99))]
    kept = {
        sides: make_loss(LossConfig(name="kpop", kpop=KPopConfig(phi=0.01, sides=sides)))(
            padded([token])
        ).keep.item()
        for sides in ("both", "train", "infer")
    }
    assert kept == {"both": False, "train": True, "infer": False}


@settings(max_examples=200, deadline=None)
@given(st.floats(-200, -1e-6), st.floats(-200, -1e-6))
def test_bernoulli_kl_loses_nothing_near_one(lp, lq):
    expected = reference.bernoulli_kl(lp, lq)
    pair = torch.tensor([lp, lq], dtype=torch.float64)
    # 16 = -log of the smallest 1 - p that float32 knows
    assert bernoulli_kl(pair[:1], pair[1:]).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    rough = bernoulli_kl(pair[:1].float(), pair[1:].float()).item()
    assert rough == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_two_certain_tokens_do_not_differ():
    # log_softmax of a certain token rounds to 0, or just beside it, on either side
    certain = torch.tensor([0.0, -1e-9, 1e-7])
    assert bernoulli_kl(certain[:, None], certain[None, :]).abs().max() == 0
    apart = bernoulli_kl(torch.tensor([math.log(0.9)]), torch.tensor([0.0]))
    assert 1.0 < apart.item() < 2.0
