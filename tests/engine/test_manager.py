"""RolloutManager over a real core and scheduler with a fake runner."""

import asyncio
import contextlib

import pytest

from everstep.engine.config import RestartConfig
from everstep.engine.errors import (
    ContextTooLong,
    Draining,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    UnknownRollout,
)
from everstep.engine.manager.intake import Submission, digest_of
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import StateChanged
from everstep.engine.rollout import RolloutState, SamplingParams
from tests.engine.inline_backend import InlineBackend
from tests.engine.small_tokenizer import small_tokenizer
from tests.fakes import generate_alone


@contextlib.asynccontextmanager
async def managed(tokenizer=None, **options):
    backend = InlineBackend(**{k: options.pop(k) for k in ("start_failures",) if k in options})
    manager = RolloutManager(backend, tokenizer, **options)
    await manager.start()
    try:
        yield manager, backend
    finally:
        await manager.close()


def run(coroutine):
    return asyncio.run(coroutine)


def expected_of(rollout):
    return generate_alone(
        rollout.prompt_ids, seed=rollout.seed, max_tokens=rollout.max_tokens, vocab_size=300
    )


def ask(prompt=(1, 2, 3), **sampling):
    return Submission(prompt_ids=list(prompt), sampling=SamplingParams(max_tokens=8, **sampling))


def test_a_rollout_holds_aligned_lists_and_ends_once():
    async def body():
        async with managed() as (manager, _):
            [rollout] = manager.submit(ask())
            done = await manager.wait(rollout.id)
            assert done.output_ids == expected_of(done)
            lists = (done.lp_sampled, done.lp_temp, done.kept_mass, done.flags, done.versions)
            assert {len(x) for x in lists} == {8}
            assert done.state is RolloutState.FINISHED
            assert done.finish_reason.type == "length"
            assert [s.start for s in done.segments] == [0]
            assert done.versions == [1] * 8

    run(body())


def test_samples_of_a_group_and_repeated_prompts_never_share_a_seed():
    async def body():
        async with managed() as (manager, _):
            rollouts = []
            for seed in (None, None, 5):
                ask_for = Submission(
                    prompt_ids=[1, 2], samples=4, sampling=SamplingParams(max_tokens=2, seed=seed)
                )
                rollouts += manager.submit(ask_for)
            assert len({r.seed for r in rollouts}) == 12
            [single] = manager.submit(ask(seed=5))
            assert single.seed == 5

    run(body())


def test_every_reader_of_a_stream_sees_every_token_once():
    async def body():
        tokenizer = small_tokenizer()
        async with managed(tokenizer) as (manager, _):
            [rollout] = manager.submit(ask(ignore_eos=True))

            async def read():
                ids, text = [], ""
                async for delta in manager.stream(rollout.id):
                    ids += delta.rollout.output_ids[delta.start : delta.end]
                    text += delta.text
                return ids, text

            first, second = await asyncio.gather(read(), read())
            late = await read()
            assert first == second == late
            assert first == (rollout.output_ids, rollout.text)
            assert rollout.text == tokenizer.decode(rollout.output_ids)[: rollout.text_offset]

    run(body())


def test_a_stop_string_ends_the_rollout_at_the_token_that_completes_it():
    async def body():
        tokenizer = small_tokenizer()
        async with managed(tokenizer) as (manager, backend):
            [plain] = manager.submit(ask(seed=3, ignore_eos=True))
            whole = await manager.wait(plain.id)
            stop = next(c for c in whole.text[1:] if c != "\ufffd")
            [cut] = manager.submit(ask(seed=3, ignore_eos=True, stop=(stop,)))
            done = await manager.wait(cut.id)
            assert done.finish_reason.type == "stop"
            assert done.finish_reason.matched == stop
            assert done.text == whole.text[: whole.text.index(stop)]
            assert done.output_ids == whole.output_ids[: len(done.output_ids)]
            shorter = tokenizer.decode(done.output_ids[:-1])
            assert stop in tokenizer.decode(done.output_ids)
            assert stop not in shorter
            assert len(done.output_ids) == len(done.lp_sampled)
            await asyncio.sleep(0.02)
            assert backend.core.scheduler.stats().num_running == 0

    run(body())


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_tokens_text_is_shown_only_on_request(include):
    async def body():
        tokenizer = small_tokenizer()
        async with managed(tokenizer) as (manager, _):
            for seed in range(12):
                [plain] = manager.submit(ask(seed=seed))
                whole = await manager.wait(plain.id)
                stop = whole.output_ids[4]
                asked = ask(seed=seed, stop_token_ids=(stop,), include_stop_str_in_output=include)
                [cut] = manager.submit(asked)
                done = await manager.wait(cut.id)
                at = whole.output_ids.index(stop)
                assert done.output_ids == whole.output_ids[: at + 1]
                assert done.finish_reason.matched == stop
                text = tokenizer.decode(done.output_ids)
                assert text[: done.text_offset] == done.text
                if include:
                    assert done.text == text
                else:
                    assert tokenizer.decode(done.output_ids[:-1]).startswith(done.text)
                    assert len(done.text) < len(text)

    run(body())


