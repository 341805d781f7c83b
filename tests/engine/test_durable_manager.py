"""Durable rollouts over a journal in memory: what is shown is journaled, and outlives a manager."""

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field

import pytest

from everstep.engine.config import JournalConfig, RestartConfig
from everstep.engine.errors import (
    Conflict,
    Draining,
    EngineDied,
    EngineUnavailable,
    IllegalState,
    InvalidRequest,
    InvalidTrajectory,
    JournalError,
    JournalFull,
    KeyReused,
    UnknownRollout,
)
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import Accept, Flip, Origin, Query, RequestKey
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.growth import Growth
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import RolloutTokens
from everstep.engine.rollout import FinishReason, Rollout, RolloutState, SamplingParams
from tests.engine.inline_backend import InlineBackend
from tests.engine.small_tokenizer import small_tokenizer
from tests.fakes import generate_alone


class Store(MemoryJournal):
    """Outlives the thread that used it, as a file does. `fault` is raised by every commit."""

    def __init__(self, config: JournalConfig | None = None) -> None:
        super().__init__(config)
        self.fault: Exception | None = None
        self.commits: list[list[str]] = []

    def commit(self, ops):
        if self.fault is not None:
            raise self.fault
        super().commit(ops)
        self.commits.append([type(op).__name__ for op in ops])

    def close(self) -> None:
        pass


@dataclass
class World:
    store: Store = field(default_factory=Store)
    tokenizer: object = None

    @contextlib.asynccontextmanager
    async def managed(self, **options):
        backend = InlineBackend()
        manager = RolloutManager(
            backend, self.tokenizer, journal=JournalThread(self.store), **options
        )
        await manager.start()
        try:
            yield manager, backend
        finally:
            await manager.close()


def run(body, **world):
    asyncio.run(body(World(**world)))


def ask(prompt=(1, 2, 3), *, samples=1, max_tokens=8, **sampling):
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Submission(prompt_ids=list(prompt), sampling=params, samples=samples)


def key(name="k", body="b"):
    return RequestKey(holder="", route="/rollouts", key=name, body_digest=body)


def alone(rollout):
    return generate_alone(
        rollout.prompt_ids, seed=rollout.seed, max_tokens=rollout.max_tokens, vocab_size=300
    )


async def accepted(manager, *args, **options):
    """The one id."""
    [rollout_id] = (await manager.accept(ask(*args, **options))).rollout_ids
    return rollout_id


async def paused_at(manager, count, *args, **options):
    """A new rollout, paused where it has `count` tokens; its id."""
    backend = manager._core._backend
    backend.steps_left = count
    rollout_id = await accepted(manager, *args, **options)
    await manager.wait(rollout_id, after=count - 1)
    await manager.pause([rollout_id])
    backend.steps_left = None
    await asyncio.sleep(0.02)
    assert len(manager.get(rollout_id).output_ids) == count
    return rollout_id


def test_what_is_accepted_is_in_the_journal_and_so_is_its_ending():
    async def body(world):
        async with world.managed() as (manager, _):
            answer = await manager.accept(ask(samples=3))
            assert not answer.is_replay
            for rollout_id in answer.rollout_ids:
                assert world.store.read(rollout_id) is not None
            for rollout_id in answer.rollout_ids:
                done = await manager.wait(rollout_id)
                assert done.output_ids == alone(done)
                assert done.is_durable
                assert world.store.read(rollout_id) == done
                # it is the journal's now
                with pytest.raises(UnknownRollout):
                    manager.get(rollout_id)
                assert await manager.find(rollout_id) == done
            assert manager.num_live == 0

    run(body)


def test_readers_never_see_a_token_before_the_journal_has_it():
    async def body(world):
        async with world.managed() as (manager, _):
            rollout_id = await accepted(manager, max_tokens=30)
            seen = 0
            async for delta in manager.stream(rollout_id):
                kept = world.store.read(rollout_id)
                assert kept.output_ids[: delta.end] == delta.rollout.output_ids[: delta.end]
                assert kept.lp_sampled[: delta.end] == delta.rollout.lp_sampled[: delta.end]
                assert kept.state.is_ended or not delta.is_last
                seen = delta.end
            assert seen == 30

    run(body)


