"""The tables of PAPER.md §2.5, cell by cell, through the tick simulator."""

from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.simulator import Iteration, Simulator
from everstep.trainer_bridge.c3po.words import Live, Sample


def segments(live: Live) -> str:
    return "+".join(str(span) for span in live.spans)


def left(iteration: Iteration) -> dict[str, tuple[int, int, str]]:
    """P after: name → tokens, retention, segments."""
    return {
        str(live.sample): (live.length, live.retention, segments(live)) for live in iteration.pool
    }


def ended(iteration: Iteration) -> dict[str, str]:
    return {str(live.sample): segments(live) for live in iteration.ended}


def purged(iteration: Iteration) -> dict[str, int]:
    return {str(sample): tokens for sample, tokens in iteration.purged}


def stream(iteration: Iteration) -> list[str]:
    return [str(sample) for sample in iteration.stream]


SINGLE = {"p1": [3], "p2": [14, 4], "p3": [5], "p4": [4], "p5": [6]}


def single(sample: Sample) -> int:
    return SINGLE[sample.prompt][sample.attempt]


def run_single(config: C3poConfig) -> list[Iteration]:
    return Simulator(config, iter(SINGLE), single).run(99)


def test_oracle_a_completed():
    zero, one, two = run_single(C3poConfig(mode="completed", capacity=3, budget=6, retention=1))

    assert (purged(zero), zero.ticks, zero.books.sampled, zero.counted) == ({}, 5, 15, 8)
    assert ended(zero) == {"p1.0": "3@0", "p3.0": "5@0"}
    assert left(zero) == {"p2.0": (5, 1, "5@0"), "p4.0": (2, 1, "2@0")}
    assert stream(zero) == ["p5.0"]

    assert (purged(one), one.ticks, one.books.sampled, one.counted) == ({}, 6, 14, 10)
    assert ended(one) == {"p4.0": "2@0+2@1", "p5.0": "6@1"}
    assert left(one) == {"p2.0": (11, 2, "5@0+6@1")}
    assert stream(one) == []

    assert (purged(two), two.ticks, two.books.sampled, two.counted) == ({"p2.0": 11}, 4, 4, 4)
    assert ended(two) == {"p2.0'1": "4@2"}
    assert left(two) == {}
    assert stream(two) == []

    rows = [it.books for it in (zero, one, two)]
    assert sum(row.sampled for row in rows) == 33
    assert sum(row.delivered for row in rows) == 22
    assert sum(row.purged for row in rows) == 11


def test_oracle_b_generated():
    zero, one, two = run_single(C3poConfig(capacity=3, budget=10, retention=1))

    assert (purged(zero), zero.ticks, zero.books.sampled, zero.counted) == ({}, 4, 10, 10)
    assert ended(zero) == {"p1.0": "3@0"}
    assert left(zero) == {"p2.0": (4, 1, "4@0"), "p3.0": (3, 1, "3@0"), "p4.0": (0, 0, "")}
    assert stream(zero) == ["p5.0"]

    assert (purged(one), one.ticks, one.books.sampled, one.counted) == ({}, 4, 10, 10)
    assert ended(one) == {"p3.0": "3@0+2@1"}
    assert left(one) == {
        "p2.0": (8, 2, "4@0+4@1"),
        "p4.0": (3, 1, "3@1"),
        "p5.0": (1, 1, "1@1"),
    }
    assert stream(one) == []

    assert (purged(two), two.ticks, two.books.sampled, two.counted) == ({"p2.0": 8}, 5, 10, 10)
    assert ended(two) == {"p4.0": "3@1+1@2", "p2.0'1": "4@2", "p5.0": "1@1+5@2"}
    assert left(two) == {}

    rows = [it.books for it in (zero, one, two)]
    assert [row.delivered for row in rows] == [3, 5, 14]
    assert sum(row.sampled for row in rows) == 30
    assert sum(row.purged for row in rows) == 8


GROUPS = {"a": [[3], [9, 4]], "b": [[4], [5]], "c": [[2], [3]]}


def grouped(sample: Sample) -> int:
    return GROUPS[sample.prompt][sample.index][sample.attempt]


def test_oracle_c_groups():
    config = C3poConfig(capacity=3, budget=8, retention=1, group=2)
    zero, one, two, three = Simulator(config, iter(GROUPS), grouped).run(99)

    assert (purged(zero), zero.counted) == ({}, 8)
    assert ended(zero) == {"a.0": "3@0"}
    assert list(map(str, zero.held)) == ["a.0"]
    assert zero.groups == ()
    assert left(zero) == {"a.1": (3, 1, "3@0"), "b.0": (2, 1, "2@0")}

    assert (purged(one), one.counted) == ({}, 8)
    assert ended(one) == {"b.0": "2@0+2@1"}
    assert list(map(str, one.held)) == ["a.0", "b.0"]
    assert one.groups == ()
    assert left(one) == {
        "a.1": (6, 2, "3@0+3@1"),
        "b.1": (3, 1, "3@1"),
        "c.0": (0, 0, ""),
    }

    assert (purged(two), two.counted) == ({"a.1": 6}, 8)
    assert ended(two) == {"b.1": "3@1+2@2", "c.0": "2@2", "c.1": "3@2"}
    assert list(map(str, two.held)) == ["a.0"]
    assert [group.prompt for group in two.groups] == ["b", "c"]
    assert sum(group.num_tokens for group in two.groups) == two.books.delivered == 14
    assert left(two) == {"a.1'1": (1, 1, "1@2")}

    assert (purged(three), three.counted) == ({}, 3)
    assert ended(three) == {"a.1'1": "1@2+3@3"}
    assert three.held == []
    assert [group.prompt for group in three.groups] == ["a"]
    assert three.books.delivered == 7
    assert three.number - three.groups[0].oldest_version == 3
    assert left(three) == {}
