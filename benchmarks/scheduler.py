"""Milliseconds per step that scheduling costs: schedule and commit, no model.

    python benchmarks/scheduler.py [--running 1024] [--steps 400] [--prompt 512] [--gc]

Automatic garbage collection is off unless `--gc` is given: it costs a third more, since the plan
and the news of a step are thousands of young objects.

All rollouts decode, which is the common step of a full engine. The runner's answers are made
while the clock stands, so only the scheduler's own work is timed: processor time of this thread,
which other processes disturb less than the clock on the wall (they still share caches and cores).
"""

import argparse
import gc
import statistics
import time

from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.messages import Add, encode
from everstep.engine.plan import RowResult, Sampled, StepPlan, StepResult
from everstep.engine.rollout import SAMPLED, SamplingParams
from everstep.engine.scheduler import Scheduler


def fill(num_running: int, num_prompt: int, max_tokens: int, block_size: int = 16) -> Scheduler:
    """A scheduler with so many rollouts past their prompts."""
    blocks = -(-(num_prompt + max_tokens) // block_size) + 2
    kv = ResolvedKV(
        block_size=block_size,
        num_blocks=num_running * blocks + 1,
        max_model_len=num_prompt + max_tokens,
        prefix_caching=True,
        num_parking_blocks=0,
    )
    scheduler = Scheduler(
        kv, BatchConfig(max_num_seqs=num_running, max_num_batched_tokens=8192 + num_running)
    )
    scheduler.set_version("v1")
    for index in range(num_running):
        # lengths differ, so that the block borders of different rollouts fall into different steps
        prompt = [index, *range(num_prompt - 1 - index % block_size)]
        scheduler.add(
            Add(
                rollout_id=f"rollout-{index}",
                prompt_ids=prompt,
                sampling=SamplingParams(),
                seed=index,
                max_tokens=max_tokens,
                stop_ids=[151645],
            )
        )
    while True:
        plan = scheduler.schedule()
        scheduler.commit(plan, answer(plan))
        if len(plan.rows) == num_running and all(len(row.token_ids) == 1 for row in plan.rows):
            return scheduler


def answer(plan: StepPlan) -> StepResult:
    rows = [
        RowResult(
            sampled=Sampled(token_id=7, lp_sampled=-1.0, lp_temp=-1.0, kept_mass=1.0, flags=SAMPLED)
            if row.samples
            else None
        )
        for row in plan.rows
    ]
    return StepResult.of(1, "v1", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="ms per step of schedule + commit")
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gc", action="store_true")
    args = parser.parse_args()
    scheduler = fill(args.running, args.prompt, args.steps + 64)
    gc.collect()
    gc.freeze()
    if not args.gc:
        gc.disable()
    schedule_ms, commit_ms, encode_ms = [], [], []
    for _ in range(args.steps):
        started = time.thread_time()
        plan = scheduler.schedule()
        planned = time.thread_time()
        result = answer(plan)
        ready = time.thread_time()
        messages = scheduler.commit(plan, result)
        booked = time.thread_time()
        encode(messages)
        schedule_ms.append(1e3 * (planned - started))
        commit_ms.append(1e3 * (booked - ready))
        encode_ms.append(1e3 * (time.thread_time() - booked))
    step_ms = [a + b for a, b in zip(schedule_ms, commit_ms, strict=True)]
    print(
        f"{args.running} running, decode only, {args.steps} steps (best, median, 90th percentile)"
    )
    for name, values in (
        ("schedule", schedule_ms),
        ("commit", commit_ms),
        ("schedule + commit", step_ms),
        ("encode (not counted)", encode_ms),
    ):
        ordered = sorted(values)
        figures = ordered[0], statistics.median(values), ordered[int(0.9 * len(values))]
        print(f"{name:>22}: " + "  ".join(f"{figure:6.3f} ms" for figure in figures))


if __name__ == "__main__":
    main()