def test_a_new_manager_goes_on_where_the_journal_ends():
    async def body(world):
        async with world.managed() as (manager, backend):
            paused = await paused_at(manager, 2, (4, 5), max_tokens=20)
            backend.steps_left = 5
            first = await accepted(manager, max_tokens=20)
            await manager.wait(first, after=4)
            seen = list((await manager.find(paused)).output_ids)
            seeds = {first: manager.get(first).seed, paused: manager.get(paused).seed}
        async with world.managed() as (manager, backend):
            assert manager.num_recovered == 2
            assert {r: manager.get(r).seed for r in seeds} == seeds
            assert [len(add.output_ids) for add in backend.sent] == [2, 5]
            done = await manager.wait(first)
            assert done.output_ids == alone(done)
            assert [s.start for s in done.segments] == sorted({s.start for s in done.segments})
            await asyncio.sleep(0.02)
            assert manager.get(paused).state is RolloutState.PAUSED
            assert manager.get(paused).output_ids == seen
            await manager.resume([paused])
            done = await manager.wait(paused)
            assert done.output_ids == alone(done)

    run(body)


def test_derived_seeds_do_not_repeat_in_the_next_process():
    async def body(world):
        seeds = []
        for _ in range(3):
            async with world.managed(run_seed=7) as (manager, _):
                rollouts = [await manager.find(await accepted(manager)) for _ in range(2)]
                seeds += [rollout.seed for rollout in rollouts]
        assert len(set(seeds)) == 6

    run(body)


@pytest.mark.parametrize("death", ["core", "front"])
def test_stop_strings_and_text_survive(death):
    async def body(world):
        async with world.managed() as (manager, _):
            whole = await manager.wait(await accepted(manager, seed=3, ignore_eos=True))
            text = whole.text
            stop = text[5:8]
            at = text.index(stop)
            rollout_id = await accepted(manager, seed=3, ignore_eos=True, stop=(stop,))
            await manager.wait(rollout_id, after=1)
            if death == "core":
                manager._core._backend.die()
                done = await manager.wait(rollout_id)
        if death == "front":
            async with world.managed() as (manager, _):
                done = await manager.wait(rollout_id)
        assert done.finish_reason.matched == stop
        assert done.text == text[:at]
        assert done.output_ids == whole.output_ids[: len(done.output_ids)]
        assert done.text == world.tokenizer.decode(done.output_ids)[: done.text_offset]

    run(body, tokenizer=small_tokenizer())


def test_the_same_key_gives_the_same_rollouts_also_at_once_and_after_a_restart():
    async def body(world):
        async with world.managed() as (manager, _):
            answers = await asyncio.gather(*(manager.accept(ask(), key()) for _ in range(3)))
            assert len({tuple(a.rollout_ids) for a in answers}) == 1
            assert sorted(a.is_replay for a in answers) == [False, True, True]
            with pytest.raises(KeyReused):
                await manager.accept(ask(), key(body="other"))
            other = await manager.accept(ask(), key("k2"))
            assert other.rollout_ids != answers[0].rollout_ids
            await manager.wait(answers[0].rollout_ids[0])
            await manager.acknowledge(answers[0].rollout_ids)
        async with world.managed() as (manager, _):
            again = await manager.accept(ask(), key())
            assert again.is_replay
            assert again.rollout_ids == answers[0].rollout_ids
            assert again.group_id == answers[0].group_id
            with pytest.raises(KeyReused):
                await manager.accept(ask(), key(body="other"))
        assert sum(op == "Accept" for ops in world.store.commits for op in ops) == 2

    run(body)


def test_a_refused_submission_leaves_its_key_free():
    async def body(world):
        async with world.managed() as (manager, _):
            with pytest.raises(InvalidRequest):
                await manager.accept(ask(prompt=()), key())
            assert not (await manager.accept(ask(), key())).is_replay

    run(body)


