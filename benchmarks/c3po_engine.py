"""benchmarks/c3po.py engine: the comparison of `sim` on the real engine, with a small model.

One engine runs all three in turn: C3PO++ (the driver of `everstep rollout`), synchronous batches,
and "stop at N groups, abort, resubmit". Lengths are forced (`ignore_eos`, `max_tokens` drawn per
sample: lognormal, capped where 1 % reach the cap), rollouts are durable for all, Ω is the same.

Below each table stands what a step costs by the rollouts in it (c3po_steps.py), and what that cost
allows C3PO++ to gain in time at most.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from c3po_steps import STEPS as STEPS_LENGTH
from c3po_steps import bound, step_costs
from msgspec import Struct
from msgspec.structs import replace

from everstep.engine.checkpoint.make_checkpoint import Format, make_checkpoint, resize
from everstep.engine.config import BatchConfig, EngineConfig, JournalConfig, KVConfig, ModelConfig
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.native import ProcessBackend
from everstep.engine.rollout import Rollout, SamplingParams, derive_seed
from everstep.trainer_bridge.c3po.comparison import retention_without_purges
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.run.driver import RolloutDriver
from everstep.trainer_bridge.run.engine import Engine, Prompt, Work
from everstep.trainer_bridge.run.file import RunFile
from everstep.trainer_bridge.run.manager_engine import ManagerEngine
from everstep.trainer_bridge.run.parts import Delivered
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.run.words import Header, KeptPrompt, Position

MEDIAN = 16
GROUP = 8
CAPACITY = 32
_DENSE = (
    *("hidden_size=1024", "intermediate_size=4096", "num_hidden_layers=2"),
    *("num_attention_heads=8", "num_key_value_heads=2", "head_dim=128", "rotary_dim=64"),
    *("vocab_size=512", "first_k_dense_replace=2"),
)
# shape, sizes, format. weights: 30 M parameters that no cache holds, so a step has a fixed cost
MODELS: dict[str, tuple[str, tuple[str, ...], Format]] = {
    "tiny": ("tiny", (), "bf16"),
    "weights-bf16": ("tiny", _DENSE, "bf16"),
    "weights-f32": ("tiny", _DENSE, "f32"),
}
RATIOS = (1, 4, 16)
ROUNDS = 3
# per round; a pipeline that starts empty delivers late, so it is filled first
STEPS = 3
ITERATIONS = 12
WARM_UP_PER_RETENTION = 2
# the core's counters come this often
STATS_S = 1.5
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


class Phase(Struct):
    """Rollout phases of one way, in a row."""

    seconds: float = 0.0
    delivered: int = 0
    sampled: int = 0
    engine_steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens that the trainer gets, per second."""
        return self.delivered / self.seconds


def submission(lengths: CappedLognormal, *name: object) -> Submission:
    sampling = SamplingParams(
        max_tokens=lengths.draw(*name), ignore_eos=True, seed=derive_seed(*name), record=("lp_raw",)
    )
    return Submission(prompt_ids=PROMPT, sampling=sampling)


def forced(work: Work, lengths: CappedLognormal) -> Work:
    """Every sample and attempt has a length of its own."""
    sampling = replace(work.prompt.sampling, max_tokens=lengths.draw(work.seed))
    return replace(work, prompt=replace(work.prompt, sampling=sampling))


class Forced(ManagerEngine):
    """Of drawn lengths."""

    def __init__(self, manager: RolloutManager, lengths: CappedLognormal) -> None:
        super().__init__("here", manager, lambda _: PROMPT)
        self._lengths = lengths

    async def submit(self, work: Work) -> str:
        return await super().submit(forced(work, self._lengths))

    async def close(self) -> None:
        """The manager is everybody's."""


class Endless:
    """One prompt after another."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, count: int) -> tuple[list[KeptPrompt], dict[int, str], Position]:
        numbers = range(self._number, self._number + count)
        self._number += count
        kept = [KeptPrompt(f"{n}@0", n, 0, b"") for n in numbers]
        return kept, {}, Position(0, self._number)

    def prompt(self, kept: KeptPrompt) -> Prompt:
        sampling = SamplingParams(ignore_eos=True, max_tokens=1)
        return Prompt(id=kept.name, prompt_ids=PROMPT, sampling=sampling)


class Nowhere:
    """An output that keeps nothing, and counts."""

    def __init__(self) -> None:
        self.size = 0

    def cut(self, size: int) -> None:
        assert size == self.size

    def write(self, groups: Sequence[Sequence[Delivered]]) -> int:
        self.size += sum(map(len, groups))
        return self.size


class C3po:
    """The driver, stopped after each round and gone on with in the next."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        lengths: CappedLognormal,
        retention: int,
        capacity: int,
        *,
        num_phases: float = 1.0,
        has_standby: bool = True,
    ) -> None:
        """num_phases: lengths of all Ω places that Φ is worth."""
        self.name = f"C3PO++, σ = {retention}"
        budget = max(1, round(num_phases * capacity * lengths.mean))
        config = C3poConfig(
            budget=budget,
            capacity=capacity,
            standby=capacity if has_standby else 0,
            retention=retention,
            group=GROUP,
            max_reissues=10**6,
        )
        header = Header(
            id=f"bench-{lengths.ratio}-{retention}",
            source="",
            seed=0,
            sampling=SamplingParams(),
            config=config,
        )
        path = folder / f"{lengths.ratio}-{retention}.run"
        self._state = RunState(RunFile.open(path), header)
        self._engine = engine
        self._source, self._sink = Endless(), Nowhere()

    async def run(self, steps: int) -> Phase:
        state, before = self._state, self._state.machine.total
        limit = state.machine.iteration + steps
        began_s = time.perf_counter()
        await RolloutDriver(state, [self._engine], self._source, self._sink, limit=limit).run()
        total = state.machine.total
        return Phase(
            time.perf_counter() - began_s,
            total.delivered - before.delivered,
            total.sampled - before.sampled,
        )

    async def close(self) -> None:
        for seen in await self._engine.known(self._state.pool):
            if not seen.is_ended:
                await self._engine.cancel([seen.id])
        self._state.close()


