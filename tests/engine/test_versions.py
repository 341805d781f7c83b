"""Versions of the weights as a manager has them: order, lineages, refusals, restarts."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from everstep.engine.checkpoint.manifest import read_manifest, write_manifest
from everstep.engine.errors import (
    CheckpointError,
    EngineDied,
    EverstepError,
    IllegalState,
    StaleVersion,
    WeightsRefused,
)
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Resume
from everstep.engine.rollout import RolloutState, SamplingParams
from tests.engine.inline_backend import InlineBackend
from tests.fakes import generate_alone, make_version

# what a MemoryJournal keeps is lost with it: these tests hand it on
BASE = "base"


class Lasting(MemoryJournal):
    """A store that the next manager opens again."""

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def managed(store=None, **options):
    backend = InlineBackend()
    journal = None if store is None else JournalThread(store)
    manager = RolloutManager(backend, None, journal=journal, model_path=BASE, **options)
    await manager.start()
    try:
        yield manager, backend
    finally:
        await manager.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def ask(max_tokens=30, **sampling):
    return Submission(
        prompt_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


def alone(rollout):
    return generate_alone(
        rollout.prompt_ids, seed=rollout.seed, max_tokens=rollout.max_tokens, vocab_size=300
    )


@contextlib.asynccontextmanager
async def held_at(manager, backend, count):
    """A rollout that has so many tokens, and grows again afterwards."""
    backend.steps_left = count
    [rollout] = manager.submit(ask())
    await manager.wait(rollout.id, after=count - 1)
    yield rollout
    backend.steps_left = None


def test_tokens_say_which_version_made_them_and_over_what(tmp_path):
    async def body():
        async with managed() as (manager, backend):
            async with held_at(manager, backend, 3) as rollout:
                staged, flipped = await manager.versions.update(str(make_version(tmp_path, 5)))
            assert (staged.version, flipped.version, manager.version.number) == (5, 5, 5)
            done = await manager.wait(rollout.id)
            assert done.output_ids == alone(done)
            first, second = done.segments
            assert (first.version, first.kv) == (1, "computed")
            assert (second.version, second.kv) == (5, "keep")
            assert (second.digest, manager.info.digest) == (staged.digest, staged.digest)
            assert done.versions == [1] * 3 + [5] * 27
            metrics = {metric.name: metric for metric in manager.current_metrics()}
            foreign = metrics["everstep:foreign_version_kv_tokens_total"]
            assert foreign.values == {("keep",): 27.0}
            assert metrics["everstep:weight_version"].values == {(): 5.0}

    run(body())


def test_numbers_never_run_backwards(tmp_path):
    async def body():
        async with managed() as (manager, _):
            await manager.versions.update(str(make_version(tmp_path / "7", 7)))
            for number in (6, 3):
                with pytest.raises(
                    StaleVersion, match=rf"version {number} .*version 7 .*backwards"
                ):
                    await manager.versions.stage(str(make_version(tmp_path / "old", number)))
            # the same number is other weights
            with pytest.raises(StaleVersion, match=r"version 7 .*version 7 "):
                await manager.versions.stage(
                    str(make_version(tmp_path / "twin", 7, content="twin"))
                )
            # asked again, as after an answer that was lost: nothing is done
            staged, flipped = await manager.versions.update(str(tmp_path / "7"))
            assert (staged.report.seconds, flipped.stall_s) == (0.0, 0.0)
            assert len(manager.versions.history) == 2

    run(body())


def test_a_rollback_names_its_version_and_begins_a_lineage(tmp_path):
    async def body():
        async with managed() as (manager, backend):
            for number in (2, 3):
                await manager.versions.update(str(make_version(tmp_path / f"{number}", number)))
            with pytest.raises(IllegalState, match="version 9 never served here"):
                await manager.versions.roll_back(9)
            flipped = await manager.versions.roll_back(2)
            assert flipped.version == backend.core.runner.version == 2
            lineage = manager.version.lineage
            assert lineage
            # what the trainer of the abandoned line still publishes is refused, whatever its number
            with pytest.raises(StaleVersion, match=f"of lineage .none.*{lineage}"):
                await manager.versions.stage(str(make_version(tmp_path / "4", 4)))
            late = make_version(tmp_path / "again", 3, lineage=lineage, content="again")
            await manager.versions.update(str(late))
            assert (manager.version.number, manager.version.lineage) == (3, lineage)
            numbers = [version.number for version in manager.versions.history]
            assert numbers == [1, 2, 3, 2, 3]

    run(body())


def test_a_rollback_can_be_staged_and_flipped_to_later(tmp_path):
    """So that several servers go back together, or none of them does."""

    async def body():
        async with managed() as (manager, backend):
            for number in (2, 3):
                folder = make_version(tmp_path / f"{number}", number, lineage="old")
                await manager.versions.update(str(folder))
            again = make_version(tmp_path / "again", 2, lineage="new", content="again")
            with pytest.raises(StaleVersion, match="of lineage new"):
                await manager.versions.stage(str(again))
            with pytest.raises(StaleVersion, match="holds version 2, the rollback names 7"):
                await manager.versions.stage(str(again), rollback=7)
            staged = await manager.versions.stage(str(again), rollback=2)
            assert (manager.version.number, manager.version.lineage) == (3, "old")
            flipped = await manager.versions.flip(2)
            assert flipped.digest == staged.digest == manager.version.digest
            assert (manager.version.number, manager.version.lineage) == (2, "new")
            assert backend.core.runner.version == 2

    run(body())


def test_the_same_weights_under_a_new_number_are_flipped_to(tmp_path):
    """An update whose gradient is 0: tokens have to say the number that serves."""

    async def body():
        async with managed() as (manager, backend):
            digests = set()
            for number in (2, 3):
                folder = make_version(tmp_path / f"{number}", 2)
                write_manifest(folder, replace(read_manifest(folder), version=number))
                await manager.versions.update(str(folder))
                digests.add(manager.version.digest)
                [rollout] = manager.submit(ask(max_tokens=3))
                assert (await manager.wait(rollout.id)).versions == [number] * 3
            assert len(digests) == 1
            flipped = await manager.versions.roll_back(2)
            assert (flipped.version, backend.core.runner.version) == (2, 2)

    run(body())


def test_a_rollback_to_the_weights_that_serve_changes_their_lineage_alone(tmp_path):
    async def body():
        async with managed() as (manager, _):
            await manager.versions.update(str(make_version(tmp_path / "2", 2, lineage="old")))
            digest = manager.version.digest
            await manager.versions.stage(str(make_version(tmp_path / "3", 3, lineage="old")))
            again = make_version(tmp_path / "again", 2, lineage="new")
            assert (await manager.versions.stage(str(again), rollback=2)).report.seconds == 0.0
            assert manager.version.lineage == "old"
            flipped = await manager.versions.flip(2)
            assert (flipped.stall_s, flipped.digest) == (0.0, digest)
            assert (manager.version.lineage, manager.version.digest) == ("new", digest)
            await manager.versions.update(str(make_version(tmp_path / "4", 4, lineage="new")))
            assert manager.version.number == 4

    run(body())


def test_a_version_that_is_refused_leaves_the_old_one_serving(tmp_path):
    async def body():
        async with managed() as (manager, backend):
            (make_version(tmp_path / "5", 5) / "refuse").touch()
            async with held_at(manager, backend, 3) as rollout:
                with pytest.raises(WeightsRefused) as refused:
                    await manager.versions.update(str(tmp_path / "5"))
                assert refused.value.tensor == "w"
                with pytest.raises(IllegalState, match="version 5 is not staged, nothing is"):
                    await manager.versions.flip(5)
                with pytest.raises(CheckpointError, match=r"no manifest\.json"):
                    await manager.versions.stage(str(tmp_path))
            done = await manager.wait(rollout.id)
            assert done.versions == [1] * 30
            assert backend.core.runner.version == manager.version.number == 1

    run(body())


def test_a_version_that_is_staged_while_another_is_takes_its_place(tmp_path):
    async def body():
        async with managed() as (manager, _):
            paths = [str(make_version(tmp_path / f"{n}", n)) for n in (2, 3)]
            found = await asyncio.gather(
                *map(manager.versions.stage, paths), return_exceptions=True
            )
            last = manager.versions.staged.number
            for number, result in zip((2, 3), found, strict=True):
                if isinstance(result, Exception):
                    assert number != last
                    assert "another version is staged instead" in str(result)
            with pytest.raises(IllegalState, match=f"version {5 - last} is not staged"):
                await manager.versions.flip(5 - last)
            await manager.versions.flip(last)
            assert manager.version.number == last

    run(body())


def test_a_core_that_dies_after_a_flip_is_started_with_the_new_version(tmp_path):
    async def body():
        async with managed() as (manager, backend):
            async with held_at(manager, backend, 3) as rollout:
                await manager.versions.update(str(make_version(tmp_path, 5)))
                backend.die()
            done = await manager.wait(rollout.id)
            assert backend.starts == 2
            assert backend.core.runner.version == 5
            assert done.output_ids == alone(done)
            assert done.versions[-1] == 5
            # the new core computed all of it anew
            assert done.segments[-1].kv == "computed"

    run(body())


def test_a_core_that_dies_before_it_flipped_did_not_flip(tmp_path):
    async def body():
        async with managed() as (manager, backend):
            async with held_at(manager, backend, 3) as rollout:
                await manager.versions.stage(str(make_version(tmp_path, 5)))
                flipping = asyncio.create_task(manager.versions.flip(5))
                while manager.versions.staged is not None:
                    await asyncio.sleep(0)
                backend.die()
                with pytest.raises(EngineDied, match=r"before version 5 .*stage it again"):
                    await flipping
            done = await manager.wait(rollout.id)
            assert set(done.versions) == {1}
            assert manager.version.number == backend.core.runner.version == 1
            assert [v.number for v in manager.versions.history] == [1]

    run(body())


def test_a_front_comes_back_with_the_version_of_its_journal(tmp_path):
    async def body():
        store = Lasting()
        async with managed(store) as (manager, backend):
            await manager.versions.update(str(make_version(tmp_path, 5, parent="0" * 64)))
            before = manager.version
            backend.is_held = True
            accepted = await manager.accept(ask())
        async with managed(store) as (manager, backend):
            assert manager.version == before
            assert backend.core.runner.version == 5
            [done] = [await manager.wait(one) for one in accepted.rollout_ids]
            assert set(done.versions) == {5}
            with pytest.raises(StaleVersion):
                await manager.versions.stage(str(make_version(tmp_path / "4", 4)))

    run(body())


def test_a_server_of_another_model_does_not_come_back_with_these_weights(tmp_path):
    async def body():
        store = Lasting()
        async with managed(store) as (manager, _):
            await manager.versions.update(str(make_version(tmp_path, 5)))
        journal = JournalThread(store)
        manager = RolloutManager(InlineBackend(), None, journal=journal, model_path="another")
        await manager.start()
        assert manager.version.number == 1
        await manager.close()

    run(body())


@pytest.mark.parametrize("dies", ["core", "front"])
def test_until_its_weights_are_there_rollouts_wait(tmp_path, dies):
    async def body():
        store = Lasting()
        folder = make_version(tmp_path / "5", 5)
        async with contextlib.AsyncExitStack() as stack:
            manager, backend = await stack.enter_async_context(managed(store))
            await manager.versions.update(str(folder))
            backend.is_held = True
            accepted = await manager.accept(ask())
            (folder / "manifest.json").unlink()
            folder.rmdir()
            if dies == "core":
                backend.die()
                while backend.starts < 2 or manager.versions.waiting_for is None:
                    await asyncio.sleep(0.005)
            else:
                await stack.aclose()
                manager, backend = await stack.enter_async_context(managed(store))
            backend.is_held = False
            assert "version 5" in manager.versions.waiting_for
            [late] = manager.submit(ask())
            mark = len(backend.sent)
            await manager.resume()
            await manager.resume([late.id])
            # not for a moment: a core may make a step between two messages
            assert not [m for m in backend.sent[mark:] if isinstance(m, Resume)]
            await asyncio.sleep(0.05)
            [rollout] = [manager.get(one) for one in accepted.rollout_ids]
            for waiting in (rollout, late):
                assert waiting.state is RolloutState.PAUSED
                assert not waiting.output_ids
                assert manager.waits_for(waiting) == "weights"
            # an older one will not do; the very version does, published again
            with pytest.raises(StaleVersion):
                await manager.versions.stage(str(make_version(tmp_path / "4", 4)))
            await manager.versions.update(str(make_version(tmp_path / "again", 5)))
            assert manager.versions.waiting_for is None
            for waiting in (rollout, late):
                done = await manager.wait(waiting.id)
                assert done.output_ids == alone(done)
                assert set(done.versions) == {5}

    run(body())


CALLS = st.sampled_from(
    (
        *("pause", "resume", "pause all", "resume all", "stage", "bad stage", "flip", "unstage"),
        *("rollback", "update keep", "update recompute", "update recompute-prompt", "wait", "die"),
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls=st.lists(CALLS, max_size=14), durable=st.booleans())
def test_no_control_call_ends_a_rollout_and_none_changes_its_tokens(
    tmp_path_factory, calls, durable
):
    """Any order of them leaves every rollout live, what was seen of it a beginning of what it
    becomes, and its versions in the order in which they served."""

    async def body():
        root, number = tmp_path_factory.mktemp("any"), 1
        async with managed(Lasting() if durable else None) as (manager, backend):
            names: list[str] = []
            for index in range(3):
                if durable:
                    names += (await manager.accept(ask(40, seed=index))).rollout_ids
                else:
                    names += [one.id for one in manager.submit(ask(40, seed=index))]
            seen: dict[str, list[int]] = {name: [] for name in names}
            for call in calls:
                backend.steps_left = 2
                number += 1
                folder = make_version(root / str(number), number, lineage=_lineage(manager))
                if call == "bad stage":
                    (folder / "refuse").touch()
                with contextlib.suppress(EverstepError):
                    await _call(manager, backend, call, str(folder), names)
                await asyncio.sleep(0.002)
                for name in names:
                    rollout = manager.get(name) if manager._holdings.get(name) else None
                    if rollout is not None:
                        assert not rollout.state.is_ended or len(rollout.output_ids) == 40
                        assert rollout.output_ids[: len(seen[name])] == seen[name]
                        seen[name] = list(rollout.output_ids)
            backend.steps_left = None
            await manager.resume()
            for name in names:
                done = await manager.wait(name)
                assert done.state is RolloutState.FINISHED
                assert done.output_ids == alone(done)
                served = [one.number for one in manager.versions.history]
                assert _is_subsequence([s.version for s in done.segments], served)

    run(body())


def _lineage(manager):
    return manager.version.lineage


async def _call(manager, backend, call, path, names):
    match call.split():
        case ["pause"]:
            await manager.pause(names[:2])
        case ["resume"]:
            await manager.resume(names[1:])
        case ["pause", "all"]:
            await manager.pause()
        case ["resume", "all"]:
            await manager.resume()
        case ["stage"] | ["bad", "stage"]:
            await manager.versions.stage(path)
        case ["flip"]:
            staged = manager.versions.staged
            await manager.versions.flip(staged.number if staged else 0)
        case ["unstage"]:
            await manager.versions.unstage()
        case ["rollback"]:
            await manager.versions.roll_back(manager.versions.history[0].number)
        case ["update", kv]:
            await manager.versions.update(path, kv)
        case ["die"]:
            backend.die()
        case ["wait"]:
            await asyncio.sleep(0.01)


def _is_subsequence(part, whole):
    """Repetitions in `part` count once: a rollout has several segments under one version."""
    rest = iter(whole)
    last = None
    for one in part:
        if one != last and one not in rest:
            return False
        last = one
    return True
