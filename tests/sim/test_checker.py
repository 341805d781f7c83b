"""The checker can find fault: a sound history, with one thing changed, is not sound any more."""

import copy
import random

import msgspec
import pytest

from tests.sim import world
from tests.sim.c3po_checker import C3poChecker
from tests.sim.checker import Checker
from tests.sim.clocks import virtual
from tests.sim.history import Event, History
from tests.sim.profile import Profile

SEED = 1


@pytest.fixture(scope="module")
def sound() -> History:
    """A history with a run of C3PO++ in it, in which nothing is wrong."""
    made = world._World(SEED, is_printing=False, sqlite_share=0.0)
    assert made.profile.c3po is not None
    with virtual(made.loop.time, made.wall, made.rng("ids"), made.on_log):
        assert not made.live()
    assert not Checker().judge(made.history.events)
    return made.history


def changed(history: History, kind: str, change, *, which: int = 0, who: str = "") -> list[Event]:
    """The events, with one that can be changed changed: `change` returns whether it could."""
    events = list(history.events)
    for at, event in enumerate(events):
        if event.kind == kind and who in ("", event.who):
            fields = copy.deepcopy(event.fields)
            if change(fields):
                if which == 0:
                    events[at] = Event(event.time_s, event.who, kind, fields)
                    return events
                which -= 1
    raise AssertionError(f"no {kind} that can be changed")


def other_token(fields) -> bool:
    ids = fields["ids"]
    fields["ids"] = (*ids[:-1], (ids[-1] + 1) % 23) if ids else ids
    return len(ids) > 2


def other_logprob(fields) -> bool:
    fields["lps"] = tuple(lp - 0.5 for lp in fields["lps"])
    return bool(fields["ids"])


def other_version(fields) -> bool:
    fields["versions"] = tuple(version + 1 for version in fields["versions"])
    return bool(fields["ids"])


def other_digest(fields) -> bool:
    segments = fields["segments"]
    fields["segments"] = tuple((start, v, "0" * 64, kv) for start, v, _, kv in segments)
    return bool(segments)


def other_kv(fields) -> bool:
    segments = fields["segments"]
    fields["segments"] = tuple((start, v, digest, "keep") for start, v, digest, _ in segments)
    return len(fields["prompt"]) > 1 and bool(segments)


def short_column(fields) -> bool:
    fields["lps"] = fields["lps"][:-1]
    return bool(fields["ids"])


def other_seed(fields) -> bool:
    fields["seed"] += 1
    return bool(fields["ids"])


def nobody_cancelled(fields) -> bool:
    fields["finish"] = ("abort", None, None)
    return True


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (other_token, "I4"),
        (other_logprob, "I4"),
        (other_version, "I5"),
        (other_digest, "I9"),
        (other_kv, "I4"),
        (short_column, "I5"),
        (other_seed, "I4"),
        (nobody_cancelled, "I5"),
    ],
)
def test_an_observation_that_cannot_be_is_found(sound, change, invariant) -> None:
    faults = Checker().judge(changed(sound, "seen", change))
    assert any(fault.startswith(invariant) for fault in faults), faults


def test_a_group_that_is_never_trained_or_trained_twice_is_found(sound) -> None:
    trained = [event for event in sound.events if event.kind == "trained"]
    without = [event for event in sound.events if event is not trained[0]]
    assert any("never trained" in fault for fault in Checker().judge(without))
    twice = [*sound.events, trained[0]]
    assert any("trained twice" in fault for fault in Checker().judge(twice))


def test_a_rollout_that_is_not_known_any_more_is_found(sound) -> None:
    seen = next(event for event in sound.events if event.kind == "seen")
    lost = {"front": seen.fields["front"], "id": seen.fields["id"], "why": "unknown"}
    events = [*sound.events[:1], Event(0.0, "client", "lost", lost), *sound.events[1:]]
    assert any(fault.startswith("I1") for fault in Checker().judge(events))


def test_an_acknowledged_one_that_is_given_again_is_found(sound) -> None:
    probed = {"front": "A", "id": "ro-1", "is_known": True}
    events = [*sound.events, Event(9.0, "client", "probed", probed)]
    assert any(fault.startswith("I2") for fault in Checker().judge(events))


def test_what_was_seen_and_is_in_no_journal_is_found(sound) -> None:
    seen = next(event for event in sound.events if event.kind == "seen" and event.fields["ids"])
    crash = {"is_power": False, "in_commit": False, "is_safe": True, "kept": {}}
    crash["kept"] = {seen.fields["id"]: len(seen.fields["ids"]) - 1}
    after = Event(seen.time_s, seen.fields["front"], "crash", crash)
    at = sound.events.index(seen) + 1
    faults = Checker().judge([*sound.events[:at], after, *sound.events[at:]])
    assert any("its journal holds" in fault for fault in faults)


def test_an_answer_that_was_under_way_when_the_power_went_may_be_of_what_is_gone(sound) -> None:
    """Seed 1051 of the simulation, at first."""
    seen = next(event for event in sound.events if event.kind == "seen" and event.fields["ids"])
    front, before = seen.fields["front"], sound.events[: sound.events.index(seen)]
    kept = {"is_power": True, "in_commit": True, "kept": {seen.fields["id"]: 0}}
    gone, again = (
        Event(seen.time_s, front, "crash", kept | {"is_safe": is_safe}) for is_safe in (False, True)
    )
    ready = Event(seen.time_s, front, "ready", {"recovered": 1, "version": 1})
    for events in ([gone, seen, again, ready], [gone, again, seen, again, ready]):
        faults = Checker().judge([*before, *events])
        assert not any("its journal holds" in fault for fault in faults)
    # once it has answered again, it has what is seen of it
    faults = Checker().judge([*before, gone, ready, seen, again])
    assert any("its journal holds" in fault for fault in faults)


def judge_books(events: list[Event]) -> list[str]:
    c3po = Profile.draw(random.Random(f"{SEED}/profile"), sqlite_share=0.0).c3po
    assert c3po is not None
    config = msgspec.structs.asdict(c3po.config)
    return C3poChecker(config, c3po.num_prompts).judge(events)


def more(name: str):
    def change(fields) -> bool:
        fields[name] += 1
        return True

    return change


def more_purged(fields) -> bool:
    fields["books"]["purged"] += 1
    return True


def no_last_member(fields) -> bool:
    groups = fields["groups"]
    fields["groups"] = tuple((prompt, samples[:-1]) for prompt, samples in groups)
    return bool(groups)


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("told", more("count"), "Φ"),
        ("settled", more("used"), "Φ"),
        ("ended", more("length"), "I5"),
        ("closed", more_purged, "I5"),
        ("closed", no_last_member, "I8"),
    ],
)
def test_books_that_do_not_balance_are_found(sound, kind, change, word) -> None:
    assert not judge_books(sound.events)
    faults = judge_books(changed(sound, kind, change, who="c3po"))
    assert any(fault.startswith(word) for fault in faults), faults