class Synchronous:
    """A batch of groups is submitted and waited for."""

    name = "synchronous"

    def __init__(self, manager: RolloutManager, lengths: CappedLognormal, capacity: int) -> None:
        self._manager, self._lengths, self._capacity = manager, lengths, capacity
        self._number = 0
        self.batches: list[list[int]] = []
        """Lengths of all that was run."""

    async def run(self, steps: int) -> Phase:
        phase = Phase()
        for _ in range(steps):
            began_s = time.perf_counter()
            self._number += 1
            samples = range(self._capacity)
            work = [submission(self._lengths, "sync", self._number, i) for i in samples]
            self.batches.append([one.sampling.max_tokens or 0 for one in work])
            accepted = await self._manager.accept(work)
            rollouts = await asyncio.gather(*map(self._manager.wait, accepted.rollout_ids))
            phase.seconds += time.perf_counter() - began_s
            count = sum(len(rollout.output_ids) for rollout in rollouts)
            phase.delivered += count
            phase.sampled += count
            await self._manager.acknowledge(accepted.rollout_ids)
        return phase

    async def close(self) -> None:
        return None


class StopAtN:
    """Ω are kept in flight; when a batch of groups is complete the others are aborted, and
    submitted again from their first token. A finished member of an unfinished group is kept."""

    name = "stop at N"

    def __init__(self, manager: RolloutManager, lengths: CappedLognormal, capacity: int) -> None:
        self._manager, self._lengths, self._capacity = manager, lengths, capacity
        self._prompts = itertools.count()
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._hold: dict[int, list[int]] = {}

    async def run(self, steps: int) -> Phase:
        phase = Phase()
        for _ in range(steps):
            began_s = time.perf_counter()
            await self._step(phase)
            phase.seconds += time.perf_counter() - began_s
        return phase

    async def _step(self, phase: Phase) -> None:
        manager, complete = self._manager, 0
        live: dict[asyncio.Task[Rollout], tuple[int, int, int]] = {}
        ids: dict[tuple[int, int, int], str] = {}
        while complete < self._capacity // GROUP:
            fresh: list[tuple[int, int, int]] = []
            while len(live) + len(fresh) < self._capacity:
                if not self._waiting:
                    prompt = next(self._prompts)
                    self._hold[prompt] = []
                    self._waiting.extend((prompt, index, 0) for index in range(GROUP))
                fresh.append(self._waiting.popleft())
            if fresh:
                work = [submission(self._lengths, "stop", *sample) for sample in fresh]
                accepted = await manager.accept(work)
                for sample, rollout_id in zip(fresh, accepted.rollout_ids, strict=True):
                    ids[sample] = rollout_id
                    live[asyncio.create_task(manager.wait(rollout_id))] = sample
            done, _ = await asyncio.wait(live, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                sample = live.pop(task)
                members = self._hold[sample[0]]
                members.append(len(task.result().output_ids))
                phase.sampled += members[-1]
                if len(members) == GROUP:
                    complete += 1
                    phase.delivered += sum(self._hold.pop(sample[0]))
        await manager.cancel([ids[sample] for sample in live.values()])
        for task, (prompt, index, attempt) in reversed(live.items()):
            phase.sampled += len((await task).output_ids)
            self._waiting.appendleft((prompt, index, attempt + 1))
        await manager.acknowledge(list(ids.values()))

    async def close(self) -> None:
        return None


async def compare(
    manager: RolloutManager, folder: Path, lengths: CappedLognormal, args: argparse.Namespace
) -> tuple[list[str], list[list[Phase]], list[list[int]]]:
    """Names of the ways, and their phases by round; the ways take turns. And the lengths of the
    synchronous batches."""
    budget = round(args.capacity * lengths.mean)
    safe = retention_without_purges(lengths.cap, budget=budget, capacity=args.capacity)
    ways: list[Any] = [
        C3po(Forced(manager, lengths), folder, lengths, retention, args.capacity)
        for retention in args.retentions or [safe]
    ]
    synchronous = Synchronous(manager, lengths, args.capacity)
    ways += [synchronous, StopAtN(manager, lengths, args.capacity)]
    found: list[list[Phase]] = [[] for _ in ways]
    for way in ways:
        await way.run(WARM_UP_PER_RETENTION * safe if isinstance(way, C3po) else 1)
    synchronous.batches.clear()
    for _ in range(args.rounds):
        for way, phases in zip(ways, found, strict=True):
            before = await num_steps(manager)
            phase = await way.run(ITERATIONS if isinstance(way, C3po) else STEPS)
            phase.engine_steps = await num_steps(manager) - before
            phases.append(phase)
    for way in ways:
        await way.close()
    return [way.name for way in ways], found, synchronous.batches


async def num_steps(manager: RolloutManager) -> int:
    """Of the core so far; it says so now and then."""
    await asyncio.sleep(STATS_S)
    assert manager.stats is not None
    return manager.stats.steps_total


HEADER = (
    *("cap / median", "way", "rollouts per step", "of Ω", "steps per 1,000 delivered tokens"),
    *("fewer than synchronous", "delivered tok/s", "× synchronous", "not delivered"),
)


def rows(
    ratio: float, capacity: int, names: Sequence[str], found: Sequence[Sequence[Phase]]
) -> list[list[str]]:
    """A row for each way. Steps do not depend on what else the machine does; times do."""
    synchronous = found[names.index(Synchronous.name)]
    in_step = [total(phases, "sampled") / total(phases, "engine_steps") for phases in found]
    return [
        [
            f"{ratio:g}",
            name,
            f"{in_step[number]:.1f}",
            f"{100 * in_step[number] / capacity:.0f} %",
            f"{1000 * steps_per_token(phases):.1f}",
            f"{steps_per_token(synchronous) / steps_per_token(phases):.2f} ×",
            f"{statistics.median(phase.tokens_per_s for phase in phases):.0f}",
            times(phases, synchronous),
            f"{100 * (1 - total(phases, 'delivered') / total(phases, 'sampled')):.0f} %",
        ]
        for number, (name, phases) in enumerate(zip(names, found, strict=True))
    ]


def total(phases: Sequence[Phase], name: str) -> int:
    return sum(getattr(phase, name) for phase in phases)


def steps_per_token(phases: Sequence[Phase]) -> float:
    """Steps of the engine for a token that is delivered."""
    return total(phases, "engine_steps") / total(phases, "delivered")


def times(mine: Sequence[Phase], theirs: Sequence[Phase]) -> str:
    """Median and range of the speed-ups of the rounds."""
    rates = [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, theirs, strict=True)]
    return f"{statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f})"