def test_all_prompts_of_one_request_are_accepted_or_none():
    async def body(world):
        async with world.managed() as (manager, _):
            with pytest.raises(InvalidRequest):
                await manager.accept([ask(), ask(prompt=())])
            assert await manager.list(Query()) == []
            answer = await manager.accept([ask((1, 2)), ask((3,), samples=2)])
            prompts = [(await manager.find(r)).prompt_ids for r in answer.rollout_ids]
            assert prompts == [[1, 2], [3], [3]]
            seeds = {(await manager.find(r)).seed for r in answer.rollout_ids}
            assert len(seeds) == 3

    run(body)


def test_a_caller_that_leaves_while_it_is_accepted_leaves_no_ghost():
    async def body(world):
        async with world.managed() as (manager, _):
            asking = asyncio.create_task(manager.accept(ask(), key()))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            [rollout_id] = (await manager.accept(ask(), key())).rollout_ids
            done = await manager.wait(rollout_id)
            assert done.output_ids == alone(done)
            assert manager.num_live == 0

    run(body)


def test_streams_begin_at_any_token_and_join_without_a_seam():
    async def body(world):
        async with world.managed() as (manager, _):
            rollout_id = await accepted(manager, max_tokens=20, ignore_eos=True)
            ids, text, at = [], "", None
            async for delta in manager.stream(rollout_id):
                ids += delta.rollout.output_ids[delta.start : delta.end]
                text += delta.text
                if delta.end >= 7:
                    at = delta.end
                    break
            live = [d async for d in manager.stream(rollout_id, after=at)]
            ended = [d async for d in manager.stream(rollout_id, after=at)]
            done = await manager.find(rollout_id)
            for deltas in (live, ended):
                assert ids + done.output_ids[deltas[0].start : deltas[-1].end] == done.output_ids
                assert text + "".join(d.text for d in deltas) == done.text
            with pytest.raises(InvalidRequest) as caught:
                [d async for d in manager.stream(rollout_id, after=21)]
            assert caught.value.field == "after"

    run(body, tokenizer=small_tokenizer())


def test_wait_returns_for_more_tokens_for_the_ending_and_for_the_time():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
            assert (await manager.wait(rollout_id, timeout_s=0.01)).output_ids == []
            backend.is_held = False
            some = await manager.wait(rollout_id, after=2)
            assert len(some.output_ids) > 2
            assert (await manager.wait(rollout_id)).state is RolloutState.FINISHED
            again = await manager.wait(rollout_id, after=100, timeout_s=60)
            assert again.state is RolloutState.FINISHED

    run(body)


@pytest.mark.parametrize("calls", ["resume pause", "pause resume", "resume pause resume"])
@pytest.mark.parametrize("is_all", [False, True])
def test_pauses_and_resumes_at_once_leave_journal_and_engine_with_the_same(calls, is_all):
    async def body(world):
        async with world.managed() as (manager, _):
            rollout_id = await paused_at(manager, 3, max_tokens=60, ignore_eos=True)
            named = None if is_all else [rollout_id]
            if is_all:
                await manager.pause()
            words, count_before = calls.split(), len(manager.get(rollout_id).output_ids)
            await asyncio.gather(*(getattr(manager, word)(named) for word in words))
            was_paused = words[-1] == "pause"
            assert (rollout_id in manager._holdings.paused) == was_paused
            if was_paused:
                count = len(manager.get(rollout_id).output_ids)
                await asyncio.sleep(0.05)
                assert len(manager.get(rollout_id).output_ids) == count
            else:
                await manager.wait(rollout_id, after=count_before)
        async with world.managed() as (manager, _):
            await asyncio.sleep(0.02)
            # as it was when the process ended
            assert (rollout_id in manager._holdings.paused) == was_paused

    run(body)


