"""How the time between steps is dealt out to the next weights: a stager of given costs, a clock that
only they and the steps move."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.core.flipping import FlipCounts
from everstep.engine.core.swap import FULL_SLICE_S, SLICE_S, Swap
from everstep.engine.messages import Flip, Flipped, Refused, Stage, Staged, StageReport
from tests.fakes import FakeClock, FakeWeights

SHARE = 0.08


class CostlyStager:
    """Pieces of given costs in seconds, then pieces of old weights."""

    def __init__(self, clock, costs, leftovers=(), refusal=None):
        self.clock, self.costs, self.leftovers, self.refusal = clock, costs, leftovers, refusal
        self.num_discards = 0

    def stage(self, order):
        for index, cost in enumerate(self.costs):
            self.clock.advance(cost)
            yield ("digests" if index % 2 else "read"), index, len(self.costs)
        if self.refusal:
            raise self.refusal
        report = StageReport(
            num_bytes=1, seconds=0.0, busy_seconds=0.0, slices=0, longest_slice_s=0.0
        )
        return FakeWeights(order.version, f"digest {order.version}"), report

    def flip(self, prepared):
        return self._give_back()

    def discard(self):
        self.num_discards += 1
        return self._give_back()

    def _give_back(self):
        for cost in self.leftovers:
            self.clock.advance(cost)
            yield


class NoScheduler:
    def flip(self, digest, kv):
        return FlipCounts(0, 0)


class World:
    def __init__(self, costs, **more):
        self.clock = FakeClock()
        self.stager = CostlyStager(self.clock, costs, **more)
        self.swap = Swap(self.stager, NoScheduler(), share=SHARE, clock=self.clock)
        self.told = []
        self.slices = []
        self.step_seconds = 0.0

    def step(self, seconds):
        """As the core does: a step, then a slice."""
        self.told += self.swap.before_step()
        began = self.clock()
        self.clock.advance(seconds)
        self.step_seconds += seconds
        self.swap.after_step(began, self.clock())
        began = self.clock()
        self.told += self.swap.work()
        self.slices.append(self.clock() - began)

    def stage(self, version=1, priority="background"):
        self.told += self.swap.stage(Stage(version, "", priority=priority))

    def find(self, kind):
        return next((message for message in self.told if isinstance(message, kind)), None)


steps = st.lists(st.floats(1e-4, 0.2), min_size=1, max_size=60)
costs = st.lists(st.floats(1e-5, 0.01), min_size=1, max_size=40)


@given(steps, costs)
def test_in_the_background_it_takes_its_share_and_no_more(steps, costs):
    world = World(costs)
    world.stage()
    for seconds in steps:
        world.step(seconds)
        # what was overdrawn by a piece is waited for
        assert sum(world.slices) <= SHARE * world.step_seconds + max(costs) + 1e-9
        assert world.slices[-1] <= SLICE_S + max(costs) + 1e-9
    if (staged := world.find(Staged)) is None:
        # nor less, but for what a slice may not take over to the next
        lost = len(steps) * max(0.0, SHARE * max(steps) - SLICE_S)
        assert sum(world.slices) >= SHARE * world.step_seconds - lost - SLICE_S - 1e-9
    else:
        assert staged.report.busy_seconds == pytest.approx(sum(costs))
        assert staged.report.longest_slice_s == pytest.approx(max(world.slices))


@given(steps, costs)
def test_at_full_priority_there_is_a_slice_after_every_step(steps, costs):
    world = World(costs)
    world.stage(priority="full")
    for seconds in steps:
        is_busy = world.swap.is_busy
        world.step(seconds)
        assert world.slices[-1] <= FULL_SLICE_S + max(costs) + 1e-9
        if is_busy and world.find(Staged) is None:
            assert world.slices[-1] >= FULL_SLICE_S - 1e-9


def test_while_nothing_runs_priority_makes_no_difference():
    took = []
    for priority in ("background", "full"):
        world = World([0.001] * 50)
        world.stage(priority=priority)
        turns = 0
        while world.find(Staged) is None:
            world.swap.nothing_to_run()
            world.told += world.swap.work()
            turns += 1
        took.append((turns, world.find(Staged).report.busy_seconds))
    assert took[0] == took[1]
    assert took[0][1] == pytest.approx(0.05)


def test_a_report_says_where_the_time_went():
    world = World([0.001, 0.0005, 0.001, 0.0005, 0.001])
    world.stage(priority="full")
    world.step(0.01)
    report = world.find(Staged).report
    assert report.parts == pytest.approx({"read": 0.003, "digests": 0.001})
    assert report.seconds == pytest.approx(0.014)


def test_a_stall_is_all_of_the_time_between_two_steps_slices_included():
    world = World([0.001], leftovers=[0.002] * 3)
    world.stage()
    for _ in range(5):
        world.step(0.02)
    assert world.find(Staged) is not None
    world.clock.advance(0.003)
    world.told += world.swap.flip(Flip(1, "digest 1"))
    world.clock.advance(0.004)
    world.step(0.02)
    flipped = world.find(Flipped)
    assert flipped.stall_s == pytest.approx(0.007)
    assert flipped.steps_lost == pytest.approx(0.35)


@pytest.mark.parametrize("how", ["refused", "unstaged", "replaced", "given up half way"])
def test_what_is_not_flipped_to_is_given_back_in_slices(how):
    refusal = ValueError("no") if how == "refused" else None
    world = World([0.001] * 20, leftovers=[0.001] * 30, refusal=refusal)
    world.stage()
    # nothing was there before; what the fake stager gives back of it is told apart by its number
    assert world.stager.num_discards == 1
    while not (world.find(Staged) or world.find(Refused)):
        world.step(0.1)
        if how == "given up half way" and world.swap._leftovers is None:
            break
    if how == "replaced":
        world.stage(2)
    elif how != "refused":
        world.told += world.swap.unstage(1)
    assert world.stager.num_discards == 2
    mark = len(world.slices)
    while world.swap._leftovers is not None:
        world.step(0.1)
    assert sum(world.slices[mark:]) >= 0.03 - SLICE_S - 0.0011  # but for what the same slice took
    assert max(world.slices) <= SLICE_S + 0.001 + 1e-9
    if how == "refused":
        assert world.find(Refused).message == ": ValueError: no"
