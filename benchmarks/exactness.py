"""What row invariance costs: a step's products and attention, ours against the fastest that is free.

    python benchmarks/exactness.py [--model default] [--threads 2] [--rounds 9]

For each operation of a decode step (bf16, context 192) and each batch size: our kernel, and those
whose bits may depend on the batch: `torch.mm`, `torch.mm` on weights kept in float32 (twice the
memory), oneDNN with the weight packed for this batch size, scaled_dot_product_attention over dense
keys laid out beforehand. All of them in turn, medians; the
free step takes the fastest of all for each operation, ours among them. The rest of a step (norms,
routing, sampling) is the same in both and left out, which makes the cost look larger.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

from everstep.engine.config import PATIENCE

# before torch is loaded: its threads must not spin into the turn of another side
os.environ.update(PATIENCE | dict(os.environ))

import attention
import torch
from gemm import CYCLED_BYTES, seconds
from peers.models import SIZES, Sizes

from everstep.kernels import Linear, Weight, linear, native, native_ops, prepare

BATCHES = (1, 8, 32, 128)
CONTEXT = 192
Call = Callable[[int], object]


def products(s: Sizes, batch: int) -> list[tuple[str, int, int, int, float]]:
    """(name, N, K, rows, calls a step) of the linear layers; experts by their average load."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    # a token meets a given expert with the chance chosen / experts
    met = s.experts * (1 - (1 - s.chosen / s.experts) ** batch)
    rows = max(1, round(batch * s.chosen / met))
    return [
        ("qkv", queries + 2 * keys, s.hidden, batch, s.layers),
        ("o", s.hidden, queries, batch, s.layers),
        ("gate and up", 2 * s.width, s.hidden, rows, s.layers * met),
        ("down", s.hidden, s.width, rows, s.layers * met),
        ("head", s.vocab, s.hidden, batch, 1),
    ]


def product_sides(n: int, k: int, rows: int) -> tuple[dict[str, Call], int]:
    """The calls to compare, and over how many weights they go (more than the caches hold)."""
    count = max(2, min(64, int(CYCLED_BYTES / (2 * n * k))))
    weights = [(torch.randn(n, k) / k**0.5).bfloat16() for _ in range(count)]
    x = torch.randn(rows, k).bfloat16()
    ours = [prepare(Weight(w, torch.bfloat16)) for w in weights]
    sides: dict[str, Call] = {
        "ours": partial(_ours, x, ours),
        "torch.mm": partial(_mm, x, [w.t() for w in weights]),
        "float32": partial(_wide_mm, x, [w.float().t() for w in weights]),
    }
    # it refuses bf16 where the processor has no instructions for it
    with contextlib.suppress(RuntimeError):
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
        sides["oneDNN"] = partial(_onednn, x, packed)
    return sides, count


def _ours(x: torch.Tensor, weights: list[Linear], i: int) -> object:
    return linear(x, weights[i])


def _mm(x: torch.Tensor, weights: list[torch.Tensor], i: int) -> object:
    return torch.mm(x, weights[i])


def _wide_mm(x: torch.Tensor, weights: list[torch.Tensor], i: int) -> object:
    return torch.mm(x.float(), weights[i]).bfloat16()


def _onednn(x: torch.Tensor, weights: list[torch.Tensor], i: int) -> object:
    return torch.ops.mkldnn._linear_pointwise(x, weights[i], None, "none", [], "")


def measure(name: str, rounds: int) -> dict[int, dict[str, dict[str, float]]]:
    """{batch: {operation: {side: ms of a step}}} with torch's threads."""
    s = SIZES[name]
    library = native.library()
    if library is None:
        raise SystemExit(f"no C++ kernels here: {native.level().reason}")
    ops = native_ops.Ops(library)
    found: dict[int, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        step = found[batch] = {}
        for what, n, k, rows, calls in products(s, batch):
            sides, count = product_sides(n, k, rows)
            # torch.mm without bf16 instructions is slow enough to be waited for
            took = seconds(
                sides, min(count, max(2, int(2e9 / (2 * rows * n * k)))), rounds, time.perf_counter
            )
            step[what] = {side: 1e3 * calls * t for side, t in took.items()}
        heads = (s.heads, s.kv_heads, s.head_dim)
        sides = attention.sides(ops, heads, torch.bfloat16, batch, CONTEXT, 1)
        sides.pop("torch", None)
        took = attention.medians(sides, 0.03 * rounds, time.perf_counter)
        step["attention"] = {side: 1e3 * s.layers * t for side, t in took.items()}
    return found


def summary(step: dict[str, dict[str, float]]) -> tuple[float, float]:
    """(ours, free): ms of the whole step."""
    return (
        sum(sides["ours"] for sides in step.values()),
        sum(min(sides.values()) for sides in step.values()),
    )


def table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row per batch size."""
    lines = [
        "| concurrent | ours, ms | free, ms | cost | faster where free |",
        "|---|---|---|---|---|",
    ]
    for batch, step in found.items():
        ours, free = summary(step)
        better = [
            f"{what}: {min(sides, key=lambda side: sides[side])} "
            f"{min(sides.values()) / sides['ours'] - 1:+.0%}"
            for what, sides in step.items()
            if min(sides.values()) < sides["ours"]
        ]
        cost = f"{ours / free - 1:.1%}"
        lines.append(f"| {batch} | {ours:.1f} | {free:.1f} | {cost} | {', '.join(better) or '–'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default", choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    found = measure(options.model, options.rounds)
    print(f"{options.model}, level {native.level().name}, torch {torch.__version__}")
    print(f"{options.threads} threads, load {load:.1f} to {os.getloadavg()[0]:.1f}\n")
    print(table(found))
    worst = max(ours / free - 1 for ours, free in map(summary, found.values()))
    middle = statistics.median(ours / free - 1 for ours, free in map(summary, found.values()))
    print(f"\ncost of row invariance: {middle:.1%} in the middle, {worst:.1%} at worst")


if __name__ == "__main__":
    main()