def test_pause_resume_and_cancel_by_id_by_group_and_of_all():
    async def body(world):
        async with world.managed() as (manager, backend):
            group = await manager.accept(ask(samples=3, max_tokens=40))
            other = await accepted(manager, max_tokens=40)
            assert await manager.pause(group=group.group_id) == group.rollout_ids
            assert (await manager.wait(other)).state is RolloutState.FINISHED
            assert all(manager.get(r).state is RolloutState.PAUSED for r in group.rollout_ids)
            assert [s.id for s in await manager.list(Query(state=RolloutState.PAUSED))] == (
                group.rollout_ids
            )
            await manager.resume(group.rollout_ids[:1])
            assert (await manager.wait(group.rollout_ids[0])).state is RolloutState.FINISHED
            await manager.pause()
            late = await accepted(manager)
            await asyncio.sleep(0.02)
            assert manager.get(late).output_ids == []
            assert set(await manager.resume()) == {*group.rollout_ids[1:], late}
            assert (await manager.wait(late)).state is RolloutState.FINISHED
            backend.is_held = True
            last = await accepted(manager, max_tokens=50)
            await manager.cancel([last, other])
            ended = await manager.find(last)
            assert ended.state is RolloutState.ABORTED
            assert ended.output_ids == alone(ended)[: len(ended.output_ids)]
            assert world.store.read(last).state is RolloutState.ABORTED
            await manager.cancel([last])

    run(body)


def test_what_is_accepted_while_all_are_resumed_goes_on_also_at_the_next_core():
    async def body(world):
        async with world.managed() as (manager, backend):
            await manager.pause()
            rollout_id, _ = await asyncio.gather(accepted(manager, max_tokens=40), manager.resume())
            backend.die()
            done = await asyncio.wait_for(manager.wait(rollout_id), 10)
            assert done.state is RolloutState.FINISHED

    run(body)


def test_an_unknown_id_is_named_and_nothing_is_done():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
            for call in (manager.pause, manager.resume, manager.cancel, manager.acknowledge):
                with pytest.raises(UnknownRollout):
                    await call([rollout_id, "ro-nobody"])
                with pytest.raises(UnknownRollout):
                    await call(group="grp-nobody")
            with pytest.raises(UnknownRollout):
                await manager.find("ro-nobody")
            assert manager.get(rollout_id).state is RolloutState.QUEUED
            with pytest.raises(IllegalState):
                await manager.acknowledge([rollout_id])
            backend.is_held = False
            await manager.wait(rollout_id)
            with pytest.raises(IllegalState):
                await manager.resume([rollout_id])
            assert await manager.pause([rollout_id]) == []

    run(body)


def test_what_was_acknowledged_is_gone_and_may_be_acknowledged_again():
    async def body(world):
        async with world.managed() as (manager, _):
            answer = await manager.accept(ask(samples=2))
            ids = answer.rollout_ids
            for rollout_id in ids:
                await manager.wait(rollout_id)
            assert await manager.acknowledge(ids[:1]) == ids[:1]
            assert await manager.acknowledge(ids[:1]) == ids[:1]
            with pytest.raises(UnknownRollout, match="acknowledged"):
                await manager.find(ids[0])
            assert await manager.acknowledge(group=answer.group_id) == ids[1:]
            assert await manager.acknowledge() == []
            assert [s.is_acked for s in await manager.list(Query())] == [True, True]

    run(body)


def test_drop_leaves_durable_ones_alone():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
            [plain] = manager.submit(ask())
            manager.drop([rollout_id, plain.id])
            assert plain.state is RolloutState.ABORTED
            backend.is_held = False
            assert (await manager.wait(rollout_id)).state is RolloutState.FINISHED

    run(body)


def test_a_fork_keeps_its_tokens_and_with_the_same_noise_goes_the_same_way():
    async def body(world):
        async with world.managed() as (manager, _):
            sampling = {"max_tokens": 20, "prompt_logprobs": 1, "record": ("routing", "entropy")}
            parent = await manager.wait(await accepted(manager, **sampling))
            for at in (0, 1, 9, 20):
                [same] = (await manager.fork(parent.id, at)).rollout_ids
                done = await manager.wait(same)
                assert done.forked_from == (parent.id, at)
                for name in ("output_ids", "lp_sampled", "versions", "prompt_lp", "routing_ids"):
                    assert getattr(done, name) == getattr(parent, name), (at, name)
                assert done.finish_reason == parent.finish_reason
            forks = (await manager.fork(parent.id, 5, samples=3)).rollout_ids
            found = [await manager.wait(fork) for fork in forks]
            assert all(r.output_ids[:5] == parent.output_ids[:5] for r in found)
            assert len({tuple(r.output_ids) for r in found} | {tuple(parent.output_ids)}) == 4
            again = (await manager.fork(parent.id, 5, samples=3)).rollout_ids
            assert not {(await manager.find(r)).seed for r in again} & {r.seed for r in found}
            for at in (-1, 21):
                with pytest.raises(InvalidRequest) as caught:
                    await manager.fork(parent.id, at)
                assert caught.value.field == "at"

    run(body)


