"""What durability costs a whole engine: tokens/s and first token by level; pause and resume.

    python benchmarks/durability.py [--rollouts 8 32] [--tokens 64] [--rounds 5] [--dir .]

One engine process for each level (none, process, accepts, power), all on the default model, used
in turn, in rounds: the same prompts of 64 tokens (8 for pauses), EOS ignored, temperature 1. Tokens are counted when their
reader sees them, hence journaled. Figures are medians over rounds; a ratio is the median of the
rounds' own ratios. Pause: from the call to its return and until no token comes any more; resume:
from the call to the first new token.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from everstep.engine.checkpoint.hub import resolve
from everstep.engine.config import (
    BatchConfig,
    Durability,
    EngineConfig,
    JournalConfig,
    KVConfig,
    ModelConfig,
)
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.native import ProcessBackend
from everstep.engine.rollout import RolloutState, SamplingParams
from everstep.engine.tokenizer import Tokenizer

LEVELS: tuple[Durability | Literal["none"], ...] = ("none", "process", "accepts", "power")
NUM_PROMPT = 64


def submissions(
    count: int, num_tokens: int, seed: int, num_prompt: int = NUM_PROMPT
) -> list[Submission]:
    """One of each prompt, so that nothing is shared."""
    return [
        Submission(
            prompt_ids=[(seed * 7919 + i * 31 + t * 7) % 40_000 for t in range(num_prompt)],
            sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed * 1000 + i),
        )
        for i in range(count)
    ]


async def begin(manager: RolloutManager, level: str, wanted: list[Submission]) -> list[str]:
    """Ids of accepted rollouts."""
    if level == "none":
        return [rollout.id for one in wanted for rollout in manager.submit(one)]
    accepted = await asyncio.gather(*(manager.accept(one) for one in wanted))
    return [i for one in accepted for i in one.rollout_ids]


async def timed(
    manager: RolloutManager, level: str, count: int, num_tokens: int, seed: int
) -> tuple[float, float]:
    """(tokens/s from submission to the last token, seconds to the first token: median)."""
    wanted = submissions(count, num_tokens, seed)
    start = time.perf_counter()
    ids = await begin(manager, level, wanted)
    first: list[float] = []

    async def read(rollout_id: str) -> None:
        async for delta in manager.stream(rollout_id):
            if delta.end and len(first) < count and delta.start == 0:
                first.append(time.perf_counter() - start)

    await asyncio.gather(*map(read, ids))
    rate = count * num_tokens / (time.perf_counter() - start)
    await tidy(manager, level, ids)
    return rate, statistics.median(first)


async def tidy(manager: RolloutManager, level: str, ids: list[str]) -> None:
    if level == "none":
        manager.drop(ids)
    else:
        await manager.acknowledge(ids)


async def paused(
    manager: RolloutManager, level: str, count: int, seed: int
) -> tuple[float, float, float]:
    """Seconds: until pause returns, until nothing comes any more, from resume to a new token."""
    ids = await begin(manager, level, submissions(count, 200, seed, num_prompt=8))
    rollouts = [await manager.find(i) for i in ids]
    while sum(len(r.output_ids) for r in rollouts) < 2 * count:
        await asyncio.sleep(0.005)
    start = time.perf_counter()
    await manager.pause(ids)
    returned = time.perf_counter() - start
    while any(r.state is not RolloutState.PAUSED for r in rollouts):
        await asyncio.sleep(0.0005)
    still = time.perf_counter() - start
    before = sum(len(r.output_ids) for r in rollouts)
    await asyncio.sleep(0.3)
    assert sum(len(r.output_ids) for r in rollouts) == before, "a paused rollout grew"
    start = time.perf_counter()
    await manager.resume(ids)
    while sum(len(r.output_ids) for r in rollouts) == before:
        await asyncio.sleep(0.0005)
    resumed = time.perf_counter() - start
    await manager.cancel(ids)
    await tidy(manager, level, ids)
    return returned, still, resumed


def ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}"


async def main(arguments: argparse.Namespace) -> None:
    folder = resolve("default", lambda *_: None)
    config = EngineConfig(
        model=ModelConfig(path=str(folder), max_model_len=1024),
        kv=KVConfig(prefix_caching=False, num_blocks=8192),
        batch=BatchConfig(max_num_seqs=256),
    )
    managers: dict[str, RolloutManager] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        for level in LEVELS:
            journal = None
            if level != "none":
                settings = JournalConfig(durability=level)
                journal = JournalThread(Journal.open(Path(scratch, level), settings))
            backend = ProcessBackend(msgspec.structs.replace(config))
            tokenizer = Tokenizer.from_folder(folder)
            managers[level] = RolloutManager(backend, tokenizer, journal=journal)
            await managers[level].start()
        print(f"{managers['none'].info.numerics}, load {os.getloadavg()[0]:.1f}")
        for count in arguments.rollouts:
            await throughput(managers, count, arguments)
        for count in arguments.pause:
            found: list[Any] = [
                await paused(managers["accepts"], "accepts", count, 77 + i) for i in range(3)
            ]
            returned, still, resumed = (list(column) for column in zip(*found, strict=True))
            print(
                f"pause {count:4}: returns {ms(returned)} ms, still after {ms(still)} ms; "
                f"resume: a token after {ms(resumed)} ms; load {os.getloadavg()[0]:.1f}"
            )
        for manager in managers.values():
            await manager.close()


async def throughput(
    managers: dict[str, RolloutManager], count: int, arguments: argparse.Namespace
) -> None:
    rates: dict[str, list[float]] = {level: [] for level in LEVELS}
    firsts: dict[str, list[float]] = {level: [] for level in LEVELS}
    for turn in range(arguments.rounds):
        for level in LEVELS[turn % 4 :] + LEVELS[: turn % 4]:
            rate, first = await timed(managers[level], level, count, arguments.tokens, turn)
            rates[level].append(rate)
            firsts[level].append(first)
    for level in LEVELS:
        ratios = [a / b for a, b in zip(rates[level], rates["none"], strict=True)]
        print(
            f"{count:4} rollouts  {level:8} {statistics.median(rates[level]):7.1f} tok/s  "
            f"{100 * statistics.median(ratios):6.1f} %  first token {ms(firsts[level]):>7} ms  "
            f"load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pause", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=".")
    asyncio.run(main(parser.parse_args()))
