"""The tick simulator against one that goes token by token, and the baselines by hand."""

import itertools
import statistics
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer_bridge.c3po.baselines import stop_at, synchronous
from everstep.trainer_bridge.c3po.comparison import (
    Setting,
    retention_without_purges,
    run_baseline,
    run_c3po,
    step_speed_up,
)
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.c3po.simulator import Fate, Simulator, StepCost
from everstep.trainer_bridge.c3po.words import Sample


def naive(mode, budget, capacity, retention, lengths):
    """PAPER.md §2.2 without groups, one token at a time. Names are (prompt, attempt).

    Per iteration: what was purged, ticks, C, what ended, and the pool with tokens and retention.
    """
    stream = deque((prompt, 0) for prompt in range(len(lengths)))
    pool: list[list] = []  # [name, tokens, retention]
    while stream or pool:
        purged = [row for row in pool if row[2] > retention]
        pool = [row for row in pool if row[2] <= retention]
        stream.extend((name[0], name[1] + 1) for name, _, _ in purged)
        counted, ticks, ended = 0, 0, []
        while counted < budget and (stream or pool):
            while stream and len(pool) < capacity:
                pool.append([stream.popleft(), 0, 0])
            ticks += 1
            for row in list(pool):
                if mode == "generated" and counted == budget:
                    break
                row[1] += 1
                counted += mode == "generated"
                name, tokens, _ = row
                if tokens == lengths[name[0]][name[1] % len(lengths[name[0]])]:
                    pool.remove(row)
                    ended.append((name, tokens))
                    counted += tokens * (mode == "completed")
        for row in pool:
            row[2] += row[1] > 0
        yield (
            [(name, tokens) for name, tokens, _ in purged],
            ticks,
            counted,
            ended,
            [tuple(row) for row in pool if row[1]],
        )


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["generated", "completed"]),
    budget=st.integers(1, 25),
    capacity=st.integers(1, 5),
    standby=st.sampled_from([0, 0, 1, 5]),
    retention=st.integers(0, 3),
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), max_size=8),
)
def test_runs_of_ticks_are_the_ticks(mode, budget, capacity, standby, retention, lengths):
    """Whether or not rollouts stand by behind those that run."""
    simulator = Simulator(
        C3poConfig(
            mode=mode,
            budget=budget,
            capacity=capacity,
            standby=standby,
            retention=retention,
            max_reissues=1000,
        ),
        iter(()),
        lambda s: lengths[int(s.prompt)][s.attempt % len(lengths[int(s.prompt)])],
    )
    # all of them at once: the tail of the stream is behind the last
    simulator.machine.extend(str(i) for i in range(len(lengths)))
    # where a sample is too long for σ it is issued again for ever: the first iterations will do
    for expected in itertools.islice(naive(mode, budget, capacity, retention, lengths), 40):
        found = simulator.iterate()
        assert (
            [(name(sample), tokens) for sample, tokens in found.purged],
            found.ticks,
            found.counted,
            [(name(live.sample), live.length) for live in found.ended],
            [(name(v.sample), v.length, v.retention) for v in found.pool if v.spans],
        ) == expected
    if simulator.machine.phase != "idle":
        assert simulator.iterate() is None


def name(sample: Sample) -> tuple[int, int]:
    return int(sample.prompt), sample.attempt


fates = st.none() | st.builds(Fate, st.integers(1, 8), st.sampled_from(["error", "abort", "lost"]))