def test_a_keyed_fork_is_replayed_after_its_parent_is_gone():
    async def body(world):
        async with world.managed() as (manager, _):
            parent = await manager.wait(await accepted(manager))
            first = await manager.fork(parent.id, 3, key=key())
            await manager.acknowledge([parent.id])
            again = await manager.fork(parent.id, 3, key=key())
            assert again.is_replay
            assert again.rollout_ids == first.rollout_ids
            with pytest.raises(UnknownRollout):
                await manager.fork(parent.id, 3)

    run(body)


def test_an_export_goes_on_elsewhere_to_the_bit_and_the_source_stays():
    async def body(world):
        other = World(tokenizer=world.tokenizer)
        async with world.managed() as (here, _), other.managed() as (there, _):
            rollout_id = await paused_at(here, 4, max_tokens=20, ignore_eos=True)
            exported = await here.export(rollout_id)
            with pytest.raises(Conflict):
                await here.import_(exported)
            await there.import_(exported)
            assert there.get(rollout_id).text == here.get(rollout_id).text
            await asyncio.sleep(0.01)
            assert there.get(rollout_id).state is RolloutState.PAUSED
            await there.resume([rollout_id])
            await here.resume([rollout_id])
            a, b = await here.wait(rollout_id), await there.wait(rollout_id)
            assert (a.output_ids, a.lp_sampled, a.text) == (b.output_ids, b.lp_sampled, b.text)
            ended = await here.export(rollout_id)
            await here.acknowledge([rollout_id])
            with pytest.raises(Conflict):
                await here.import_(ended)
            with pytest.raises(Conflict):
                await there.import_(ended)

    run(body, tokenizer=small_tokenizer())


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"vocab_size": 299}, Conflict, "vocab_size"),
        ({"tokenizer": "0" * 32}, Conflict, "tokenizer"),
        ({"output_ids": b"\xff\xff\0\0"}, InvalidRequest, "output_ids"),
        ({"prompt_ids": b"\xff\xff\0\0"}, InvalidRequest, "prompt"),
        ({"max_tokens": 1000}, InvalidRequest, "max_tokens"),
        ({"routing_ids": b"abc"}, Conflict, "routing_ids"),
        ({"text": "!", "text_offset": 1}, InvalidTrajectory, "text"),
        ({"lp_sampled": b""}, InvalidTrajectory, "lp_sampled"),
    ],
)
def test_an_import_from_another_model_names_the_field_and_changes_nothing(change, error, field):
    async def body(world):
        other = World(tokenizer=world.tokenizer)
        async with world.managed() as (here, _), other.managed() as (there, _):
            rollout_id = await accepted(here, max_tokens=1)
            await here.wait(rollout_id)
            exported = await here.export(rollout_id)
            for name, value in change.items():
                setattr(exported, name, value)
            with pytest.raises(error) as caught:
                await there.import_(exported)
            assert getattr(caught.value, "field", field) == field
            assert field in str(caught.value)
            assert await there.list(Query()) == []

    run(body, tokenizer=small_tokenizer())


def test_an_import_of_other_weights_needs_a_word():
    async def body(world):
        other = World()
        async with world.managed() as (here, _), other.managed() as (there, _):
            there._core._last_info.digest = "v2"
            rollout_id = await paused_at(here, 4, max_tokens=20)
            exported = await here.export(rollout_id)
            with pytest.raises(Conflict, match="allow_other_weights"):
                await there.import_(exported)
            await there.import_(exported, allow_other_weights=True)

    run(body)


