"""The hand examples of PAPER.md §1.8 and §1.6, to the six digits that are printed there."""

import math

import pytest
import torch

from everstep.trainer_bridge.losses.advantages import group_advantages
from everstep.trainer_bridge.losses.config import (
    ClipConfig,
    GatesConfig,
    IcePopConfig,
    KlConfig,
    KPopConfig,
    LossConfig,
    MisConfig,
    TisConfig,
)
from everstep.trainer_bridge.losses.corrections import bernoulli_kl
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss, old_logprobs

from .loss_batches import log_tokens, padded, per_sequence

# p_new, p_old, p_infer, advantage → k, r, M(k), clipped surrogate, J, dJ/d lp_new
EXAMPLE_A = {
    1: ((0.33, 0.30, 0.25, 1.0), (1.2, 1.1, 1.2, 1.1, 1.32, 1.32)),
    2: ((0.0501, 0.0501, 0.10, 1.0), (0.501, 1.0, 0.501, 1.0, 0.501, 0.501)),
    3: ((0.0499, 0.0499, 0.10, 1.0), (0.499, 1.0, 0.0, 1.0, 0.0, 0.0)),
    4: ((0.499, 0.499, 0.10, 1.0), (4.99, 1.0, 4.99, 1.0, 4.99, 4.99)),
    5: ((0.501, 0.501, 0.10, 1.0), (5.01, 1.0, 0.0, 1.0, 0.0, 0.0)),
    6: ((0.21, 0.30, 0.25, -1.0), (1.2, 0.7, 1.2, -0.8, -0.96, 0.0)),
    7: ((0.45, 0.30, 0.25, -1.0), (1.2, 1.5, 1.2, -1.5, -1.8, -1.8)),
    8: ((0.45, 0.30, 0.25, 1.0), (1.2, 1.5, 1.2, 1.2, 1.44, 0.0)),
    9: ((0.21, 0.30, 0.25, 1.0), (1.2, 0.7, 1.2, 0.7, 0.84, 0.84)),
    10: ((0.06, 0.04, 0.10, -0.5), (0.4, 1.5, 0.0, -0.75, 0.0, 0.0)),
}
DTYPES = (torch.float32, torch.float64)
SIX = {torch.float32: 2e-6, torch.float64: 6e-7}


def close(value, expected, dtype=torch.float64):
    return value == pytest.approx(expected, abs=SIX[dtype], rel=SIX[dtype])


def numbered(*rows):
    """Sequences of the tokens of example A."""
    return [log_tokens(EXAMPLE_A[number][0] for number in row) for row in rows]


def run(config, inputs):
    """(J, output, gradient of J)."""
    out = make_loss(config)(inputs)
    out.loss.backward()
    assert inputs.lp_new.grad is not None
    return -out.loss.item(), out, -inputs.lp_new.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", EXAMPLE_A)
def test_example_a_one_token(number, dtype):
    row, (k, r, weight, surrogate, objective, gradient) = EXAMPLE_A[number]
    value, out, grad = run(LossConfig(), padded([log_tokens([row])], dtype=dtype))
    assert close(math.exp(out.log_ratio.item()), k, dtype)
    assert close(out.weight.item(), weight, dtype)
    assert close(value, objective, dtype)
    assert close(grad.item(), gradient, dtype)
    # r and the clipped surrogate are seen where nothing is masked
    free, out, _ = run(LossConfig(name="none"), padded([log_tokens([row])], dtype=dtype))
    assert close(out.ratio.item(), r, dtype)
    assert close(free, surrogate, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("aggregation", "objective", "gradient"),
    [
        ("seq_mean", -0.24, [[0.165, 0, 0, 0.105], [0, -0.45]]),
        ("token_mean", 0.14, [[0.22, 0, 0, 0.14], [0, -0.3]]),
        ("fixed", 0.105, [[0.165, 0, 0, 0.105], [0, -0.225]]),
    ],
)
def test_example_b_aggregation(aggregation, objective, gradient, dtype):
    batch = numbered([1, 3, 8, 9], [6, 7])
    config = LossConfig(aggregation=aggregation, fixed_tokens=8)
    value, _, grad = run(config, padded(batch, dtype=dtype))
    assert close(value, objective, dtype)
    for found, expected in zip(per_sequence(batch, grad), gradient, strict=True):
        assert close(found, expected, dtype)


def test_example_b_reference_kl():
    [[token]] = batch = numbered([1])
    token.ref = math.log(0.28)
    config = LossConfig(kl=KlConfig(coef=0.01))
    value, out, _ = run(config, padded(batch, with_ref=True))
    assert close(out.kl.item(), 0.012788)
    assert close(value, 1.319872)


