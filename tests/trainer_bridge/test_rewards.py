"""The registry: what each reward says of a text, and which settings and values are refused."""

import decimal
import fractions
import math

import msgspec
import numpy
import pytest

from everstep.engine.errors import ConfigError, MissingExtra
from everstep.engine.rollout import FinishReason, Rollout, SamplingParams
from everstep.trainer_bridge.rewards import rewards
from everstep.trainer_bridge.rewards.rewards import (
    ExactConfig,
    FunctionConfig,
    HttpConfig,
    RegexConfig,
    RewardConfig,
    RewardError,
    RewardSample,
    make_reward,
    number_of,
    reward_sample,
)


def scored(config, text, answer=None, **more):
    return make_reward(config)(RewardSample(id="ro-1", text=text, answer=answer, **more))


@pytest.mark.parametrize(
    ("text", "reward"),
    [("06", 1.0), (" 06\n", 1.0), ("6", 0.0), ("", 0.0), ("06 or 07", 0.0)],
)
def test_exact(text, reward):
    assert scored(RewardConfig(), text, "06") == reward


def test_exact_of_either_case():
    assert scored(RewardConfig(), "Paris", "paris") == 0.0
    assert scored(RewardConfig(exact=ExactConfig(ignore_case=True)), "PARIS", "Paris") == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("1878,0606,</think>06", 1.0),
        ("06", 0.0),
        ("06</think>", 0.0),
        ("</think>06</think>06", 0.0),
    ],
)
def test_only_what_follows_the_mark_counts(text, reward):
    assert scored(RewardConfig(after="</think>"), text, "06") == reward


def test_a_rollout_that_was_cut_can_be_wrong():
    config = RewardConfig(require_stop=True)
    assert scored(config, "06", "06", finish_reason="length") == 0.0
    assert scored(config, "06", "06", finish_reason="stop") == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("The answer is $\\boxed{\\frac{2}{4}}$.", "1/2", 1.0),
        ("so it is 0.5", "\\frac12", 1.0),
        ("that makes 1,234", 1234, 1.0),
        ("$x = 3$", "3", 1.0),
        ("$\\{2, 1\\}$", "\\{1,2\\}", 1.0),
        ("0.25", 0.5, 0.0),
        ("I do not know", "1/2", 0.0),
        ("", "1/2", 0.0),
    ],
)
def test_numeric(text, answer, reward):
    assert scored(RewardConfig(name="numeric"), text, answer) == reward


def test_numeric_needs_an_answer_that_is_one():
    with pytest.raises(RewardError, match="the answer '' is no number or expression"):
        scored(RewardConfig(name="numeric"), "1", "")


def test_numeric_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        make_reward(RewardConfig(name="numeric"))
    assert str(caught.value) == (
        "the numeric reward needs the package 'math-verify': pip install 'everstep[train]'"
    )


def test_regex():
    found = RewardConfig(name="regex", regex=RegexConfig(pattern=r"<answer>.*</answer>"))
    assert scored(found, "<answer>\n4\n</answer>") == 1.0
    assert scored(found, "4") == 0.0
    compared = RewardConfig(name="regex", regex=RegexConfig(pattern=r"#### (?P<answer>.*?)$"))
    assert scored(compared, "2 + 2\n#### 4", "4") == 1.0
    assert scored(compared, "#### 5", 4) == 0.0


@pytest.mark.parametrize("answer", [None, [1], True, {}])
def test_an_answer_that_cannot_be_compared_is_named(answer):
    with pytest.raises(RewardError, match="needs an answer that is a string or a number, got"):
        scored(RewardConfig(), "1", answer)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3.0),
        (fractions.Fraction(1, 4), 0.25),
    ],
)
def test_numbers_are_rewards(value, number):
    assert number_of(value) == number


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "returned nan, not a finite number"),
        (-math.inf, "returned -inf, not a finite number"),
        (-1.5e30, r"returned -1\.5e\+30, more than 1e\+30"),
        (None, r"returned None \(NoneType\), not a number"),
        ("1", r"returned '1' \(str\), not a number"),
        ([1.0], r"returned \[1.0\] \(list\), not a number"),
        (1j, r"returned 1j \(complex\), not a number"),
        (decimal.Decimal(1), r"returned Decimal\('1'\) \(Decimal\), not a number"),
        (10**400, "which no float can hold"),
        ("x" * 500, r"returned 'xx*\.\.\. \(str\)"),
    ],
)
def test_what_is_no_number_is_named(value, message):
    with pytest.raises(RewardError, match=message):
        number_of(value)


def test_a_function_may_be_a_coroutine():
    async def reward():
        return 0.75

    assert number_of(reward()) == 0.75


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(name="regex"), "reward.regex.pattern is empty"),
        (RewardConfig(name="regex", regex=RegexConfig(pattern="(")), "is no pattern: missing \\)"),
        (RewardConfig(name="function"), "must be module:function, got ''"),
        (
            RewardConfig(name="function", function=FunctionConfig(path="a/b.py")),
            "reward.function.path must be module:function, got 'a/b.py'",
        ),
        (
            RewardConfig(name="function", function=FunctionConfig(path="math:nothing")),
            "reward.function.path: 'math' has no 'nothing'",
        ),
        (
            RewardConfig(name="function", function=FunctionConfig(path="math:pi")),
            "math:pi cannot be called",
        ),
        (RewardConfig(name="http"), "reward.http.url must begin with http://, got ''"),
        (
            RewardConfig(name="http", http=HttpConfig(url="localhost:80")),
            "got 'localhost:80'",
        ),
        (RewardConfig(failure_reward=math.nan), "reward.failure_reward must be finite, at most 1e"),
    ],
)
def test_settings_that_cannot_work_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        make_reward(config)


def test_a_rollout_is_a_sample_with_the_answer_of_its_metadata():
    rollout = Rollout(
        id="ro-9",
        group_id="g",
        index=0,
        prompt_ids=[1],
        sampling=SamplingParams(),
        seed=1,
        max_tokens=4,
        metadata={"answer": "06", "task": 3},
        output_ids=[4, 5],
        text="06",
        finish_reason=FinishReason("length"),
    )
    sample = reward_sample(rollout, prompt="9678")
    assert make_reward(RewardConfig())(sample) == 1.0
    assert make_reward(RewardConfig(require_stop=True))(sample) == 0.0
    assert (sample.id, sample.prompt, sample.num_tokens) == ("ro-9", "9678", 2)
    assert sample.metadata == {"answer": "06", "task": 3}


def test_unknown_settings_are_refused():
    with pytest.raises(msgspec.ValidationError, match="unknown field `deadline`"):
        msgspec.convert({"deadline": 3}, RewardConfig)
    with pytest.raises(msgspec.ValidationError, match="workers"):
        msgspec.convert({"workers": 0}, RewardConfig)