def test_a_full_disk_holds_durable_rollouts_and_nobody_else():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.steps_left = 4
            rollout_id = await accepted(manager, max_tokens=40)
            await manager.wait(rollout_id, after=3)
            world.store.fault = JournalFull("no space left")
            backend.steps_left = None
            while manager.journal_trouble is None:
                await asyncio.sleep(0.001)
            with pytest.raises(JournalFull, match="no space left"):
                await manager.accept(ask())
            count = len(manager.get(rollout_id).output_ids)
            [plain] = manager.submit(ask())
            assert (await manager.wait(plain.id)).state is RolloutState.FINISHED
            assert len(manager.get(rollout_id).output_ids) == count
            manager._core._backend.die()
            world.store.fault = None
            done = await manager.wait(rollout_id)
            assert done.output_ids == alone(done)
            assert manager.journal_trouble is None
            assert (await manager.wait(await accepted(manager))).state is RolloutState.FINISHED

    run(body)


VERBS = ("pause", "resume", "cancel", "acknowledge")


def test_over_a_full_disk_nobody_waits_to_be_told_that_nothing_is_done():
    async def body(world):
        async with world.managed() as (manager, backend):
            ended = await accepted(manager)
            await manager.wait(ended)
            live = await paused_at(manager, 4, max_tokens=40)
            backend.steps_left = 4
            await manager.wait(await accepted(manager, max_tokens=40), after=3)
            world.store.fault = JournalFull("no space left")
            backend.steps_left = None
            while manager.journal_trouble is None:
                await asyncio.sleep(0.001)
            for verb in VERBS:
                name = ended if verb == "acknowledge" else live
                steering = manager.unless_stalled(getattr(manager, verb)([name]))
                with pytest.raises(JournalFull, match="no space left"):
                    await asyncio.wait_for(steering, 10)
            assert (await manager.find(live)).state is RolloutState.PAUSED
            assert live in manager._holdings.paused
            world.store.fault = None
            while manager.journal_trouble is not None:
                await asyncio.sleep(0.001)
            assert await manager.unless_stalled(manager.resume([live])) == [live]
            assert await manager.unless_stalled(manager.acknowledge([ended])) == [ended]

    run(body)


@pytest.mark.parametrize("verb", ["cancel", "acknowledge"])
def test_inside_the_process_a_full_disk_is_waited_for(verb):
    """A batch does; HTTP does not (`unless_stalled`)."""

    async def body(world):
        async with world.managed() as (manager, _):
            ended = await accepted(manager)
            await manager.wait(ended)
            live = await paused_at(manager, 4, max_tokens=40)
            world.store.fault = JournalFull("no space left")
            first = asyncio.ensure_future(manager.resume([live]))
            while manager.journal_trouble is None:
                await asyncio.sleep(0.001)
            name = ended if verb == "acknowledge" else live
            steering = asyncio.ensure_future(getattr(manager, verb)([name]))
            await asyncio.wait([steering], timeout=0.05)
            assert not steering.done()
            world.store.fault = None
            assert await asyncio.wait_for(steering, 10) == [name]
            await asyncio.wait_for(first, 10)

    run(body)


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fills_while_somebody_steers_does_it_later(verb):
    async def body(world):
        async with world.managed() as (manager, backend):
            ended = await accepted(manager)
            await manager.wait(ended)
            # nothing else may be the first to meet the full disk
            live = await paused_at(manager, 4, max_tokens=40)
            if verb == "pause":
                backend.steps_left = 0
                await manager.resume([live])
            name = ended if verb == "acknowledge" else live
            world.store.fault = JournalFull("no space left")
            with pytest.raises(JournalFull, match="no space left"):
                await asyncio.wait_for(manager.unless_stalled(getattr(manager, verb)([name])), 10)
            world.store.fault = None
            await asyncio.wait_for(manager._keeper.flush(), 10)
            kept = world.store.summary(name)
            if verb == "acknowledge":
                assert kept.is_acked
            elif verb == "cancel":
                assert kept.state is RolloutState.ABORTED
            else:
                assert (kept.state is RolloutState.PAUSED) == (verb == "pause")
            if verb == "resume":
                backend.steps_left = None
                assert (await asyncio.wait_for(manager.wait(live), 10)).state.is_ended

    run(body)