def test_a_slow_reader_of_a_stream_misses_nothing():
    async def body():
        async with managed(small_tokenizer()) as (manager, _):
            [rollout] = manager.submit(ask())
            text = ""
            async for delta in manager.stream(rollout.id):
                await asyncio.sleep(0.004)
                text += delta.text
            assert text == rollout.text

    run(body())


def test_cancel_frees_at_once_and_an_ended_rollout_is_left_alone():
    async def body():
        async with managed() as (manager, backend):
            backend.is_held = True
            [a] = manager.submit(ask())
            [b] = manager.submit(ask())
            await manager.cancel([a.id])
            assert a.state is RolloutState.ABORTED
            assert a.finish_reason.type == "abort"
            backend.is_held = False
            done = await manager.wait(b.id)
            await manager.cancel([b.id])
            assert done.state is RolloutState.FINISHED
            assert manager.num_live == 0

    run(body())


def test_a_paused_rollout_stands_still_and_goes_on_exactly():
    async def body():
        async with managed() as (manager, _):
            [rollout] = manager.submit(ask())
            await manager.pause([rollout.id])
            await asyncio.sleep(0.02)
            before = list(rollout.output_ids)
            assert rollout.state is RolloutState.PAUSED
            await asyncio.sleep(0.02)
            assert rollout.output_ids == before
            await manager.resume([rollout.id])
            done = await manager.wait(rollout.id)
            assert done.output_ids == expected_of(done)

    run(body())


def test_pause_of_all_holds_what_comes_later_too():
    async def body():
        async with managed() as (manager, _):
            await manager.pause()
            [rollout] = manager.submit(ask())
            await asyncio.sleep(0.02)
            assert rollout.output_ids == []
            await manager.resume()
            assert (await manager.wait(rollout.id)).output_ids == expected_of(rollout)

    run(body())


def test_a_core_that_dies_costs_time_and_no_token():
    async def body():
        async with managed() as (manager, backend):
            rollouts = [manager.submit(ask(prompt=(i, i + 1)))[0] for i in range(6)]
            while not rollouts[0].output_ids:
                await asyncio.sleep(0)
            backend.die()
            done = [await manager.wait(r.id) for r in rollouts]
            assert backend.starts == 2
            assert all(r.output_ids == expected_of(r) for r in done)
            assert all(r.state is RolloutState.FINISHED for r in done)
            assert manager.is_healthy

    run(body())


def test_a_paused_rollout_stays_paused_over_the_death_of_its_core():
    async def body():
        async with managed() as (manager, backend):
            [rollout] = manager.submit(ask())
            await manager.pause([rollout.id])
            await asyncio.sleep(0.01)
            count = len(rollout.output_ids)
            backend.die()
            await asyncio.sleep(0.3)
            assert len(rollout.output_ids) == count
            await manager.resume([rollout.id])
            assert (await manager.wait(rollout.id)).output_ids == expected_of(rollout)

    run(body())


def test_a_core_that_cannot_come_back_fails_its_rollouts_with_the_reason():
    async def body():
        async with managed(restarts=RestartConfig(attempts=2)) as (manager, backend):
            backend.is_held = True
            [rollout] = manager.submit(ask())
            backend.start_failures = 99
            backend.die("out of luck")
            done = await manager.wait(rollout.id)
            assert done.state is RolloutState.FAILED
            assert done.finish_reason.type == "error"
            assert not manager.is_healthy
            with pytest.raises(EngineUnavailable, match="died"):
                manager.submit(ask())

    run(body())