def test_edge_cases_put_into_example_b():
    batch = numbered([1, 3, 8, 9], [6, 7])
    batch[0][0].infer = -math.inf
    batch[0][1].old = batch[0][1].new = -math.inf
    batch[1][0].old = batch[1][0].infer = -math.inf
    value, out, grad = run(LossConfig(), padded(batch))
    assert close(value, -0.165)
    assert close(run(LossConfig(aggregation="token_mean"), padded(batch))[0], 0.08)
    mask = padded(batch).mask
    assert int((mask & ~out.keep).sum()) / int(mask.sum()) == 0.5
    assert int((mask & ~out.valid).sum()) == 3
    assert grad[mask & ~out.keep].tolist() == [0.0] * 3


VERSIONS = torch.tensor([[3, 3, 3, 4, 4]])
TRAIN = {
    3: [0.48, 0.22, 0.11, 0.40, 0.31],
    4: [0.55, 0.16, 0.20, 0.42, 0.29],
    5: [0.60, 0.09, 0.56, 0.45, 0.28],
}


@pytest.mark.parametrize(
    ("policy", "k", "r", "objective", "mean", "masked"),
    [
        (
            "exact",
            [0.96, 1.1, 1.1, 1.05, 0.966667],
            [1.25, 0.409091, 5.090909, 1.071429, 0.965517],
            [1.152, 0.45, 1.32, 1.125, 0.933333],
            0.996067,
            [],
        ),
        (
            "proximal",
            [1.2, 0.45, 5.6, 1.125, 0.933333],
            [1.0] * 5,
            [1.2, 0.0, 0.0, 1.125, 0.933333],
            0.651667,
            [1, 2],
        ),
    ],
)
def test_example_c_mixed_versions(policy, k, r, objective, mean, masked):
    log = {version: torch.tensor([p], dtype=torch.float64).log() for version, p in TRAIN.items()}
    new = log[5].clone().requires_grad_()
    infer = torch.tensor([[0.50, 0.20, 0.10, 0.40, 0.30]], dtype=torch.float64).log()
    old = old_logprobs(policy, new, VERSIONS, log)
    one = torch.ones(1, 1, dtype=torch.float64)
    mask = torch.ones(1, 5, dtype=torch.bool)
    inputs = LossInputs(lp_new=new, lp_old=old, lp_infer=infer, advantages=one, mask=mask)
    value, out, _ = run(LossConfig(old_policy=policy), inputs)
    assert close(out.log_ratio.exp()[0].tolist(), k)
    # where it is masked r plays no part, and is held at 1
    unmasked = make_loss(LossConfig(name="none"))(inputs)
    assert close(unmasked.ratio[0].tolist(), r)
    assert close(out.objective[0].tolist(), objective)
    assert close(value, mean)
    assert (~out.keep[0]).nonzero().flatten().tolist() == masked
    assert all(5 - int(VERSIONS[0, token]) == 2 for token in masked)


def test_exact_old_logprobs_name_a_version_that_is_missing():
    current = torch.zeros(1, 5)
    with pytest.raises(ValueError, match="no logprobs of version 3; there are 4, 5"):
        old_logprobs("exact", current, VERSIONS, {4: current, 5: current})


def test_without_old_logprobs_they_are_the_new_ones_before_the_update():
    batch = numbered([1, 3, 8, 9], [6, 7])
    inputs = padded(batch)
    alone = LossInputs(
        lp_new=inputs.lp_new,
        lp_infer=inputs.lp_infer,
        advantages=inputs.advantages,
        mask=inputs.mask,
    )
    value, out, grad = run(LossConfig(), alone)
    for row in batch:
        for token in row:
            token.old = token.new
    same, _, same_grad = run(LossConfig(), padded(batch))
    assert value == same
    assert torch.equal(grad, same_grad)
    assert out.ratio[inputs.mask].tolist() == [1.0] * 6


EXAMPLE_D = [
    (5e-4, 1e-4, 4.047990e-4, 2.391362e-4),
    (0.9, 0.45, 0.453358, 0.625695),
    (0.30, 0.25, 6.401457e-3, 6.164264e-3),
    (0.04, 0.10, 0.025305, 0.033544),
    (0.52, 0.10, 0.555570, 0.400882),
    (0.999, 0.99, 6.738201e-3, 0.014067),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_d_kpop(dtype):
    p, q, there, back = torch.tensor(EXAMPLE_D, dtype=torch.float64).unbind(1)
    lp, lq = p.log().to(dtype), q.log().to(dtype)
    assert close(bernoulli_kl(lp, lq).tolist(), there.tolist(), dtype)
    assert close(bernoulli_kl(lq, lp).tolist(), back.tolist(), dtype)
    batch = [log_tokens([(row[0], row[0], row[1], 1.0) for row in EXAMPLE_D])]
    config = LossConfig(name="kpop", kpop=KPopConfig(phi=0.02))
    out = make_loss(config)(padded(batch, dtype=dtype))
    assert out.keep[0].nonzero().flatten().tolist() == [0, 2, 5]
    assert close(out.weight[0, 0].item(), 5.0, torch.float32)


RATIOS = [0.30, 0.4999, 0.5001, 2.1, 4.99, 5.01, 12.0]


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (LossConfig(name="none"), [1.0] * 7),
        (LossConfig(name="tis"), [0.30, 0.4999, 0.5001, 2, 2, 2, 2]),
        (LossConfig(name="tis", tis=TisConfig(low=0.5)), [0.5, 0.5, 0.5001, 2, 2, 2, 2]),
        (LossConfig(name="icepop"), [0, 0, 0.5001, 2.1, 4.99, 0, 0]),
        (LossConfig(icepop=IcePopConfig(beta=2.0)), [0, 0, 0.5001, 0, 0, 0, 0]),
        (LossConfig(name="mis", mis=MisConfig(high=2.0)), [0.30, 0.4999, 0.5001, 0, 0, 0, 0]),
    ],
)
def test_example_e_other_weights(config, weights):
    batch = [log_tokens([(0.01 * k, 0.01 * k, 0.01, 1.0)]) for k in RATIOS]
    out = make_loss(config)(padded(batch))
    assert close(out.weight.flatten().tolist(), weights)
    assert close(out.objective.flatten().tolist(), weights)