def test_a_journal_that_failed_stops_durable_rollouts_and_says_so():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.steps_left = 4
            rollout_id = await accepted(manager, max_tokens=50)
            await manager.wait(rollout_id, after=3)
            reading = asyncio.create_task(manager.wait(rollout_id))
            await asyncio.sleep(0)
            world.store.fault = JournalError("the disk is gone")
            backend.steps_left = None
            with pytest.raises(JournalError, match="disk is gone"):
                await reading
            assert "disk is gone" in manager.journal_trouble
            with pytest.raises(JournalError, match="disk is gone"):
                await manager.accept(ask())
            [plain] = manager.submit(ask())
            assert (await manager.wait(plain.id)).state is RolloutState.FINISHED
            kept = world.store.read(rollout_id)
            assert manager.get(rollout_id).output_ids == kept.output_ids

    run(body)


def test_restarts_given_up_leave_durable_rollouts_in_the_journal():
    async def body(world):
        async with world.managed(restarts=RestartConfig(attempts=1)) as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
            [plain] = manager.submit(ask())
            backend.start_failures = 9
            backend.die("out of luck")
            with pytest.raises(EngineDied, match="no core today"):
                await manager.wait(rollout_id)
            assert plain.state is RolloutState.FAILED
        async with world.managed() as (manager, _):
            done = await manager.wait(rollout_id)
            assert done.output_ids == alone(done)

    run(body)


def test_durable_submissions_are_taken_while_a_core_is_started_again():
    async def body(world):
        async with world.managed(restarts=RestartConfig(first_delay_s=0.05)) as (manager, backend):
            backend.die()
            await asyncio.sleep(0.02)
            rollout_id = await accepted(manager)
            done = await manager.wait(rollout_id)
            assert done.output_ids == alone(done)
            assert backend.starts == 2

    run(body)


def test_until_the_journal_is_read_nothing_durable_is_answered():
    """A reader would wait for news of a copy; a known key would make its rollouts again."""

    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            first = await manager.accept(ask(), key())
        [rollout_id] = first.rollout_ids
        may_read = threading.Event()
        recover = world.store.recover

        def slowly():
            assert may_read.wait(30)
            return recover()

        world.store.recover = slowly
        manager = RolloutManager(InlineBackend(), None, journal=JournalThread(world.store))
        starting = asyncio.create_task(manager.start())
        await asyncio.sleep(0.02)
        with pytest.raises(EngineUnavailable, match="loading"):
            _ = manager.info  # the journal says with which weights a core is to be started
        calls = [
            lambda: manager.accept(ask(), key()),
            lambda: manager.find(rollout_id),
            lambda: manager.wait(rollout_id),
            lambda: anext(aiter(manager.stream(rollout_id))),
            lambda: manager.list(Query()),
            lambda: manager.pause([rollout_id]),
            lambda: manager.cancel(),
            lambda: manager.acknowledge(),
        ]
        for call in calls:
            with pytest.raises(EngineUnavailable, match="not read yet"):
                await call()
        may_read.set()
        await starting
        assert (await manager.accept(ask(), key())).rollout_ids == [rollout_id]
        assert len((await manager.wait(rollout_id)).output_ids) == 8
        await manager.close()

    run(body)


def test_close_ends_readers_of_durable_rollouts_and_not_the_rollouts():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
            reading = asyncio.create_task(manager.wait(rollout_id))
            await asyncio.sleep(0.01)
            manager.drain()
            with pytest.raises(Draining, match="goes on when"):
                await reading
            await manager.close()
            with pytest.raises(Draining):
                await manager.accept(ask())
        assert world.store.read(rollout_id).state is RolloutState.QUEUED

    run(body)


