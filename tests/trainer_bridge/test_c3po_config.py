"""What the controller can be told, and what it refuses."""

import pytest

from everstep.engine.errors import ConfigError
from everstep.trainer_bridge.c3po.c3po import C3po
from everstep.trainer_bridge.c3po.config import C3poConfig


def config(**values) -> C3poConfig:
    return C3poConfig(**{"budget": 8, "capacity": 4, **values})


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("budget", 0, "an integer from 1"),
        ("budget", -5, "an integer from 1"),
        ("budget", 1.5, "an integer from 1"),
        ("capacity", 0, "an integer from 1"),
        ("retention", -1, "an integer from 0"),
        ("group", 0, "an integer from 1"),
        ("max_lag", -1, "an integer from 0, or none"),
        ("max_staleness", -1, "an integer from 0, or none"),
        ("consumer_batch", 0, "an integer from 1, or none"),
        ("max_reissues", -1, "an integer from 0"),
        ("mode", "both", "'generated' or 'completed'"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_accepted(name, value, accepted):
    with pytest.raises(ConfigError) as error:
        C3po(config(**{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}")
    assert accepted in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["max_staleness", "consumer_batch"])
def test_the_admission_bound_needs_both_its_numbers(name):
    missing = {"max_staleness", "consumer_batch"} - {name}
    with pytest.raises(ConfigError, match=f"^{missing.pop()} is none"):
        config(**{name: 1}).check()


@pytest.mark.parametrize(
    "values",
    [
        {"capacity": 1, "group": 8},
        {"retention": 0},
        {"budget": 1},
        {"max_lag": 0},
        {"max_staleness": 0, "consumer_batch": 1},
        {"max_reissues": 0},
    ],
)
def test_the_least_accepted_values_are_accepted(values):
    config(**values).check()
