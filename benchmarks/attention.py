"""Attention over the paged cache: the C++ kernel, the torch kernel and torch's SDPA.

    python benchmarks/attention.py [--heads 9 3 64] [--threads 2] [--dtype bfloat16] [--quick]
                                   [--clock cpu]

Microseconds per token and layer; decode also in bytes of keys and values read per second, as a
share of the read bandwidth measured in the same run. Each call takes another layer's cache, so
that no side reads from a warm one; sides take turns, medians are printed with the load beside
them. SDPA reads dense keys and values, laid out for it in advance: no paging, and no promise
about bits. `--clock cpu` (one thread only) counts CPU time, for a busy machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from everstep.kernels import QuerySpan, native, native_ops
from everstep.kernels.attention import attention, plan_attention, tokens_per_tile

BLOCK_SIZE = 16
# bytes of keys and values that calls go through before they come back to the first
COLD = 64 * 2**20
MAX_LAYERS = 30
# a torch kernel's working copies beyond this are not worth waiting for
TORCH_LIMIT = 2**30

Shape = tuple[int, int, int]


Clock = Callable[[], float]


def seconds(call: Callable[[int], object], turn: int, clock: Clock) -> float:
    start = clock()
    call(turn)
    return clock() - start


def medians(
    calls: dict[str, Callable[[int], object]], budget: float, clock: Clock
) -> dict[str, float]:
    """Median seconds of each call; the calls take turns until the budget is spent."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        seconds(call, 0, clock)
        taken[name].append(seconds(call, 1, clock))
    end = time.perf_counter() + budget
    turn = 2
    while time.perf_counter() < end or turn < 5:
        for name, call in calls.items():
            taken[name].append(seconds(call, turn, clock))
        turn += 1
    return {name: statistics.median(values) for name, values in taken.items()}


def read_bandwidth(clock: Clock) -> float:
    """Bytes per second of a sum over memory that no cache holds."""
    x = torch.ones(2**26)
    return x.numel() * 4 / statistics.median(seconds(lambda _: x.sum(), 0, clock) for _ in range(7))


def sides(
    ops: native_ops.Ops, heads: Shape, dtype: torch.dtype, batch: int, context: int, new: int
) -> dict[str, Callable[[int], object]]:
    """The calls to compare: `new` queries at the end of `context` tokens, for each of a batch."""
    h, g, d = heads
    per_rollout = -(-context // BLOCK_SIZE)
    blocks = (torch.randperm(batch * per_rollout) + 1).view(batch, per_rollout).tolist()
    spans = [QuerySpan(i * new, context - new, new, blocks[i]) for i in range(batch)]
    slots = (batch * per_rollout + 1) * BLOCK_SIZE
    layers = max(2, min(MAX_LAYERS, COLD // (4 * slots * g * d)))
    k = [torch.randn(slots, g, d).to(dtype) for _ in range(layers)]
    v = [torch.randn(slots, g, d).to(dtype) for _ in range(layers)]
    q = torch.randn(batch * new, h, d).to(dtype)
    plan = native_ops.plan_attention(spans, block_size=BLOCK_SIZE)
    scale = d**-0.5
    calls: dict[str, Callable[[int], object]] = {
        "ours": lambda i: ops.attention(q, k[i % layers], v[i % layers], plan, scale=scale)
    }
    if batch * context * g * d * 8 * (1 if new == 1 else 4) <= TORCH_LIMIT:
        old = plan_attention(spans, block_size=BLOCK_SIZE, tile_tokens=tokens_per_tile(h, g))
        calls["torch"] = lambda i: attention(q, k[i % layers], v[i % layers], old, scale=scale)
    dense = [
        [x[: batch * context].view(batch, context, g, d).transpose(1, 2) for x in caches]
        for caches in (k, v)
    ]
    q_dense = q.view(batch, new, h, d).transpose(1, 2)
    calls["sdpa"] = lambda i: torch.nn.functional.scaled_dot_product_attention(
        q_dense, dense[0][i % layers], dense[1][i % layers], is_causal=new > 1, enable_gqa=True
    )
    return calls


def report(what: str, found: dict[str, float], tokens: int, rest: str) -> None:
    cells = "".join(
        f"{found[name] / tokens * 1e6:>10.2f}" if name in found else f"{'–':>10}"
        for name in ("ours", "torch", "sdpa")
    )
    print(f"{what:<22}{cells}   {rest}   load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a few cells, short medians")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts this thread alone: use --threads 1")
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(options.threads)
    library = native.library()
    if library is None:
        raise SystemExit(f"no C++ kernels here: {native.level().reason}")
    ops, heads, dtype = (
        native_ops.Ops(library),
        tuple(options.heads),
        getattr(torch, options.dtype),
    )
    budget = 0.3 if options.quick else 2.0
    bandwidth = read_bandwidth(clock)
    print(f"level {native.level().name}, torch {torch.__version__}, {options.threads} threads")
    print(f"heads {heads}, {options.dtype}; reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'µs per token':<22}{'ours':>10}{'torch':>10}{'sdpa':>10}")
    for batch in (1, 32) if options.quick else (1, 8, 32, 128):
        for context in (128, 512, 2048):
            found = medians(sides(ops, heads, dtype, batch, context, 1), budget, clock)
            size = 2 * batch * context * heads[1] * heads[2] * dtype.itemsize
            speed = size / found["ours"]
            report(
                f"decode {batch} × {context}", found, batch,
                f"{speed / 1e9:5.1f} GB/s = {speed / bandwidth:4.0%}",
            )  # fmt: skip
    for context in (512, 2048):
        found = medians(sides(ops, heads, dtype, 1, context, context), budget, clock)
        products = 2 * context * (context + 1) * heads[0] * heads[2]
        report(f"prefill {context}", found, context, f"{products / found['ours'] / 1e9:5.0f} GF/s")


if __name__ == "__main__":
    main()