async def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="everstep-c3po-") as name:
        folder = Path(name)
        shape, sizes, kind = MODELS[args.model]
        checkpoint = make_checkpoint(
            folder / "model", shape=resize(shape, sizes), format=kind, seed=1
        )
        longest = len(PROMPT) + round(args.median * max(args.ratios))
        model = ModelConfig(path=str(checkpoint), max_model_len=longest + STEPS_LENGTH)
        engine = EngineConfig(
            model=model,
            batch=BatchConfig(max_num_seqs=args.capacity),
            # nobody's KV is ever dropped: not what this compares
            kv=KVConfig(num_blocks=4 * args.capacity * (longest + STEPS_LENGTH) // 16),
            num_threads=args.threads,
        )
        # as `everstep rollout` has it
        journal = Journal.open(folder / "journal.db", JournalConfig(durability="power"))
        manager = RolloutManager(ProcessBackend(engine), None, journal=JournalThread(journal))
        await manager.start()
        try:
            print("| " + " | ".join(HEADER) + " |")
            print("|" + "---|" * len(HEADER))
            costs = await step_costs(manager, PROMPT, args.capacity)
            bounds = []
            for ratio in args.ratios:
                lengths = CappedLognormal(median=args.median, ratio=ratio)
                names, found, batches = await compare(manager, folder, lengths, args)
                for cells in rows(ratio, args.capacity, names, found):
                    print("| " + " | ".join(cells) + " |", flush=True)
                bounds.append(f"{bound(costs, batches, args.capacity):.2f} × at cap {ratio}")
            print(f"\nms of a step by its rollouts: {costs_text(costs)}")
            print(f"so at most × synchronous: {', '.join(bounds)}")
            print(f"load {os.getloadavg()[0]:.1f} at the end; {manager.info.numerics}")
        finally:
            await manager.close()


def costs_text(costs: Mapping[int, float]) -> str:
    return ", ".join(f"{count}: {1e3 * seconds:.2f}" for count, seconds in costs.items())


def run(args: argparse.Namespace) -> None:
    if args.capacity % GROUP:
        raise SystemExit(f"--capacity must be a multiple of {GROUP}, the samples of a group")
    asyncio.run(measure(args))


def add_command(commands: Any) -> None:
    parser = commands.add_parser("engine", help="measured, on a small model")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="Ω, the same for all")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of the core")
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS), help="cap / median")
    parser.add_argument("--median", type=int, default=MEDIAN, help="tokens")
    parser.add_argument(
        "--retentions", type=int, nargs="+", help="σ; default: the least that purges nothing"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in which the ways take turns")
    parser.set_defaults(run=run)
