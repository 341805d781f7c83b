"""What the journal costs: time per commit by durability level, bytes per token, time to recover.

    python benchmarks/journal.py [--dir .] [--steps 300] [--recover 1000 10000 100000] [--only PART]

A step appends one token to each of 1, 8, 32 or 128 rollouts and commits. Levels are interleaved, in
rounds; a figure is the median, and what 99 % stay below. `processor` is the time of this thread,
which other processes disturb less. The folder must be on the disk that you mean: /tmp may be memory.
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from everstep.engine.config import Durability, JournalConfig
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Accept, Append, End, Grown, Op, Origin
from everstep.engine.rollout import (
    SAMPLED,
    TRUNCATED_SUPPORT,
    FinishReason,
    Rollout,
    RolloutState,
    SamplingParams,
)

LEVELS: tuple[Durability, ...] = ("process", "accepts", "power")
ORIGIN = Origin(1, "3f2a9c", "cpu-avx2-bf16", "core-1")


def rollout(number: int, num_prompt: int = 128) -> Rollout:
    return Rollout(
        id=f"ro-{number:032x}",
        group_id=f"grp-{number // 8:032x}",
        index=number % 8,
        prompt_ids=[(number * 31 + t * 7) % 50_000 for t in range(num_prompt)],
        sampling=SamplingParams(),
        seed=number,
        max_tokens=10**6,
        is_durable=True,
        created_s=1.8e9,
    )


def tokens(rollout_id: str, start: int, num: int, *, is_plain: bool = True) -> Grown:
    """Logprobs are float32. Plain: temperature 1, nothing truncated."""
    lps = [-((start + t) % 1024) / 128 for t in range(num)]
    return Grown(
        rollout_id=rollout_id,
        start=start,
        ids=[(start + t) * 37 % 50_000 for t in range(num)],
        lp_sampled=lps,
        lp_temp=list(lps) if is_plain else [lp - 0.125 for lp in lps],
        kept_mass=[1.0 if is_plain else 0.875] * num,
        flags=[SAMPLED if is_plain else SAMPLED | TRUNCATED_SUPPORT] * num,
    )


def commits(folder: Path, num_rollouts: int, steps: int) -> None:
    """Time of a commit, and of an accept, at each level."""
    journals: dict[str, Journal] = {}
    taken: dict[str, tuple[list[float], ...]] = {}
    for level in LEVELS:
        journal = Journal.open(
            folder / f"{level}-{num_rollouts}.db", JournalConfig(durability=level)
        )
        journal.commit([Accept([rollout(n) for n in range(num_rollouts)])])
        journals[level], taken[level] = journal, ([], [], [])
    names = [rollout(n, 1).id for n in range(num_rollouts)]
    for step in range(steps):
        for at in range(len(LEVELS)):
            level = LEVELS[(step + at) % len(LEVELS)]
            journal = journals[level]
            news = [tokens(name, step, 1) for name in names]
            began, cpu = time.perf_counter(), time.thread_time()
            journal.commit([Append(ORIGIN, news, 1.8e9)])
            taken[level][0].append(time.perf_counter() - began)
            taken[level][1].append(time.thread_time() - cpu)
            if step % 4 == 0:
                began = time.perf_counter()
                journal.commit([Accept([rollout(10**6 + step)])])
                taken[level][2].append(time.perf_counter() - began)
    for name, (walls, cpus, accepts) in taken.items():
        print(
            f"  {num_rollouts:4d} rollouts, {name:8s} tokens {_ms(walls)}, processor "
            f"{statistics.median(cpus) * 1e3:.2f} ms, "
            f"{1 / statistics.median(walls):6.0f} commits/s; accept {_ms(accepts)}"
        )
        journals[name].close()


def _ms(values: list[float]) -> str:
    p99 = sorted(values)[int(len(values) * 0.99)]
    return f"{statistics.median(values) * 1e3:.2f} ms (99 %: {p99 * 1e3:.2f})"


def sizes(folder: Path, steps: int = 2000) -> None:
    """Bytes of the file per output token: as appended, and as ended."""
    for num_rollouts in (1, 8, 32, 128):
        for is_plain in (True, False):
            journal = Journal.open(folder / f"size-{num_rollouts}-{is_plain}.db")
            accepted = [rollout(n) for n in range(num_rollouts)]
            journal.commit([Accept(accepted)])
            base = journal.num_bytes
            for step in range(steps):
                news = [tokens(r.id, step, 1, is_plain=is_plain) for r in accepted]
                journal.commit([Append(ORIGIN, news)])
            num_tokens = num_rollouts * steps
            appended = (journal.num_bytes - base) / num_tokens
            for whole in journal.recover().live:
                journal.commit([End(ended(whole))])
            journal.compact(is_thorough=True)
            kept = (journal.num_bytes - base) / num_tokens
            journal.close()
            kind = "plain" if is_plain else "truncated"
            print(
                f"  {num_rollouts:4d} at once, {kind:9s} {appended:5.1f} appended, {kept:5.1f} ended"
            )


def ended(whole: Rollout) -> Rollout:
    whole.state, whole.finish_reason = RolloutState.FINISHED, FinishReason("length")
    whole.ended_s = 1.8e9
    return whole


def recovery(folder: Path, num_rollouts: int, num_tokens: int = 64) -> None:
    """Opening (every record verified) and recovery, for half live and half ended rollouts."""
    path = folder / f"recover-{num_rollouts}.db"
    journal = Journal.open(path, JournalConfig(durability="process"))
    for first in range(0, num_rollouts, 500):
        some = [rollout(n, 64) for n in range(first, min(first + 500, num_rollouts))]
        journal.commit([Accept(some)])
        for start in range(0, num_tokens, 8):
            journal.commit([Append(ORIGIN, [tokens(r.id, start, 8) for r in some], 1.8e9)])
        model = journal.read(some[0].id)
        assert model is not None
        endings: list[Op] = []
        for r in some[::2]:
            for name in ("output_ids", "lp_sampled", "lp_temp", "kept_mass", "flags"):
                setattr(r, name, getattr(model, name))
            r.versions, r.segments = model.versions, model.segments
            endings.append(End(ended(r)))
        journal.commit(endings)
    journal.close()
    gc.collect()
    times, cpu = [time.perf_counter()], [time.thread_time()]
    journal = Journal.open(path)
    times.append(time.perf_counter())
    cpu.append(time.thread_time())
    recovered = journal.recover()
    times.append(time.perf_counter())
    cpu.append(time.thread_time())
    print(
        f"  {num_rollouts:6d} rollouts, half live, {num_tokens} tokens each: "
        f"open {times[1] - times[0]:.2f} s (processor {cpu[1] - cpu[0]:.2f}), "
        f"recover {times[2] - times[1]:.2f} s (processor {cpu[2] - cpu[1]:.2f}), "
        f"{len(recovered.live)} live, file {os.path.getsize(path) / 1e6:.1f} MB"
    )
    journal.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="what the journal costs")
    parser.add_argument("--dir", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recover", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--only", choices=["commits", "sizes", "recovery"])
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=".journal-", dir=args.dir))
    try:
        print(f"load {os.getloadavg()[0]:.1f}")
        if args.only in (None, "commits"):
            print("time of a commit")
            for num_rollouts in (1, 8, 32, 128):
                commits(folder, num_rollouts, args.steps)
        if args.only in (None, "sizes"):
            print("bytes per output token")
            sizes(folder)
        if args.only in (None, "recovery"):
            print("recovery")
            for num_rollouts in args.recover:
                recovery(folder, num_rollouts)
        print(f"load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
