"""Decode of the whole engine against its own bare forward, and against the memory's limit.

    python benchmarks/engine.py [--model default] [--dtype bfloat16] [--threads 2]

whole  `Core.step` with n rollouts decoding: schedule, the forward pass, a drawn token with its
       logprobs for each, commit, and what is said to the front
bare   the forward pass of the step that just ran, once more: the same inputs, prepared already, over
       the same KV, where it writes the same bits again. It includes the head's logits of every row
       and the check that they are finite, and nothing else: no schedule, no draw, no Python inside
       (`NativeStep.run`; at the torch level the operations one by one)

Interleaved step by step; medians, `whole/bare` that of the pairs. `--clock cpu` (one thread only)
counts CPU time: on a busy machine the one figure worth reading. `read` is the bytes of weights and
KV that a step must touch, over the time of the whole step, as a share of the read bandwidth
measured here.
Peers are not in this script (issue 9's benchmarks/cpu.py is to have them).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from everstep import kernels
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.hub import resolve
from everstep.engine.config import ModelConfig
from everstep.engine.core.plan import Row
from everstep.engine.messages import Add
from everstep.engine.model.runner import ModelRunner
from everstep.engine.model.weights import Weights, load_weights
from everstep.engine.proofs.determinism import Laboratory, Trial
from everstep.engine.rollout import SamplingParams
from everstep.kernels import StepBatch, StepOutput

STEPS = 20
PROMPT = 128


def read_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes per second of summing memory that no cache holds, with torch's threads."""
    x = torch.ones(64 * 2**20)
    times = []
    for _ in range(7):
        started = clock()
        x.sum()
        times.append(clock() - started)
    return x.numel() * 4 / statistics.median(times)


def decoding(weights: Weights, count: int) -> Trial:
    """`count` rollouts whose prompts are computed; each step from here on is pure decode."""
    lab = Laboratory(weights, max_len=PROMPT + 6 * STEPS)
    blocks = count * lab.one_rollout_blocks
    trial = lab.trial(blocks=blocks, seqs=count, cache=False)
    for i in range(count):
        prompt = [(i * 7919 + j * 104729) % weights.config.vocab_size for j in range(PROMPT)]
        trial.add(
            Add(
                rollout_id=f"r{i}",
                prompt_ids=prompt,
                sampling=SamplingParams(),
                seed=i,
                max_tokens=5 * STEPS,
            )
        )
    while any(not outcome.ids for outcome in trial.outcomes.values()):
        trial.step()
    return trial


def bare_step(trial: Trial) -> Callable[[], object]:
    """Runs the forward pass of the trial's last step again; spies on the steps to know it."""
    assert isinstance(trial.core.runner, ModelRunner)
    forward = trial.core.runner.forward
    last: list[Callable[[], object]] = []

    if (native := forward.native) is not None:
        run = native.run

        def spy(batch: StepBatch, *, threads: int) -> StepOutput:
            last[:] = [lambda: run(batch, threads=threads)]
            return run(batch, threads=threads)

        native.run = spy  # type: ignore[method-assign]
    else:
        by_torch = forward.run

        def spy_rows(rows: Sequence[Row], *, wants_routes: bool) -> StepOutput:
            # rows are views of lists that go on growing
            kept = [msgspec.structs.replace(row, all_ids=list(row.all_ids)) for row in rows]
            last[:] = [lambda: by_torch(kept, wants_routes=wants_routes)]
            return by_torch(rows, wants_routes=wants_routes)

        forward.run = spy_rows  # type: ignore[method-assign]

    @torch.inference_mode()
    def step() -> object:
        return last[0]()

    return step


def milliseconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    function()
    return (clock() - started) * 1e3


def weight_bytes(weights: Weights) -> int:
    """Linear layers and head, as T holds them (every expert: the default routes to all)."""
    config, size = weights.config, weights.dtype.itemsize
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    width = config.num_experts * config.moe_intermediate_size or config.intermediate_size
    layer = attention + 3 * config.hidden_size * width
    return size * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rollouts", default="1,8,32,128", help="how many decode at once")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread: give --threads 1")
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(resolve(options.model, lambda *_: None))
    config = ModelConfig(path=options.model, dtype=options.dtype)
    weights = load_weights(checkpoint, config, on_progress=lambda *_: None)
    bandwidth = read_bandwidth(clock)
    print(
        f"{options.model}, {kernels.level_name()}, torch {torch.__version__}, {options.threads} "
        f"threads, load {os.getloadavg()[0]:.1f}, read bandwidth {bandwidth / 1e9:.1f} GB/s, "
        f"weights {weight_bytes(weights) / 1e6:.0f} MB"
    )
    print(
        f"{'rollouts':>8} {'whole ms':>9} {'bare ms':>8} {'tokens/s':>9} {'whole/bare':>11} {'read':>6}"
    )
    per_token = 2 * weights.config.num_hidden_layers * weights.config.num_key_value_heads
    per_token *= weights.config.head_dim * weights.dtype.itemsize
    for count in map(int, options.rollouts.split(",")):
        trial = decoding(weights, count)
        bare = bare_step(trial)
        whole_ms, bare_ms = [], []
        for _ in range(STEPS):
            whole_ms.append(milliseconds(trial.step, clock))
            bare_ms.append(milliseconds(bare, clock))
        whole, alone = statistics.median(whole_ms), statistics.median(bare_ms)
        touched = weight_bytes(weights) + count * per_token * (PROMPT + STEPS)
        ratio = statistics.median(b / w for b, w in zip(bare_ms, whole_ms, strict=True))
        share = touched / (whole / 1e3) / bandwidth
        print(
            f"{count:>8} {whole:>9.1f} {alone:>8.1f} {count / whole * 1e3:>9.0f} "
            f"{ratio:>10.0%} {share:>6.0%}"
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
