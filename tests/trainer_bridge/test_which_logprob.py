"""docs/explain/icepop.md on real rollouts: the same transform on the same support gives k = 1."""

import numpy as np
import pytest
import torch

from everstep import LLM, SamplingParams
from everstep.engine.model.teacher import score
from everstep.engine.rollout import Rollout
from everstep.trainer_bridge.losses.config import LossConfig
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss

# a float32 logprob: what its own rounding and that of the logits leave
ROUNDING = 4e-6
T = 0.7


@pytest.fixture(scope="module")
def rollouts(tiny_checkpoint):
    sampling = SamplingParams(
        temperature=T, top_p=0.8, max_tokens=24, ignore_eos=True, record=("lp_raw", "kept_ids")
    )
    with LLM(str(tiny_checkpoint), dtype="float32", seed=3) as llm:
        return llm.generate([[5, 6, 7], [9, 8]], sampling, samples=2)


@pytest.fixture(scope="module")
def logits(tiny_checkpoint, rollouts):
    """Of each response token's place, float64, from a forward pass over the whole rollout."""
    found = []
    for rollout in rollouts:
        ids = [*rollout.prompt_ids, *rollout.output_ids]
        scored = score(tiny_checkpoint, ids, dtype="float32").logits
        found.append(scored[len(rollout.prompt_ids) - 1 : -1].astype(np.float64))
    return found


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def trainer_side(rollout: Rollout, logits, transform):
    """The trainer's logprob of each response token."""
    found = []
    for row, token, kept in zip(logits, rollout.output_ids, rollout.kept_ids, strict=True):
        if transform == "raw":
            found.append(log_softmax(row)[token])
        elif transform == "tempered":
            found.append(log_softmax(row / T)[token])
        else:
            found.append(log_softmax(row[kept] / T)[kept.index(token)])
    return torch.tensor([found], dtype=torch.float32)


def log_ratios(rollout, trainer, engine):
    out = make_loss(LossConfig())(
        LossInputs(
            lp_new=trainer.requires_grad_(),
            lp_infer=torch.tensor([engine]),
            advantages=torch.ones(1, 1),
            mask=torch.ones(1, len(engine), dtype=torch.bool),
        )
    )
    assert bool(out.valid.all())
    return out.log_ratio[0].double().numpy()


def test_three_logprobs_are_what_the_page_says(rollouts, logits):
    for rollout, rows in zip(rollouts, logits, strict=True):
        for name, transform in (("lp_raw", "raw"), ("lp_temp", "tempered"), ("lp_sampled", "kept")):
            recorded = getattr(rollout, name)
            ratios = log_ratios(rollout, trainer_side(rollout, rows, transform), recorded)
            assert np.abs(ratios).max() < ROUNDING, name


def test_the_mass_is_what_the_two_supports_differ_by(rollouts, logits):
    seen = []
    for rollout, rows in zip(rollouts, logits, strict=True):
        mass = np.array(rollout.kept_mass)
        mixed = log_ratios(rollout, trainer_side(rollout, rows, "tempered"), rollout.lp_sampled)
        assert np.abs(mixed - np.log(mass)).max() < ROUNDING
        seen += mass.tolist()
    # top-p did cut something: the test is about that
    assert min(seen) < 0.95


def test_comparing_raw_with_tempered_is_a_bug_that_shows(rollouts, logits):
    apart = [
        log_ratios(rollout, trainer_side(rollout, rows, "raw"), rollout.lp_temp)
        for rollout, rows in zip(rollouts, logits, strict=True)
    ]
    assert np.abs(np.concatenate(apart)).mean() > 0.01
