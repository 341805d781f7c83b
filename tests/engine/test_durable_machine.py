"""Exactness of durable rollouts over random histories: pauses, evictions, moves, forks, kills.

Whatever happened to a rollout, it ends with the tokens, logprobs, records and text that it has when
it runs alone. Before it ends, everybody sees a beginning of that, and nothing that the journal of
its front does not hold.
"""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from everstep import kernels
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.config import BatchConfig, ModelConfig, ResolvedKV
from everstep.engine.core.core import Core
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.errors import Conflict, IllegalState, JournalFull, UnknownRollout
from everstep.engine.journal.ops import BudgetState, RequestKey
from everstep.engine.manager.intake import Submission
from everstep.engine.messages import Add, Ready
from everstep.engine.model.runner import ModelRunner
from everstep.engine.model.weights import Weights
from everstep.engine.proofs.determinism import Laboratory, Outcome
from everstep.engine.rollout import Rollout, RolloutState, SamplingParams
from everstep.engine.tokenizer import Tokenizer
from tests.engine.durable_world import (
    STOPS,
    VOCAB,
    MakeCore,
    World,
    alone,
    fake_core,
    half_tokenizer,
)
from tests.engine.test_exactness_machine import weights_of
from tests.fakes import fake_logprob, fake_routing
from tests.levels import REAL
from tests.strategies import MAX_MODEL_LEN, batches, caches