def test_example_e_of_a_sequence():
    ratios = [1.2, 0.8, 1.05, 0.9, 1.5]
    batch = [log_tokens((0.1 * k, 0.1 * k, 0.1, 1.0) for k in ratios)]

    def weights(config):
        return make_loss(config)(padded(batch)).weight[0].tolist()

    mis = LossConfig(name="mis", mis=MisConfig(level="sequence"))
    assert close(weights(mis), [1.3608] * 5)
    for low, high, passes in ((1.0635, 1.0636, True), (1.0636, 1.1, False), (1.0, 1.0635, False)):
        gates = GatesConfig(geometric_low=low, geometric_high=high)
        kept = weights(LossConfig(name="tis", gates=gates))
        assert close(kept, ratios if passes else [0.0] * 5)
    for high, passes in ((1.3609, True), (1.3607, False)):
        kept = weights(LossConfig(name="none", gates=GatesConfig(product_high=high)))
        assert kept == [1.0 if passes else 0.0] * 5


EXAMPLE_F = {
    ("kept", "kept"): [1.013507, 0.943639],
    ("tempered", "tempered"): [1.013706, 0.943824],
    ("tempered", "kept"): [0.958648, 0.892562],
    ("raw", "tempered"): [0.855238, 1.248817],
    ("raw", "kept"): [0.808788, 1.180989],
}


@pytest.mark.parametrize("sides", EXAMPLE_F)
def test_example_f_which_logprob_is_compared(sides):
    sampler = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    trainer = torch.tensor([2.02, 0.97, 0.01, -1.0], dtype=torch.float64)

    def lp(logits, transform):
        tempered = torch.log_softmax(logits / 0.7, -1)
        kept = tempered[:2] - tempered[:2].logsumexp(-1)
        return {"raw": torch.log_softmax(logits, -1), "tempered": tempered, "kept": kept}[transform]

    train, infer = lp(trainer, sides[0])[None, :2], lp(sampler, sides[1])[None, :2]
    inputs = LossInputs(
        lp_new=train.clone().requires_grad_(),
        lp_infer=infer,
        advantages=torch.ones(1, 1, dtype=torch.float64),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    out = make_loss(LossConfig())(inputs)
    assert close(out.weight[0].tolist(), EXAMPLE_F[sides])


@pytest.mark.parametrize(
    ("std", "high", "low"),
    [
        ("population", 1.290992, -0.774595),
        ("sample", 1.207612, -0.724567),
        ("none", 0.625, -0.375),
    ],
)
def test_example_g_group_advantages(std, high, low):
    rewards = [1, 0, 0, 1, 1, 0, 0, 0]
    expected = [high if reward else low for reward in rewards]
    assert close(group_advantages(rewards, std=std), expected)


def test_the_band_is_closed_up_to_rounding():
    band = LossConfig(icepop=IcePopConfig(alpha=0.5, beta=5.0))
    for k, kept in ((0.499, False), (0.501, True), (4.99, True), (5.01, False)):
        out = make_loss(band)(padded([log_tokens([(0.1 * k, 0.1 * k, 0.1, 1.0)])]))
        assert out.keep.item() is kept


def test_the_clip_has_two_sides():
    config = LossConfig(name="none", clip=ClipConfig(eps_low=0.1, eps_high=0.28))
    up = padded([log_tokens([(0.45, 0.30, 0.30, 1.0)])])
    down = padded([log_tokens([(0.21, 0.30, 0.30, -1.0)])])
    assert close(make_loss(config)(up).objective.item(), 1.28)
    assert close(make_loss(config)(down).objective.item(), -0.9)
    open_above = LossConfig(name="none", clip=ClipConfig(eps_high=None))
    value, out, grad = run(open_above, padded([log_tokens([(0.45, 0.30, 0.30, 1.0)])]))
    assert close(value, 1.5)
    assert close(grad.item(), 1.5)
    assert not out.clipped.item()
