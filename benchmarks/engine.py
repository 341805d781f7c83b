"""Decode of the whole engine against its own bare forward, and against the memory's limit.

    python benchmarks/engine.py [--model default] [--dtype bfloat16] [--threads 2]

whole  `Core.step` with n rollouts decoding: schedule, the forward pass, a drawn token with its
       logprobs for each, commit, and what is said to the front
bare   the same forward pass in the same process, over n rows of its own KV at about the same
       positions: inputs prepared before, the head's logits of every row included, and the check
       that they are finite; no draw, no schedule, nothing from Python inside (`NativeStep.run`; at
       the torch level the operations one by one)
Interleaved step by step; medians. `read` is the bytes of weights and KV that a
step must touch, over the time of the whole step, as a share of the read bandwidth measured here.
Peers are not in this script (issue 9's benchmarks/cpu.py is to have them).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from everstep import kernels
from everstep.engine.checkpoint import Checkpoint
from everstep.engine.config import ModelConfig
from everstep.engine.determinism import BLOCK, Laboratory, Trial
from everstep.engine.hub import resolve
from everstep.engine.messages import Add
from everstep.engine.model import KVStore
from everstep.engine.plan import Row
from everstep.engine.rollout import SamplingParams
from everstep.engine.rotary import rotary_tables
from everstep.engine.runner import ModelRunner
from everstep.engine.step import ForwardPass, batch_of
from everstep.engine.weights import Weights, load_weights

STEPS = 20
PROMPT = 128


def read_bandwidth() -> float:
    """Bytes per second of summing memory that no cache holds, with torch's threads."""
    x = torch.ones(64 * 2**20)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - started)
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


def bare_step(weights: Weights, count: int) -> Callable[[], object]:
    """A forward pass with logits over `count` rows at the same context, nothing else."""
    config = weights.config
    position = PROMPT + STEPS // 2
    blocks = -(-(PROMPT + STEPS) // BLOCK)
    kv = KVStore.empty(config, (1 + count * blocks) * BLOCK, weights.dtype)
    forward = ForwardPass(weights, kv, rotary_tables(config, PROMPT + STEPS), BLOCK)
    rows = [
        Row(
            rollout_id=f"b{i}",
            all_ids=[i % config.vocab_size] * (position + 1),
            num_missing=1,
            num_tokens=1,
            block_table=list(range(1 + i * blocks, 1 + (i + 1) * blocks)),
            num_prompt=PROMPT,
            sampling=SamplingParams(),
            seed=i,
            banned_ids=[],
        )
        for i in range(count)
    ]
    batch, native = batch_of(rows, wants_routes=False), forward.native

    def step() -> object:
        with torch.inference_mode():
            if native is None:
                return forward.run(rows, wants_routes=False)
            return native.run(batch, threads=torch.get_num_threads())

    step()
    return step


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(resolve(options.model, lambda *_: None))
    config = ModelConfig(path=options.model, dtype=options.dtype)
    weights = load_weights(checkpoint, config, on_progress=lambda *_: None)
    bandwidth = read_bandwidth()
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
        trial, bare = decoding(weights, count), bare_step(weights, count)
        assert isinstance(trial.core.runner, ModelRunner)
        whole_ms, bare_ms = [], []
        for _ in range(STEPS):
            whole_ms.append(milliseconds(trial.step))
            bare_ms.append(milliseconds(bare))
        whole, alone = statistics.median(whole_ms), statistics.median(bare_ms)
        touched = weight_bytes(weights) + count * per_token * (PROMPT + STEPS)
        share = touched / (whole / 1e3) / bandwidth
        print(
            f"{count:>8} {whole:>9.1f} {alone:>8.1f} {count / whole * 1e3:>9.0f} "
            f"{alone / whole:>10.0%} {share:>6.0%}"
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
