"""Draws of many rows in columns: each has the numbers of its own rule, whatever is shared."""

import ctypes
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep import kernels
from everstep.engine.core.plan import Row
from everstep.engine.model import drawing
from everstep.engine.model.drawing import Drawer, columns_of, rule_of, sampled_of
from everstep.engine.rollout import SAMPLED, TRUNCATED_SUPPORT, SamplingParams
from everstep.kernels import Rule

from ..levels import LEVELS, quick, use_level

VOCAB = 700

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50),
    SamplingParams(min_p=0.05, record=("lp_raw", "entropy")),
    SamplingParams(top_k=7, record=("kept_ids",), top_logprobs=3, logprobs_mode="sampled"),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(frequency_penalty=-0.7, logit_bias={3: 5.0, 699: -2.0}),
    SamplingParams(min_tokens=3, logit_bias={9: 30.0}),
]


@pytest.fixture(params=quick(LEVELS), scope="module")
def level(request):
    with use_level(request.param):
        yield request.param


def make_row(sampling, seed, num_prompt, num_output, banned):
    all_ids = [(7 * i + seed) % VOCAB for i in range(num_prompt + num_output)]
    return Row(
        rollout_id="r",
        all_ids=all_ids,
        num_missing=1,
        num_tokens=1,
        block_table=[],
        num_prompt=num_prompt,
        sampling=sampling,
        seed=seed,
        banned_ids=banned,
    )


rows = st.builds(
    make_row,
    st.sampled_from(SAMPLINGS),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from([[], [9], [1, 2]]),
)


def whole_rule(row):
    """The rule of a row by itself, written from what the parameters are documented to mean."""
    p, position = row.sampling, len(row.all_ids) - row.num_prompt
    return Rule(
        seed=row.seed,
        position=position,
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        logit_bias=p.logit_bias,
        prompt_ids=row.all_ids[: row.num_prompt],
        output_ids=row.all_ids[row.num_prompt :],
        banned=row.banned_ids if position < p.min_tokens else [],
        num_top=p.top_logprobs,
        top_of=p.logprobs_mode,
        wants_raw="lp_raw" in p.record or (p.logprobs_mode == "raw" and p.top_logprobs > 0),
        wants_entropy="entropy" in p.record,
        wants_kept_ids="kept_ids" in p.record,
    )


@few
@given(st.lists(rows, min_size=1, max_size=12), st.integers(0, 99), st.data())
def test_each_row_has_the_draw_of_its_own_rule_alone(level, drawn_for, seed, data):
    """One Drawer over two steps, rows of the logits in any order, some of them not drawn from."""
    drawer = Drawer()
    for step in range(2):
        generator = torch.Generator().manual_seed(seed + step)
        logits = torch.randn(len(drawn_for) + 3, VOCAB, generator=generator) * 3
        before = logits.clone()
        places = data.draw(st.permutations(range(len(logits))))[: len(drawn_for)]
        found = drawer.draw(logits, drawn_for, places).list()
        for place, row, draw in zip(places, drawn_for, found, strict=True):
            assert [draw] == kernels.sample(logits[place : place + 1], [whole_rule(row)])
        assert torch.equal(logits, before)
        for row in drawn_for:
            row.all_ids.append(5)


def test_parameters_that_are_equal_but_not_the_same_are_never_mixed_up(level, monkeypatch):
    """The cache goes by identity; an object's address may be used again after it is gone."""
    monkeypatch.setattr(drawing, "MAX_RULES", 3)
    drawer = Drawer()
    for i in range(50):
        sampling = msgspec.structs.replace(SamplingParams(), top_k=i + 1)
        assert drawer.rule(make_row(sampling, 1, 2, 0, [])).top_k == i + 1
        del sampling


def test_a_rule_that_leaves_float32_is_lost_alone(level):
    row = make_row(SamplingParams(), 3, 2, 0, [])
    cold = make_row(SamplingParams(temperature=0.001), 3, 2, 0, [])
    pushed = make_row(SamplingParams(repetition_penalty=0.01), 3, 2, 0, [])
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = Drawer().draw(logits, [row], [0]).list()
    logits[1] *= 1e36
    logits[2, row.all_ids] = 3e38
    found = Drawer().draw(logits, [row, cold, pushed], [0, 1, 2])
    assert found.is_lost.tolist() == [False, True, True]
    assert found.list() == [*expected, None, None]


def test_nothing_is_drawn_for_no_rows(level):
    found = Drawer().draw(torch.zeros(2, VOCAB), [], [])
    columns = columns_of(found, [], 3)
    assert columns.token_ids == [0, 0, 0]
    assert columns.lp_temp == [0.0, 0.0, 0.0]


def test_columns_hold_float32_at_the_rows_that_were_drawn(level):
    both = [make_row(SamplingParams(top_k=5), 1, 2, 0, []), make_row(SamplingParams(), 2, 2, 0, [])]
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2)) * 4
    found = Drawer().draw(logits, both, [1, 0])
    columns = columns_of(found, [1, 3], 4)
    assert columns.flags == [0, SAMPLED | TRUNCATED_SUPPORT, 0, SAMPLED]
    for n, index in enumerate((1, 3)):
        draw = found.list()[n]
        assert columns.sampled(index) == sampled_of(draw)
        for name in ("lp_sampled", "lp_temp", "kept_mass"):
            value = getattr(columns, name)[index]
            assert value == ctypes.c_float(getattr(draw, name)).value == np.float32(value)
    assert columns_of(found, [0, 1], 2).token_ids == found.token_ids.tolist()


def test_banned_ids_beyond_the_vocabulary_are_refused(level):
    if level == "torch":
        pytest.skip("torch's own error")
    rule = replace(rule_of(SamplingParams()), banned=(VOCAB,))
    with pytest.raises(ValueError, match="banned"):
        kernels.draw(torch.zeros(1, VOCAB), [rule], seeds=[1], positions=[0], rows=[0])
