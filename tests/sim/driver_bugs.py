"""Bugs of the driver of a run that only this folder sows; see tests/sim/bugs.py."""

import asyncio
from collections.abc import Callable

import pytest

from everstep.rollout.output import RolloutOutput
from everstep.trainer_bridge.run import state as run_state
from everstep.trainer_bridge.run.driver import RolloutDriver
from everstep.trainer_bridge.run.errands import Errands
from everstep.trainer_bridge.run.fleet import Fleet
from everstep.trainer_bridge.run.patient_engine import PatientEngine
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.trajectories.record import encode_line, trajectory_of

from .driver_engine import WatchedEngine

Bug = Callable[[pytest.MonkeyPatch], None]


def _at_restart(patch: pytest.MonkeyPatch, change: Callable[[RunState], None]) -> None:
    """Whoever goes on with a run file begins with this."""
    begin = RunState.__init__

    def careless(self, *args, **options):
        begin(self, *args, **options)
        change(self)

    patch.setattr(RunState, "__init__", careless)


def submission_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who was placed and not submitted before a kill is not submitted after it."""
    forgotten: set[str] = set()
    follow, submit_now = Errands._follow, RolloutDriver._submit_now

    async def lazy_follow(self, place):
        while place.key in forgotten:
            await asyncio.sleep(3600.0)
        await follow(self, place)

    async def lazy_submit(self, engine, place):
        if place.key not in forgotten:
            await submit_now(self, engine, place)

    def note(state: RunState) -> None:
        forgotten.clear()
        forgotten.update(p.key for p in state.places.values() if p.rollout_id is None)

    _at_restart(patch, note)
    patch.setattr(Errands, "_follow", lazy_follow)
    patch.setattr(RolloutDriver, "_submit_now", lazy_submit)


def told_twice(patch: pytest.MonkeyPatch) -> None:
    """After a restart the tokens of who is under way are counted again."""

    def forget(state: RunState) -> None:
        for place in state.places.values():
            place.spells = []

    _at_restart(patch, forget)


def lost_lease_dealt_again(patch: pytest.MonkeyPatch) -> None:
    """What an engine that stays away had of the budget is given to others."""

    def left_of(budget, leases):
        return budget - sum(
            lease.used if lease.state in ("over", "lost") else lease.tokens for lease in leases
        )

    patch.setattr(run_state, "left_of", left_of)


def lease_returned_twice(patch: pytest.MonkeyPatch) -> None:
    """What is given back of a lease is dealt twice over."""

    def left_of(budget, leases):
        return budget - sum(
            2 * lease.used - lease.tokens if lease.state == "over" else lease.tokens
            for lease in leases
        )

    patch.setattr(run_state, "left_of", left_of)


def lease_renamed(patch: pytest.MonkeyPatch) -> None:
    """A lease that was not answered is asked for under another key after a restart."""

    def rename(state: RunState) -> None:
        for lease in state.leases.values():
            if lease.budget_id is None:
                lease.key += "0"

    _at_restart(patch, rename)


def output_not_cut(patch: pytest.MonkeyPatch) -> None:
    """What was written and not committed stays in the output."""
    patch.setattr(RolloutOutput, "cut", lambda self, size: None)


def output_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The run file says that lines count before the disk has them."""

    def write(self, groups):
        for group in groups:
            lines = (encode_line(trajectory_of(one)) for one in group)
            self._append(memoryview(b"".join(line + b"\n" for line in lines)))
        return self._size

    patch.setattr(RolloutOutput, "write", write)


def settled_early(patch: pytest.MonkeyPatch) -> None:
    """An iteration is over while an engine may still draw on a lease that it was asked to end."""
    active = RunState.active_leases

    def hasty(self):
        return [lease for lease in active(self) if lease.state != "closing"]

    patch.setattr(RunState, "active_leases", hasty)


def purge_skipped(patch: pytest.MonkeyPatch) -> None:
    """Who is purged is not cancelled in its engine."""
    patch.setattr(Errands, "_cancel_leaving", lambda self, name: None)


def not_swept(patch: pytest.MonkeyPatch) -> None:
    """An engine that was away goes on with what was sampled elsewhere meanwhile."""
    patch.setattr(Fleet, "_sweep", _nothing)


def meter_skipped(patch: pytest.MonkeyPatch) -> None:
    """Samples are submitted to a pool that no budget meters yet."""

    async def enter(self, name):
        await self._sweep(self._engines[name])

    patch.setattr(Fleet, "_enter", enter)


def acknowledged_early(patch: pytest.MonkeyPatch) -> None:
    """An engine may forget what ended before the run has written it down."""
    ended = WatchedEngine.ended

    async def hasty(self, rollout_id):
        rollout = await ended(self, rollout_id)
        await self.acknowledge([rollout_id])
        return rollout

    patch.setattr(WatchedEngine, "ended", hasty)


def room_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """An engine whose disk is full ends the run."""

    async def once(self, call):
        return await call()

    patch.setattr(PatientEngine, "_room", once)


async def _nothing(self, engine) -> None:
    return None


DRIVER_BUGS: dict[str, Bug] = {
    bug.__name__: bug
    for bug in (
        submission_forgotten,
        told_twice,
        lost_lease_dealt_again,
        lease_returned_twice,
        lease_renamed,
        output_not_cut,
        output_not_synced,
        settled_early,
        purge_skipped,
        not_swept,
        meter_skipped,
        acknowledged_early,
        room_not_waited_for,
    )
}