def test_what_was_journaled_whole_ends_at_the_start_without_the_core():
    async def body(world):
        async with world.managed() as (manager, _):
            parent = await manager.wait(await accepted(manager, seed=3, ignore_eos=True))
        text = parent.text
        for number, (count, sampling) in enumerate(
            [
                (8, {}),
                (4, {"stop_token_ids": (parent.output_ids[3],)}),
                (8, {"stop": (text[-2:],)}),
            ]
        ):
            rollout = world.store.read(parent.id)
            params = SamplingParams(ignore_eos=True, **({"max_tokens": 8} | sampling))
            for name in ("output_ids", "lp_sampled", "lp_temp", "kept_mass", "flags", "versions"):
                setattr(rollout, name, getattr(rollout, name)[:count])
            rollout.id, rollout.sampling = f"ro-{number}", params
            rollout.state, rollout.finish_reason, rollout.ended_s = RolloutState.QUEUED, None, None
            world.store.commit([Accept([rollout])])
            async with world.managed() as (manager, backend):
                backend.is_held = True
                done = await manager.wait(rollout.id)
                assert done.state is RolloutState.FINISHED
                assert done.output_ids == parent.output_ids[:count]
                assert not backend.sent
                expected = "length" if number == 0 else "stop"
                assert done.finish_reason.type == expected

    run(body, tokenizer=small_tokenizer())


def test_a_rollout_that_this_model_cannot_run_fails_and_the_others_go_on():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            good = await accepted(manager)
            bad = world.store.read(good)
            bad.id, bad.max_tokens = "ro-long", 5000
            world.store.commit([Accept([bad])])
        async with world.managed() as (manager, _):
            ended = await manager.wait("ro-long")
            assert ended.state is RolloutState.FAILED
            assert "cannot go on with this model" in ended.finish_reason.detail
            assert (await manager.wait(good)).state is RolloutState.FINISHED

    run(body)


def test_the_journal_of_other_weights_is_not_gone_on_with_unless_told_to():
    async def body(world):
        async with world.managed() as (manager, backend):
            backend.is_held = True
            rollout_id = await accepted(manager)
        before = world.store.recover()
        world.store.commit([Flip(3, "another")])
        with pytest.raises(Exception, match=r"another.*--journal"):
            async with world.managed():
                pass
        assert world.store.recover().live == before.live
        async with world.managed(allow_other_weights=True) as (manager, _):
            done = await manager.wait(rollout_id)
            assert done.output_ids == alone(done)

    run(body)


def test_without_a_journal_durable_calls_say_how_to_get_one():
    async def body(_):
        manager = RolloutManager(InlineBackend(), None)
        await manager.start()
        with pytest.raises(JournalError, match="--journal"):
            await manager.accept(ask())
        with pytest.raises(UnknownRollout):
            await manager.find("ro-x")
        await manager.close()

    run(body)


def test_a_silent_stop_token_takes_no_held_text_with_it():
    """Held back are the beginning of a stop string and half a character: only the half goes."""

    async def body(world):
        tokenizer = world.tokenizer
        half, rest = (tokenizer.token_id(char) for char in ("Ã", "©"))
        [a, b] = tokenizer.encode("ab")
        prompts = {(a, b, half, rest): "ab", (b, a, half, rest): "ba"}
        for ids, text in prompts.items():
            rollout = await seeded(world, list(ids), stop=(text + "x",), stop_token_ids=(rest,))
            assert rollout.output_ids == list(ids)
            assert rollout.text == text

    run(body, tokenizer=small_tokenizer())


async def seeded(world, ids, **sampling):
    """What becomes of a rollout that draws these tokens."""
    growth = Growth(
        Rollout(
            id="r",
            group_id="g",
            prompt_ids=[1],
            sampling=SamplingParams(**sampling),
            seed=0,
            max_tokens=9,
        ),
        world.tokenizer,
    )
    info = await InlineBackend().start()
    for start, token in enumerate(ids):
        finish = FinishReason("stop", token) if token in sampling["stop_token_ids"] else None
        tokens = RolloutTokens(
            rollout_id="r",
            start=start,
            ids=[token],
            lp_sampled=[0.0],
            lp_temp=[0.0],
            kept_mass=[1.0],
            flags=[1],
            finish=finish,
        )
        news = growth.prepare(tokens, Origin(1, "v1", "fake", "core-1"), info)
        growth.apply()
    growth.end(growth.conclude(RolloutState.FINISHED, news.finish))
    return growth.rollout