POOL = "math"
# most happens at one of the two, so that histories there are long
sides = st.sampled_from([0, 0, 0, 1])
prompts = st.builds(
    lambda length, tail: [0, 1, 2, 0, 1, 2, 3][:length] + tail,
    st.integers(1, 7),
    st.lists(st.integers(0, VOCAB - 2), max_size=2),
)
samplings = st.builds(
    SamplingParams,
    stop=st.lists(st.sampled_from(STOPS), max_size=2, unique=True).map(tuple),
    stop_token_ids=st.sampled_from([(), (), (5,), (9,)]),
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 2]),
    temperature=st.sampled_from([1.0, 0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.sampled_from([None, None, None, 1, 2]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    record=st.sampled_from([(), ("lp_raw", "entropy"), ("routing", "kept_ids")]),
)


class DurableMachine(RuleBasedStateMachine):
    """Two servers that exchange rollouts; each may lose its core, or die whole, at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[World] = []
        # (world, id) → tokens that somebody has seen
        self.seen: dict[tuple[int, str], list[int]] = {}
        self.cancelled: set[str] = set()
        self.acked: set[tuple[int, str]] = set()
        self.promised: set[tuple[int, str]] = set()
        self.keys: dict[tuple[int, str], list[str]] = {}
        self.num_plain = 0
        # (world, budget) → tokens used of it that somebody has seen
        self.seen_used: dict[tuple[int, str], int] = {}

    @initialize(kv=caches(), batch=batches)
    def start(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self.loop = asyncio.new_event_loop()
        self.open_worlds(partial(fake_core, kv, batch), half_tokenizer())

    def open_worlds(self, make_core: MakeCore, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.worlds = [World(self.loop, make_core, tokenizer, seed) for seed in range(2)]

    # --- choosing

    def world(self, which: int) -> World:
        return self.worlds[which]

    def ids(self, which: int, share: float, count: int = 2) -> list[str]:
        """Some of those that a world has accepted and not been told to forget."""
        ids = [i for i in self.worlds[which].store.accepted if (which, i) not in self.acked]
        return ids[int(share * len(ids)) :][:count]

    def is_stalled(self, which: int) -> bool:
        return self.worlds[which].journal.stalled is not None

    # --- what a client does

    @rule(
        which=sides,
        prompt=prompts,
        sampling=samplings,
        max_tokens=st.integers(1, MAX_MODEL_LEN - 9),
        samples=st.integers(1, 3),
        priority=st.integers(0, 1),
        name=st.sampled_from(["", "k1"]),
        pool=st.sampled_from(["", POOL]),
        is_hasty=st.sampled_from([False, False, True]),
    )
    def accept(
        self, which, prompt, sampling, max_tokens, samples, priority, name, pool, is_hasty
    ) -> None:
        """is_hasty: the client does not wait for the answer, which may never come."""
        self.ask(which, prompt, sampling, max_tokens, samples, priority, name, is_hasty, pool)

    @precondition(lambda self: not self.is_stalled(0))
    @rule(prompt=prompts, sampling=samplings, is_keyed=st.booleans(), num_untold=st.integers(0, 3))
    def accept_after_a_kill(self, prompt, sampling, is_keyed, num_untold) -> None:
        """The front dies while it is asked, or before; the client asks again."""
        name = "k1" if is_keyed else ""
        self.ask(0, prompt, sampling, 9, 2, 0, name, True)
        self.world(0).kill_front(num_untold)
        self.ask(0, prompt, sampling, 9, 2, 0, name, False)

    def ask(
        self, which, prompt, sampling, max_tokens, samples, priority, name, is_hasty, pool=""
    ) -> None:
        params = SamplingParams(
            **{f: getattr(sampling, f) for f in sampling.__struct_fields__}
            | {"max_tokens": max(max_tokens, sampling.min_tokens)}
        )
        ask = Submission(
            prompt_ids=prompt, sampling=params, samples=samples, priority=priority, pool=pool
        )
        key = RequestKey(holder="", route="/", key=name, body_digest="b") if name else None
        manager = self.world(which).manager
        if is_hasty:
            self.world(which).begin(manager.accept(ask, key))
            return
        try:
            answer = self.world(which).do(manager.accept(ask, key))
        except JournalFull:
            assert self.is_stalled(which)
            return
        known = self.keys.get((which, name))
        if known is not None:
            assert answer.is_replay
            assert answer.rollout_ids == known
            return
        if name:
            self.keys[which, name] = answer.rollout_ids
        self.promised |= {(which, rollout_id) for rollout_id in answer.rollout_ids}

    @rule(which=sides, prompt=prompts, sampling=samplings)
    def submit_plain(self, which, prompt, sampling) -> None:
        self.num_plain += 1
        ask = Submission(prompt_ids=prompt, sampling=sampling)
        self.world(which).manager.submit(ask)
        self.world(which).settle()

    @rule(which=sides, count=st.integers(1, 6), pumps=st.integers(0, 4))
    def step(self, which, count, pumps) -> None:
        self.world(which).step(count)
        self.world(which).journal.pump(pumps)
        self.world(which).settle()

    @rule(which=sides, count=st.integers(1, 4), is_heard=st.booleans())
    def run_ahead(self, which, count, is_heard) -> None:
        """The core makes steps of which the front hears after what it does next, or at once."""
        self.world(which).run_ahead(count)
        if is_heard:
            self.world(which).backend.hear()
        self.world(which).settle()

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(which=sides, share=st.floats(0, 1), what=st.sampled_from(["pause", "resume"]))
    def pause_or_resume(self, which, share, what) -> None:
        ids = self.ids(which, share)
        manager = self.world(which).manager
        if ids:
            try:
                self.world(which).do(getattr(manager, what)(ids))
            except IllegalState:
                states = [self.find(which, rollout_id).state for rollout_id in ids]
                assert what == "resume"
                assert any(state.is_ended for state in states)

    @precondition(lambda self: not self.is_stalled(0))
    @rule(is_resumed=st.booleans())
    def pause_all(self, is_resumed) -> None:
        world = self.world(0)
        world.do(world.manager.pause())
        world.step(2)
        if is_resumed:
            world.do(world.manager.resume())

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(which=sides, share=st.floats(0, 1))
    def cancel(self, which, share) -> None:
        ids = self.ids(which, share, 1)
        if ids:
            if not self.find(which, ids[0]).state.is_ended:
                self.cancelled.update(ids)
            self.world(which).do(self.world(which).manager.cancel(ids))
            assert self.find(which, ids[0]).state.is_ended

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(which=sides, share=st.floats(0, 1))
    def acknowledge(self, which, share) -> None:
        for rollout_id in self.ids(which, share):
            world = self.world(which)
            if self.find(which, rollout_id).state.is_ended:
                self.check_ended(self.find(which, rollout_id))
                world.do(world.manager.acknowledge([rollout_id]))
                self.acked.add((which, rollout_id))
                with pytest.raises(UnknownRollout):
                    world.do(world.manager.find(rollout_id))

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(
        which=sides,
        share=st.floats(0, 1),
        at=st.floats(0, 1),
        samples=st.integers(1, 2),
    )
    def fork(self, which, share, at, samples) -> None:
        for parent_id in self.ids(which, share, 1):
            world = self.world(which)
            parent = self.find(which, parent_id)
            num = round(at * len(parent.output_ids))
            fork = world.manager.fork(parent_id, num, samples=samples, pool=parent.pool)
            answer = world.do(fork)
            self.promised |= {(which, rollout_id) for rollout_id in answer.rollout_ids}

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(which=sides, share=st.floats(0, 1))
    def move(self, which, share) -> None:
        """A copy goes on at the other one; the source stays."""
        here, there = self.world(which), self.world(1 - which)
        for rollout_id in self.ids(which, share, 1):
            if rollout_id not in there.store.accepted:
                trajectory = here.do(here.manager.export(rollout_id))
                there.do(there.manager.import_(trajectory))
                self.promised.add((1 - which, rollout_id))

    @rule(which=sides, share=st.floats(0, 1), after=st.floats(0, 1))
    def read_on(self, which, share, after) -> None:
        """A stream that begins somewhere gives what an uninterrupted one gave from there."""
        for rollout_id in self.ids(which, share, 1):
            rollout = self.find(which, rollout_id)
            start = round(after * len(rollout.output_ids))

            if start < len(rollout.output_ids) or rollout.state.is_ended:
                delta = self.world(which).do(self.first_delta(which, rollout_id, start))
                assert delta is not None
                assert (delta.start, delta.end) == (start, len(delta.rollout.output_ids))
                assert delta.rollout.text.endswith(delta.text)

    async def first_delta(self, which: int, rollout_id: str, start: int) -> Any:
        stream = self.world(which).manager.stream(rollout_id, after=start)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    @rule(
        which=sides,
        tokens=st.integers(1, 12),
        name=st.sampled_from(["", "", "k2"]),
        is_hasty=st.sampled_from([False, False, True]),
        places=st.none() | st.integers(1, 2),
    )
    def open_budget(self, which, tokens, name, is_hasty, places=None) -> None:
        world = self.world(which)
        key = RequestKey(holder="", route="/b", key=name, body_digest="b") if name else None
        work = world.manager.budgets.open(POOL, tokens, key, places=places)
        if is_hasty:
            world.begin(work)
            return
        try:
            budget = world.do(work)
        except JournalFull:
            assert self.is_stalled(which)
        except Conflict:
            # or it is being opened, or closed, at this moment
            assert world.store.open.get(POOL) is not None or world.clients
        else:
            known = self.keys.setdefault((which, name), [budget.id]) if name else [budget.id]
            assert known == [budget.id]
            if not world.clients:
                assert (budget.tokens, budget.pool) == (world.store.tokens[budget.id], POOL)

    @rule(which=sides, is_hasty=st.sampled_from([False, False, True]))
    def close_budget(self, which, is_hasty) -> None:
        world = self.world(which)
        for budget in world.manager.budgets.of(POOL)[-1:]:
            work = world.manager.budgets.close(budget.id)
            if is_hasty:
                world.begin(work)
                continue
            try:
                closed = world.do(work)
            except JournalFull:
                assert self.is_stalled(which)
            else:
                assert closed.state is not BudgetState.OPEN
                assert closed.used == world.store.used[budget.id]

    # --- what the world does

    @rule(which=sides)
    def kill_core(self, which) -> None:
        self.world(which).kill_core()

    @precondition(lambda self: not self.is_stalled(0) and not self.is_stalled(1))
    @rule(which=sides, num_untold=st.integers(0, 3))
    def kill_front(self, which, num_untold) -> None:
        world = self.world(which)
        world.kill_front(num_untold)
        paused = [r.id for r in world.store.recover().live if r.state is RolloutState.PAUSED]
        assert all(world.manager.get(i).state is RolloutState.PAUSED for i in paused)

    @rule(which=sides)
    def fill_or_empty_the_disk(self, which) -> None:
        world = self.world(which)
        world.journal.stall(None if self.is_stalled(which) else "no space left")
        world.settle()

    # --- what must hold

    def find(self, which: int, rollout_id: str) -> Rollout:
        found: Rollout = self.world(which).do(self.world(which).manager.find(rollout_id))
        return found

    @invariant()
    def everybody_sees_a_beginning_that_is_in_the_journal(self) -> None:
        for which, world in enumerate(self.worlds):
            assert world.manager.is_healthy
            assert world.manager.journal_trouble == world.journal.stalled
            for growth in world.manager._holdings:
                rollout = growth.rollout
                whole = self.tokenizer.decode(rollout.output_ids)
                assert rollout.text == whole[: rollout.text_offset]
                if not rollout.is_durable:
                    continue
                kept = world.store.read(rollout.id)
                assert kept is not None
                count = len(rollout.output_ids)
                assert kept.output_ids[:count] == rollout.output_ids
                assert kept.lp_sampled[:count] == rollout.lp_sampled
                seen = self.seen.setdefault((which, rollout.id), [])
                assert rollout.output_ids[: len(seen)] == seen, "what was seen has changed"
                self.seen[which, rollout.id] = list(rollout.output_ids)

    @invariant()
    def budgets_are_exact(self) -> None:
        for which, world in enumerate(self.worlds):
            kept = {budget.id: budget for budget in world.store.recover().budgets}
            assert {name: budget.used for name, budget in kept.items()} == world.store.used
            shown = world.manager.budgets.of(POOL)
            for budget in shown:
                assert budget.used <= kept[budget.id].used <= budget.tokens
                assert (budget.used == budget.tokens) == (budget.state is BudgetState.SPENT)
                assert self.seen_used.get((which, budget.id), 0) <= budget.used
                self.seen_used[which, budget.id] = budget.used
                if not world.journal.pending:
                    assert (budget.used, budget.state) == (
                        kept[budget.id].used,
                        kept[budget.id].state,
                    )
            if shown:
                grown = sum(self.num_shown(world, name) for name in world.store.accepted)
                used = sum(budget.used for budget in shown)
                assert grown == world.store.before.get(POOL, 0) + used

    def num_shown(self, world: World, rollout_id: str) -> int:
        """Tokens that a rollout of the pool has grown by, as everybody sees it."""
        first = world.store.accepted[rollout_id]
        if first.pool != POOL:
            return 0
        growth = world.manager._holdings.get(rollout_id)
        num = world.store.lengths[rollout_id] if growth is None else len(growth.rollout.output_ids)
        return num - len(first.output_ids)

    def expected(self, rollout: Rollout) -> Any:
        kept: list[int] = []
        first = rollout
        if rollout.forked_from is not None:
            # its own tokens stand for those that it took over; the parent was checked itself
            kept = rollout.output_ids[: rollout.forked_from[1]]
        return alone(first, kept)

    def check_ended(self, rollout: Rollout) -> None:
        ids, text, reason = self.expected(rollout)
        if rollout.state is RolloutState.ABORTED:
            assert rollout.id in self.cancelled
            assert rollout.output_ids == ids[: len(rollout.output_ids)]
        else:
            assert rollout.state is RolloutState.FINISHED, rollout.finish_reason
            assert (rollout.output_ids, rollout.finish_reason, rollout.text) == (ids, reason, text)
        self.check_records(rollout)

    def check_records(self, rollout: Rollout) -> None:
        whole, num_prompt = rollout.prompt_ids + rollout.output_ids, len(rollout.prompt_ids)
        num = len(rollout.output_ids)
        logprobs = [fake_logprob(whole[: num_prompt + i + 1]) for i in range(num)]
        assert rollout.lp_sampled == rollout.lp_temp == logprobs
        assert rollout.versions == [1] * num
        record = rollout.sampling.record
        assert rollout.lp_raw == (logprobs if "lp_raw" in record else [])
        assert rollout.kept_ids == (
            [[i] for i in rollout.output_ids] if "kept_ids" in record else []
        )
        if num and rollout.sampling.prompt_logprobs is not None:
            expected = [fake_logprob(whole[: i + 1]) for i in range(1, num_prompt)]
            assert rollout.prompt_lp == [None, *expected]
        if "routing" in record and rollout.state is RolloutState.FINISHED:
            rows = range(len(whole) - 1)
            assert rollout.routing_ids == b"".join(fake_routing(whole[: i + 1]) for i in rows)

    def teardown(self) -> None:
        try:
            for which, world in enumerate(self.worlds):
                self.finish(which, world)
        finally:
            for world in self.worlds:
                world.close()
            if self.worlds:
                self.loop.close()

    def finish(self, which: int, world: World) -> None:
        """Undisturbed, all that was accepted ends, and its journal has it once."""
        if world.journal.stalled is not None:
            world.journal.stall(None)
        world.do(world.manager.resume())
        self.run(world)
        # whoever is left belongs to the pool; it goes on budget by budget
        while world.manager.num_live:
            assert POOL in world.store.open, "something never ended"
            assert world.store.open[POOL] is None, "a budget is open, and nobody grows"
            live = [g.rollout for g in world.manager._holdings if g.is_live]
            assert {(r.pool, r.state) for r in live} == {(POOL, RolloutState.PAUSED)}
            budget = world.do(world.manager.budgets.open(POOL, 5))
            self.run(world)
            [budget] = [b for b in world.manager.budgets.of(POOL) if b.id == budget.id]
            assert budget.state is BudgetState.SPENT or not world.manager.num_live
        assert not world.store.recover().live
        derived = [
            rollout.seed
            for rollout in world.store.accepted.values()
            if rollout.sampling.seed is None and rollout.forked_from is None
        ]
        assert len(set(derived)) == len(derived), "two rollouts share a seed"
        assert self.promised_in(which) <= set(world.store.accepted)
        for rollout_id in world.store.accepted:
            if (which, rollout_id) not in self.acked:
                rollout = self.find(which, rollout_id)
                self.check_ended(rollout)
                seen = self.seen.get((which, rollout_id), [])
                assert rollout.output_ids[: len(seen)] == seen
        self.everybody_sees_a_beginning_that_is_in_the_journal()

    def come_to_rest(self, which: int) -> None:
        """Whoever may grow has done so: of the pool only without a budget somebody is left."""
        world = self.world(which)
        self.run(world)
        live = [g.rollout for g in world.manager._holdings if g.is_live]
        paused = world.manager._holdings.paused
        waiting = [r for r in live if r.id not in paused]
        assert all(r.pool == POOL for r in waiting), "it could have gone on"
        assert not waiting or (POOL in world.store.open and world.store.open[POOL] is None)
        waits_for = {world.manager.waits_for(r) for r in waiting}
        assert waits_for <= {"budget"}

    def run(self, world: World) -> None:
        num_idle = 0
        for _ in range(3000):
            is_busy = world.step() or bool(world.journal.pending)
            world.journal.pump()
            world.settle()
            # a core that was being started has its first step still before it
            num_idle = 0 if is_busy else num_idle + 1
            if num_idle == 2:
                return
        raise AssertionError("it never comes to rest")

    def promised_in(self, which: int) -> set[str]:
        return {rollout_id for other, rollout_id in self.promised if other == which}


class RealMachine(DurableMachine):
    """The same over the real runner and its arithmetic, on a tiny checkpoint."""

    weights: ClassVar[Weights]
    folder: ClassVar[Path]

    @initialize(kv=caches(), batch=batches)
    def start(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self.loop = asyncio.new_event_loop()
        self.open_worlds(partial(self.core, kv, batch), Tokenizer.from_folder(self.folder))

    def core(self, kv: ResolvedKV, batch: BatchConfig, number: int) -> tuple[Core, Ready]:
        _, fake = fake_core(kv, batch, number)
        scheduler = Scheduler(kv, batch)
        scheduler.set_version(self.weights.digest)
        runner = ModelRunner(self.weights, kv, ModelConfig())
        config = Checkpoint.open(self.folder).config
        ready = msgspec.structs.replace(
            fake,
            vocab_size=config.vocab_size,
            version=self.weights.version,
            digest=self.weights.digest,
            numerics=runner.numerics,
            eos_ids=list(config.eos_token_ids),
            num_moe_layers=self.weights.num_moe_layers,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        )
        return Core(scheduler, runner), ready

    def check_ended(self, rollout: Rollout) -> None:
        found, whole = rollout.output_ids, self.alone(rollout)
        num, text = len(found), self.tokenizer.decode(found)
        start = num - len(whole.ids[: num - self.num_kept(rollout)])
        assert found[start:] == whole.ids[: num - start]
        for name in ("lp_sampled", "lp_temp", "kept_mass"):
            assert getattr(rollout, name)[start:] == getattr(whole, name)[: num - start]
        assert rollout.text == text[: rollout.text_offset]
        reason = rollout.finish_reason
        assert reason is not None
        if rollout.state is RolloutState.ABORTED:
            assert rollout.id in self.cancelled
        elif isinstance(reason.matched, str):
            assert reason.matched in text
            assert reason.matched not in self.tokenizer.decode(found[: max(num - 1, 0)])
        else:
            assert num == start + len(whole.ids)

    def num_kept(self, rollout: Rollout) -> int:
        return 0 if rollout.forked_from is None else rollout.forked_from[1]

    def alone(self, rollout: Rollout) -> Outcome:
        """A fresh core without a cache, and nobody else; stop strings are unknown to it."""
        kept = rollout.output_ids[: self.num_kept(rollout)]
        core = self.worlds[0].manager._core
        stop_ids = core.stop_ids(rollout)
        if len(kept) == rollout.max_tokens or (kept and kept[-1] in stop_ids):
            return Outcome()
        trial = Laboratory(self.weights, max_len=64).trial(cache=False)
        trial.add(
            Add(
                rollout_id="alone",
                prompt_ids=rollout.prompt_ids,
                output_ids=kept,
                sampling=rollout.sampling,
                seed=rollout.seed,
                max_tokens=rollout.max_tokens,
                stop_ids=sorted(stop_ids),
                banned_ids=sorted(stop_ids | set(core.eos_ids)),
            )
        )
        trial.run()
        return trial.outcomes["alone"]


DurableMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_every_history_gives_the_rollout_alone() -> None:
    DurableMachine.TestCase().runTest()


def draw_sampling(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        stop=tuple(rng.sample(STOPS, rng.choice([0, 0, 1, 2]))),
        ignore_eos=rng.random() < 0.7,
        min_tokens=rng.choice([0, 0, 2]),
        record=rng.choice([(), (), ("lp_raw", "entropy")]),
    )


def storm(seed: int, num_acts: int = 60) -> DurableMachine:
    """A busy pool: what Hypothesis draws at random, with weights by which a budget is often open,
    rollouts grow on it, and something is killed meanwhile."""
    rng = random.Random(seed)
    machine = DurableMachine()
    block_size = rng.randint(1, 5)
    least = -(-MAX_MODEL_LEN // block_size) + 1
    kv = ResolvedKV(
        block_size=block_size,
        num_blocks=least + rng.choice([0, 3, least, 3 * least]),
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=True,
        num_parking_blocks=rng.choice([0, least]),
        on_pause=rng.choice(["keep", "park", "drop"]),
    )
    batch = BatchConfig(max_num_seqs=rng.randint(1, 5), max_num_batched_tokens=rng.randint(1, 14))
    machine.start(kv=kv, batch=batch)
    world = machine.world(0)

    def ask(*, is_hasty: bool = False) -> None:
        prompt = [0, 1, 2, 0, 1, 2][: rng.randint(1, 6)]
        pool, sampling, length = (
            rng.choice([POOL, POOL, ""]),
            draw_sampling(rng),
            rng.randint(1, 11),
        )
        machine.ask(0, prompt, sampling, length, rng.randint(1, 3), 0, "", is_hasty, pool)

    def calm(act: Callable[[], None]) -> Callable[[], None]:
        """Only while the disk has room."""
        return lambda: None if machine.is_stalled(0) else act()

    share = rng.random
    acts: list[tuple[int, Callable[[], None]]] = [
        (12, ask),
        (1, lambda: ask(is_hasty=True)),
        (40, lambda: machine.step(which=0, count=rng.randint(1, 4), pumps=rng.randint(0, 4))),
        (
            12,
            lambda: machine.open_budget(
                0, rng.randint(1, 25), rng.choice(["", "k2"]), share() < 0.2
            ),
        ),
        (4, lambda: machine.close_budget(0, share() < 0.3)),
        (3, calm(lambda: machine.cancel(which=0, share=share()))),
        (2, calm(lambda: machine.pause_or_resume(0, share(), rng.choice(["pause", "resume"])))),
        (1, calm(lambda: machine.pause_all(is_resumed=True))),
        (3, calm(lambda: machine.fork(0, share(), share(), rng.randint(1, 2)))),
        (1, calm(lambda: machine.move(which=0, share=share()))),
        (2, calm(lambda: machine.acknowledge(which=0, share=share()))),
        (16, lambda: machine.run_ahead(which=0, count=rng.randint(1, 4), is_heard=share() < 0.3)),
        (4, calm(lambda: machine.come_to_rest(0))),
        (4, lambda: machine.kill_core(which=0)),
        (4, calm(lambda: machine.kill_front(which=0, num_untold=rng.randint(0, 3)))),
        (3, lambda: machine.fill_or_empty_the_disk(which=0)),
    ]
    weights, calls = zip(*acts, strict=True)
    try:
        for call in rng.choices(calls, weights, k=num_acts):
            call()
            if world.manager.num_live > 12 and not machine.is_stalled(0):
                machine.run(world)
            machine.everybody_sees_a_beginning_that_is_in_the_journal()
            machine.budgets_are_exact()
    finally:
        machine.teardown()
    return machine


@pytest.mark.parametrize("first_seed", range(0, 80, 20))
def test_a_pool_grows_by_its_budgets_and_by_nothing_else(first_seed: int) -> None:
    used, ends = 0, set()
    for seed in range(first_seed, first_seed + 20):
        for world in storm(seed).worlds:
            used += sum(world.store.used.values())
            ends |= {(b.state, b.used > 0) for b in world.store.recover().budgets}
    assert used > 200
    assert {(BudgetState.SPENT, True), (BudgetState.CLOSED, True)} <= ends


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_history_gives_the_bits_of_the_rollout_alone(tiny_checkpoint, dtype) -> None:
    held = {"weights": weights_of(tiny_checkpoint, dtype), "folder": tiny_checkpoint}
    machine = type("Machine", (RealMachine,), held)
    machine.TestCase.settings = settings(
        max_examples=60,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with kernels.use_level(REAL[0]):
        machine.TestCase().runTest()
