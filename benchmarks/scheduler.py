"""Milliseconds per step that everything but the model costs, with many rollouts decoding.

    python benchmarks/scheduler.py [--running 1024] [--steps 400] [--prompt 512] [--text] [--no-gc]

    schedule, commit   the scheduler's own work, in the core
    encode             the core's messages to msgpack
    decode, take       in the front: from msgpack, and what the manager does with it (`--text`: with
                       a byte-level tokenizer, so that it detokenises too); nobody reads along

All rollouts decode, which is the common step of a full engine. The fake runner's answers are made
while the clock stands. Times are processor time of the one thread that does it all, which other
processes disturb less than the clock on the wall (they still share caches and cores); the load is
printed. The garbage collector runs as it does in a core.
"""

import argparse
import asyncio
import gc
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.checkpoint.random_tokenizer import special_tokens, write_tokenizer
from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.core.plan import Draws, RowResult, StepPlan, StepResult
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Add, FromCore, Ready, ToCore, decode_from_core, encode
from everstep.engine.rollout import SAMPLED, SamplingParams
from everstep.engine.tokenizer import Tokenizer

BLOCK_SIZE = 16
VOCAB_SIZE = 512
TOKEN_ID = ord("g")


class TimedCore:
    """Backend over a scheduler alone; notes what each stage of each step costs, in ms.

    `take` is the time from one `receive` to the next: the manager's.
    """

    def __init__(self, num_running: int, num_prompt: int, num_steps: int) -> None:
        self.num_running = num_running
        self.num_steps = num_steps
        self.max_tokens = num_steps + 64
        self.max_model_len = num_prompt + self.max_tokens
        self.is_done = asyncio.Event()
        self.costs: dict[str, list[float]] = defaultdict(list)
        blocks = -(-self.max_model_len // BLOCK_SIZE) + 2
        kv = ResolvedKV(
            block_size=BLOCK_SIZE,
            num_blocks=num_running * blocks + 1,
            max_model_len=self.max_model_len,
            prefix_caching=True,
            num_parking_blocks=0,
        )
        self._scheduler = Scheduler(
            kv, BatchConfig(max_num_seqs=num_running, max_num_batched_tokens=8192 + num_running)
        )
        self._scheduler.set_version("v1")
        self._is_full = False
        self._returned_s: float | None = None

    async def start(self, _: Version | None = None, /) -> Ready:
        return Ready(
            core_id="timed",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            num_blocks=1,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.num_running,
            version=1,
            digest="v1",
            numerics="none",
            num_moe_layers=1,
            num_experts=1,
            num_experts_per_tok=1,
        )

    def send(self, messages: Sequence[ToCore]) -> None:
        for message in messages:
            if isinstance(message, Add):
                self._scheduler.add(message)

    async def receive(self) -> list[FromCore]:
        if self._returned_s is not None:
            self.costs["take"].append(1e3 * (time.thread_time() - self._returned_s))
        self._returned_s = None
        await asyncio.sleep(0)
        if len(self.costs["schedule"]) == self.num_steps:
            self.is_done.set()
            await asyncio.Event().wait()
        return self._timed_step() if self._is_full else self._step()

    async def close(self) -> None:
        return None

    def _step(self) -> list[FromCore]:
        plan = self._scheduler.schedule()
        if len(plan.rows) == self.num_running and all(row.samples for row in plan.rows):
            # from the next step on all of them decode
            self._is_full = True
            gc.collect()
            gc.freeze()
        return self._scheduler.commit(plan, answer(plan))

    def _timed_step(self) -> list[FromCore]:
        with self._timed("schedule"):
            plan = self._scheduler.schedule()
        result = answer(plan)
        with self._timed("commit"):
            messages = self._scheduler.commit(plan, result)
        with self._timed("encode"):
            wire = encode(messages)
        with self._timed("decode"):
            found = decode_from_core(wire)
        self._returned_s = time.thread_time()
        return found

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.costs[stage].append(1e3 * (time.thread_time() - started))


def answer(plan: StepPlan) -> StepResult:
    """What a runner gives back: the same token for each row that draws."""
    count = len(plan.rows)
    draws = Draws(
        token_ids=[TOKEN_ID] * count,
        lp_sampled=[-1.0] * count,
        lp_temp=[-1.0] * count,
        kept_mass=[1.0] * count,
        flags=[SAMPLED] * count,
    )
    rows = {index: RowResult() for index, row in enumerate(plan.rows) if not row.samples}
    return StepResult(version=1, digest="v1", draws=draws, rows=rows)


def make_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB_SIZE, special_tokens(VOCAB_SIZE), "simple")
        return Tokenizer.from_folder(Path(folder))


async def measure(core: TimedCore, tokenizer: Tokenizer | None, num_prompt: int) -> None:
    manager = RolloutManager(core, tokenizer)
    await manager.start()
    for index in range(core.num_running):
        # lengths differ, so that the block borders of different rollouts fall into different steps
        length = num_prompt - index % BLOCK_SIZE
        prompt_ids = [
            index % VOCAB_SIZE,
            index // VOCAB_SIZE,
            *(p % 256 for p in range(length - 2)),
        ]
        sampling = SamplingParams(
            max_tokens=core.max_tokens, ignore_eos=True, stop_token_ids=(VOCAB_SIZE - 1,)
        )
        manager.submit(Submission(prompt_ids=prompt_ids, sampling=sampling))
    await core.is_done.wait()
    await manager.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="ms per step without the model")
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--no-gc", action="store_true")
    args = parser.parse_args()
    if args.no_gc:
        gc.disable()
    else:
        gc.set_threshold(100_000, 20, 100)  # as engine/core/core.py does
    core = TimedCore(args.running, args.prompt, args.steps)
    asyncio.run(measure(core, make_tokenizer() if args.text else None, args.prompt))
    print(
        f"{args.running} running, decode only, {args.steps} steps, "
        f"load {os.getloadavg()[0]:.1f} (best, median, 90th percentile)"
    )
    costs = core.costs
    own = [a + b for a, b in zip(costs["schedule"], costs["commit"], strict=True)]
    for name, values in (("schedule + commit", own), *costs.items()):
        ordered = sorted(values)
        figures = ordered[0], statistics.median(values), ordered[int(0.9 * len(values))]
        print(f"{name:>18}: " + "  ".join(f"{figure:6.3f} ms" for figure in figures))


if __name__ == "__main__":
    main()
