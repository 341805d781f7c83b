"""The checker of driven runs can find fault: a sound history, with one thing changed, is not sound."""

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.sim import world
from tests.sim.clocks import virtual
from tests.sim.driver_checker import DriverChecker
from tests.sim.history import Event

SEED = 15
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def sound() -> tuple[list[Event], Callable[[list[Event]], list[str]]]:
    """A history with a driven run, a trainer and purges, and what judges it."""
    made = world._World(SEED, is_printing=False, sqlite_share=0.0)
    driver = made.profile.driver
    assert driver is not None
    assert driver.is_trained
    assert driver.config.mode == "generated"
    assert made.profile.retain_acked_s > 1e6
    with virtual(made.loop.time, made.wall, made.rng("ids"), made.on_log):
        assert not made.live()

    def judge(events: list[Event]) -> list[str]:
        config = msgspec.structs.asdict(driver.config)
        return DriverChecker(config, driver.num_prompts, driver.epochs).judge(events)

    assert not judge(made.history.events)
    return made.history.events, judge


def group_lost(done: Fields) -> None:
    del done["lines"][:3]


def group_twice(done: Fields) -> None:
    done["lines"] += done["lines"][-3:]


def member_lost(done: Fields) -> None:
    del done["lines"][-1]


def groups_turned(done: Fields) -> None:
    done["lines"] = done["lines"][-3:] + done["lines"][:-3]


def other_token(done: Fields) -> None:
    done["lines"][0]["output_ids"][0] += 1


def other_iterations(done: Fields) -> None:
    done["lines"][0]["iterations"][0][2] += 1


def too_old(done: Fields) -> None:
    # a line of several tokens, told as if they came far apart
    line = next(one for one in done["lines"] if len(one["output_ids"]) > 1)
    [_, version, _], *_ = line["iterations"]
    num = len(line["output_ids"])
    line["iterations"] = [[-90, version, 1], [line["iteration"], version, num - 1]]


def more_delivered(done: Fields) -> None:
    done["total"]["delivered"] += 1


def more_waste(done: Fields) -> None:
    done["total"]["purged"] += 1


def gap_in_the_books(done: Fields) -> None:
    done["books"][1]["opening_carried"] += 1


def lost_for_nothing(done: Fields) -> None:
    done["tally"]["fallen"]["lost"] = [1, 1]


def more_used(journal: Fields) -> None:
    _, budget = next(one for one in journal["budgets"] if one[0].split("/")[1] == "0")
    budget["used"] += 1000


def used_before_the_first(journal: Fields) -> None:
    _, budget = next(one for one in journal["budgets"] if one[0].endswith("/meter"))
    budget["used"] = 1


def still_open(journal: Fields) -> None:
    journal["budgets"][-1][1]["state"] = "open"


def still_there(journal: Fields) -> None:
    rollout_id, num_tokens, *_ = journal["rollouts"][0]
    journal["rollouts"][0] = (rollout_id, num_tokens, False, False)


def longer_there(journal: Fields) -> None:
    rollout_id, num_tokens, *rest = journal["rollouts"][0]
    journal["rollouts"][0] = (rollout_id, num_tokens + 1, *rest)


def turned_for_the_trainer(offered: Fields) -> None:
    offered["rollouts"] = dict(reversed(offered["rollouts"].items()))


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("done", group_lost, "I8"),
        ("done", group_twice, "I2"),
        ("done", member_lost, "I8"),
        ("done", groups_turned, "I2"),
        ("done", other_token, "I2"),
        ("done", other_iterations, "I5"),
        ("done", too_old, "σ"),
        ("done", more_delivered, "I5"),
        ("done", more_waste, "I5"),
        ("done", gap_in_the_books, "I5"),
        ("done", lost_for_nothing, "I1"),
        ("journal", more_used, "Φ"),
        ("journal", used_before_the_first, "Φ"),
        ("journal", still_open, "I1"),
        ("journal", still_there, "I1"),
        ("journal", longer_there, "Φ"),
        ("offered", turned_for_the_trainer, "I2"),
    ],
)
def test_a_run_that_cannot_be_is_found(sound, kind, change, word) -> None:
    events, judge = sound
    events = list(events)
    places = [at for at, event in enumerate(events) if event.kind == kind and _is_meant(event)]
    at = places[-1]
    fields = copy.deepcopy(events[at].fields)
    change(fields)
    events[at] = Event(events[at].time_s, events[at].who, kind, fields)
    faults = judge(events)
    assert any(fault.startswith(word) for fault in faults), faults


def _is_meant(event: Event) -> bool:
    """What says something of the run."""
    if event.kind == "journal":
        return bool(event.fields["budgets"] and event.fields["rollouts"])
    if event.kind == "offered":
        return event.fields["group"].startswith("r") and len(event.fields["rollouts"]) > 1
    return event.who == "driver"