@settings(max_examples=100, deadline=None)
@given(
    config=st.builds(
        C3poConfig,
        mode=st.sampled_from(["generated", "completed"]),
        budget=st.integers(1, 40),
        capacity=st.integers(1, 6),
        retention=st.integers(0, 2),
        group=st.integers(1, 3),
        max_lag=st.sampled_from([None, 0, 2]),
        max_reissues=st.integers(0, 3),
    ),
    num_prompts=st.integers(0, 6),
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=7),
    fates=st.lists(fates, min_size=1, max_size=5),
)
def test_every_run_ends_with_its_books_balanced(config, num_prompts, lengths, fates):
    def pick(values, sample, losses=0):
        return values[
            (7 * int(sample.prompt) + 3 * sample.index + sample.attempt + losses) % len(values)
        ]

    simulator = Simulator(
        config,
        (str(i) for i in range(num_prompts)),
        lambda sample: pick(lengths, sample),
        fates=lambda sample, losses: pick(fates, sample, losses),
    )
    iterations = simulator.run(5000)
    assert simulator.machine.phase == "done"
    total = simulator.machine.total
    assert total.sampled == total.delivered + total.wasted
    trained = [group.prompt for iteration in iterations for group in iteration.groups]
    abandoned = [prompt for iteration in iterations for prompt in iteration.abandoned]
    assert sorted(trained + abandoned) == sorted(str(i) for i in range(num_prompts))
    if config.mode == "generated":
        for iteration in iterations:
            ran_out = not iteration.pool
            assert iteration.books.sampled == iteration.counted
            assert iteration.counted == config.budget or ran_out


LENGTHS = {"a": 3, "b": 14, "c": 5, "d": 4, "e": 6}


def of(sample: Sample) -> int:
    return LENGTHS[sample.prompt]


COST = StepCost(fixed_s=10, row_s=1, prefill_token_s=0.5)


def test_a_synchronous_step_by_hand():
    """a 0-3, b 0-14, c 0-5, d 3-7, e 5-11: 7 ticks of 3 rows, 4 of 2, 3 of 1."""
    (step,) = synchronous(iter(LENGTHS), of, batch=5, group=1, capacity=3, cost=COST)
    assert step.seconds == 14 * 10 + (7 * 3 + 4 * 2 + 3 * 1)
    assert (step.sampled, step.wasted, sorted(step.lengths)) == (32, 0, [3, 4, 5, 6, 14])


@pytest.mark.parametrize("resubmission", ["restart", "resume"])
def test_stop_at_2_by_hand(resubmission):
    """First step: a ends at 3, then c at 5; b has 5 tokens, d (from 3) has 2."""
    steps = stop_at(
        iter(LENGTHS),
        of,
        batch=2,
        group=1,
        capacity=3,
        cost=COST,
        resubmission=resubmission,
        prompt_tokens=4,
    )
    first, second = itertools.islice(steps, 2)
    assert first.seconds == 5 * (10 + 3) + 4 * (4 * 0.5)
    assert first.lengths == [3, 5]
    if resubmission == "restart":
        # b and d begin again, e joins: d ends at 4, e at 6
        assert (first.wasted, second.lengths) == (7, [4, 6])
        assert second.sampled == 4 * 3 + 2 * 2
        assert second.seconds == 4 * 13 + 2 * 12 + 3 * (4 * 0.5)
    else:
        # b has 5 and d 2 tokens: d ends after 2, e after 6; both prefixes are prefilled again
        assert (first.wasted, second.lengths) == (0, [4, 6])
        assert second.sampled == 2 * 3 + 4 * 2
        assert second.seconds == 2 * 13 + 4 * 12 + (3 * 4 + 5 + 2) * 0.5


def test_equal_lengths_lose_nothing():
    lengths = CappedLognormal(median=50, ratio=1)
    assert {lengths(Sample(str(i), 0)) for i in range(50)} == {50}
    setting = Setting(
        batch=8,
        group=4,
        capacity=16,
        cost=StepCost(fixed_s=1, row_s=0.1, prefill_token_s=0.01),
        prompt_tokens=9,
        warm_up=0,
        measured=12,
    )
    ours = run_c3po(setting, lengths, budget=8 * 4 * 50, retention=0)
    theirs = run_baseline("synchronous", setting, lengths)
    assert ours == theirs
    assert ours.wasted == 0


