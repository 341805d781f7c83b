"""The demo's task, against `math.gcd` and against answers with one thing wrong."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.trainer_bridge.demo import euclid
from everstep.trainer_bridge.demo.euclid import Pair

drawn_pairs = st.integers(0, 10**6).map(lambda seed: next(euclid.pairs(random.Random(seed))))


def test_the_published_example() -> None:
    pair = Pair(96, 78)
    assert pair.prompt == "9678<think>"
    assert euclid.trace(pair) == "1878,1860,1842,1824,1806,1206,0606,</think>06<eos>"
    assert euclid.reward(pair.prompt, euclid.trace(pair)) == 1.0


@given(drawn_pairs)
def test_a_full_trace_is_right_and_legal(pair: Pair) -> None:
    verdict = euclid.judge(pair, euclid.trace(pair))
    assert pair.answer == math.gcd(*pair) >= 2
    assert verdict == (True, len(pair.states), len(pair.states))
    assert euclid.decode(euclid.encode(pair.prompt + euclid.trace(pair))) == (
        pair.prompt + euclid.trace(pair)
    )


@given(drawn_pairs, st.data())
def test_a_trace_with_a_token_changed_is_not_wholly_right(pair: Pair, data: st.DataObject) -> None:
    ids = euclid.encode(euclid.trace(pair))
    at = data.draw(st.integers(0, len(ids) - 1))
    ids[at] = data.draw(st.integers(0, len(euclid.TOKENS) - 1).filter(lambda i: i != ids[at]))
    verdict = euclid.judge(pair, euclid.decode(ids))
    full = (True, len(pair.states), len(pair.states))
    assert verdict != full


@given(drawn_pairs, st.integers(0, 60))
def test_a_trace_that_stops_early_answers_where_it_stands(pair: Pair, steps: int) -> None:
    response = euclid.trace(pair, steps)
    verdict = euclid.judge(pair, response)
    assert verdict.num_legal == verdict.num_written == min(steps, len(pair.states))
    states = [pair, *pair.states][: steps + 1]
    assert verdict.is_right == (min(states[-1]) == pair.answer)


@pytest.mark.parametrize(
    "response",
    ["", "06<eos>", "</think>06", "</think>6<eos>", "</think></think>06<eos>", "</think>06<eos>,"],
)
def test_what_is_not_an_answer(response: str) -> None:
    assert not euclid.judge(Pair(96, 78), response).is_right


@pytest.mark.parametrize("prompt", ["", "9678", "967<think>", "9678<think>1", "a678<think>"])
def test_a_foreign_prompt_is_named(prompt: str) -> None:
    with pytest.raises(ValueError, match="accepted: four digits"):
        euclid.reward(prompt, "")


def test_text_outside_of_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="'x' is not in the vocabulary"):
        euclid.encode("12x")


def test_held_out_questions_are_never_asked() -> None:
    out = euclid.held_out(3, 256)
    assert len(set(out)) == 256
    assert out == euclid.held_out(3, 256) != euclid.held_out(4, 256)
    asked = set(itertools.islice(euclid.questions(3, out), 20_000))
    assert not asked & set(out)
    assert len(asked) > 500
    assert all(sum(pair) <= euclid.LARGEST_SUM for pair in asked | set(out))


def test_no_answer_is_common() -> None:
    drawn = itertools.islice(euclid.questions(0, []), 20_000)
    answers = [pair.answer for pair in drawn]
    assert max(answers.count(n) for n in set(answers)) < 0.2 * len(answers)


def test_lengths_have_a_tail() -> None:
    lengths = sorted(
        len(euclid.encode(euclid.trace(pair)))
        for pair in itertools.islice(euclid.questions(0, []), 20_000)
    )
    assert lengths[len(lengths) * 99 // 100] > 4 * lengths[len(lengths) // 2]
