"""What the demo's model is warmed up on."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer_bridge.demo import euclid
from everstep.trainer_bridge.demo.euclid_warm_up import Example, Habit, habit, skill


def kind(example: Example) -> str:
    pair = euclid.parse(example.prompt)
    if example.response == euclid.trace(pair):
        return "full"
    verdict = euclid.judge(pair, example.response)
    assert verdict.num_legal == verdict.num_written < len(pair.states)
    return "stop" if verdict.num_written else "guess"


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_the_skill_is_right_and_never_held_out(seed: int) -> None:
    held_out = frozenset(euclid.held_out(seed, 256))
    for example in itertools.islice(skill(seed, held_out), 200):
        pair = euclid.parse(example.prompt)
        assert pair not in held_out
        assert kind(example) == "full"
        assert euclid.decode(example.line["output_ids"]) == example.response


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_the_habit_is_mostly_wrong(seed: int) -> None:
    held_out = frozenset(euclid.held_out(seed, 256))
    shares = Habit(guess=0.7, stop=0.2)
    examples = list(itertools.islice(habit(seed, held_out, shares), 600))
    pairs = [euclid.parse(example.prompt) for example in examples]
    assert not held_out & set(pairs)
    kinds = Counter(map(kind, examples))
    # those of one step cannot stop early: they guess
    assert 0.64 < kinds["guess"] / 600 < 0.82
    assert 0.08 < kinds["stop"] / 600 < 0.26
    assert kinds["full"] / 600 < 0.16
    guesses = [(p, e) for p, e in zip(pairs, examples, strict=True) if kind(e) == "guess"]
    larger = sum(example.response == euclid.guess(max(pair)) for pair, example in guesses)
    assert 0.35 < larger / len(guesses) < 0.65
    right = [euclid.judge(p, e.response).is_right for p, e in guesses]
    assert sum(right) / len(right) < 0.06