def test_the_lognormal_is_what_it_says():
    lengths = CappedLognormal(median=1000, ratio=16, share_at_cap=0.01, seed=3)
    drawn = sorted(lengths(Sample(str(i), 0)) for i in range(20_000))
    assert drawn[-1] == lengths.cap == 16_000
    assert sum(length == 16_000 for length in drawn) / 20_000 == pytest.approx(0.01, abs=0.003)
    assert drawn[10_000] == pytest.approx(1000, rel=0.05)
    assert statistics.fmean(drawn) == pytest.approx(lengths.mean, rel=0.03)
    # another attempt, another seed: another draw
    assert lengths(Sample("0", 0)) != lengths(Sample("0", 0, 1))
    other = CappedLognormal(median=1000, ratio=16, seed=4)
    assert lengths(Sample("0", 0)) != other(Sample("0", 0))


def test_drawing_killed_rollouts_anew_favours_short_ones_and_repeating_them_does_not():
    """With a kill at each token with probability p, what survives has density f(L)(1-p)^L."""
    p = 1 / 100

    def killed(what):
        def fate(sample, losses):
            uniform = random_of("fate", sample, losses)
            after = 1
            survives = 1 - p
            chance = survives
            while uniform < chance and after < 200:
                chance *= survives
                after += 1
            return Fate(after, what) if after < 200 else None

        return fate

    def mean_length(what):
        config = C3poConfig(budget=10**6, capacity=20, max_reissues=1000)
        prompts = (str(i) for i in range(600))
        simulator = Simulator(config, prompts, lengths, fates=killed(what))
        iterations = simulator.run(100)
        trained = [m.length for it in iterations for g in it.groups for m in g.samples]
        assert len(trained) == 600
        return statistics.fmean(trained), simulator.machine.total

    def lengths(sample):
        return 20 if random_of("length", sample, 0) < 0.5 else 180

    short, long = (1 - p) ** 20, (1 - p) ** 180
    expected = (20 * short + 180 * long) / (short + long)
    anew, books = mean_length("error")
    assert anew == pytest.approx(expected, rel=0.1)
    assert books.regenerated > 0
    repeated, _ = mean_length("lost")
    assert repeated == pytest.approx(100, rel=0.1)


def random_of(*parts) -> float:
    from everstep.engine.rollout import derive_seed

    return derive_seed(*parts) / 2**63


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 6),
    share=st.integers(1, 9),
    rest=st.integers(0, 5),
    group=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
)
def test_the_retention_that_is_named_purges_nothing(capacity, share, rest, group, lengths):
    budget = capacity * share + rest % capacity
    retention = retention_without_purges(max(lengths), budget=budget, capacity=capacity)
    simulator = Simulator(
        C3poConfig(budget=budget, capacity=capacity, retention=retention, group=group),
        (str(number) for number in range(8)),
        lambda sample: lengths[(3 * int(sample.prompt) + sample.index) % len(lengths)],
    )
    assert not any(iteration.purged for iteration in simulator.run(1000))
    assert simulator.machine.total.wasted == 0


def test_recomputed_kv_costs_the_prefill_of_what_is_carried():
    def seconds(*, recomputes_kv):
        simulator = Simulator(
            C3poConfig(budget=10, capacity=3, retention=9),
            iter(LENGTHS),
            of,
            cost=COST,
            prompt_tokens=4,
            recomputes_kv=recomputes_kv,
        )
        return [(iteration.seconds, iteration.pool) for iteration in simulator.run(99)]

    kept, again = seconds(recomputes_kv=False), seconds(recomputes_kv=True)
    carried = [0.0]
    for _, pool in kept[:-1]:
        carried.append(sum((4 + live.length) * 0.5 for live in pool if live.spans))
    assert [b - a for (a, _), (b, _) in zip(kept, again, strict=True)] == carried
    assert sum(carried) > 0


def test_the_step_gains_what_amdahl_leaves():
    assert step_speed_up(2.5, 0.0) == 2.5
    assert step_speed_up(2.5, 4 / 9) == pytest.approx(1.5)
    assert step_speed_up(10**9, 0.5) == pytest.approx(2.0)