@pytest.mark.parametrize(
    ("submission", "error", "field"),
    [
        (Submission(prompt_ids=[]), InvalidRequest, "prompt"),
        (Submission(prompt_ids=[300]), InvalidRequest, "prompt"),
        (Submission(prompt_ids=[-1]), InvalidRequest, "prompt"),
        (Submission(prompt_ids=[1] * 64), ContextTooLong, "prompt"),
        (ask(prompt=[1] * 60), ContextTooLong, "max_tokens"),
        (Submission(prompt_ids=[1], samples=0), InvalidRequest, "n"),
        (ask(stop=("x",)), InvalidRequest, "stop"),
        (ask(stop_token_ids=(300,)), InvalidRequest, "stop_token_ids"),
        (ask(temperature=1e-9), InvalidRequest, "temperature"),
        (ask(min_tokens=9), InvalidRequest, "min_tokens"),
    ],
)
def test_a_bad_submission_names_its_field_and_disturbs_nothing(submission, error, field):
    async def body():
        async with managed() as (manager, _):
            [good] = manager.submit(ask())
            with pytest.raises(error) as caught:
                manager.submit(submission)
            assert caught.value.field == field
            assert (await manager.wait(good.id)).output_ids == expected_of(good)
            assert manager.num_live == 0

    run(body())


def test_what_was_submitted_has_one_digest():
    def said(**sampling: object) -> list[Submission]:
        return [Submission(prompt_ids=[1], sampling=SamplingParams(**sampling))]

    biases = [{}, {7: 1.0}, {7: 2.0}, {8: 1.0}, {7: 1.0, 8: 1.0}]
    found = {digest_of(said(logit_bias=bias)) for bias in biases}
    assert len(found) == len(biases)
    assert digest_of(said(logit_bias={8: 1.0, 7: 1.0})) in found
    assert digest_of(said(seed=1)) != digest_of(said(seed=2))
    assert digest_of(said(logit_bias={7: 1.0})[0]) not in found


def test_a_full_house_says_when_to_come_again():
    async def body():
        async with managed(max_live=2) as (manager, backend):
            backend.is_held = True
            manager.submit(ask())
            manager.submit(ask())
            with pytest.raises(Overloaded) as caught:
                manager.submit(ask())
            assert caught.value.retry_after_s > 0

    run(body())


def test_close_ends_what_is_live_and_takes_nothing_more():
    async def body():
        async with managed() as (manager, backend):
            backend.is_held = True
            [rollout] = manager.submit(ask())
            await manager.close()
            assert rollout.state is RolloutState.ABORTED
            with pytest.raises(Draining):
                manager.submit(ask())

    run(body())


def test_a_fault_of_the_managers_own_ends_everybody_who_waits():
    async def body():
        async with managed() as (manager, backend):
            backend.is_held = True
            rollouts = manager.submit(ask()) + manager.submit(ask())
            waiting = [asyncio.create_task(manager.wait(r.id)) for r in rollouts]

            async def receive():
                return [StateChanged([(rollouts[0].id, "preempted")])]  # it never ran

            backend.receive = receive
            manager._core._task.cancel()
            await asyncio.sleep(0)
            manager._core._task = asyncio.create_task(manager._core._collect())
            for rollout in await asyncio.wait_for(asyncio.gather(*waiting), 5):
                assert rollout.state is RolloutState.FAILED
                assert "may not become preempted" in rollout.finish_reason.detail
            assert not manager.is_healthy
            with pytest.raises(EngineUnavailable, match="may not become"):
                manager.submit(ask())

    run(body())


def test_drop_cancels_what_runs_and_forgets_it():
    async def body():
        async with managed() as (manager, backend):
            backend.is_held = True
            [rollout] = manager.submit(ask())
            assert manager.get(rollout.id) is rollout
            manager.drop([rollout.id])
            assert rollout.state is RolloutState.ABORTED
            with pytest.raises(UnknownRollout):
                manager.get(rollout.id)

    run(body())


def test_prompt_logprobs_and_routing_align_with_positions_also_after_a_new_core():
    async def body():
        async with managed() as (manager, backend):
            submission = ask(prompt=range(1, 31), prompt_logprobs=2, record=("routing",))
            [rollout] = manager.submit(submission)
            while len(rollout.output_ids) < 3:
                await asyncio.sleep(0)
            backend.die()
            done = await manager.wait(rollout.id)
            assert len(done.prompt_lp) == 30
            assert done.prompt_lp[0] is None
            assert all(isinstance(lp, float) for lp in done.prompt_lp[1:])
            # every position but the last sampled token was computed: 30 + 8 - 1 rows of 2 bytes
            assert len(done.routing_ids) == 37 * 2
            assert len(done.routing_weights) == 37 * 8

    run(body())


def test_min_tokens_with_nothing_left_to_draw_is_refused():
    async def body():
        async with managed() as (manager, _):
            everything = tuple(range(300))
            with pytest.raises(InvalidRequest) as caught:
                manager.submit(ask(min_tokens=2, stop_token_ids=everything))
            assert caught.value.field == "stop_token_ids"
            [fine] = manager.submit(ask(stop_token_ids=everything))
            assert len((await manager.wait(fine.id)).output_ids) == 1

    run(body())
