"""Packed linear layers against torch.mm, and against what this machine can do.

    python benchmarks/gemm.py [--threads 1] [--clock cpu] [--dtypes bf16 f32 fp8] [--rounds 9]

Both sides in turn, medians; GB/s counts the bytes of the packed weight once a call, GF/s the
multiplications and additions. Weights are cycled through more memory than the caches hold.
`--clock cpu` (one thread only) counts CPU time: on a busy machine the one figure worth reading.
Row invariance costs nothing beside it: there is no faster variant of ours that lacks it.
"""

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from everstep.kernels import Weight, native
from everstep.kernels.packed import PackedWeight, pack, packed_linear

# N, K: qkv, gate-up and down of the default model; a square one
SHAPES = [(960, 576), (3072, 576), (576, 1536), (2048, 2048)]
ROWS = (1, 8, 32, 128, 512)
CYCLED_BYTES = 100e6
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.bfloat16}


def read_limit(library: ctypes.CDLL, threads: int, clock: Callable[[], float]) -> float:
    """GB/s of reading 256 MiB, best of nine."""
    read = library.everstep_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32], ctypes.c_float
    memory = torch.zeros(256 << 20, dtype=torch.uint8)
    best = 0.0
    for _ in range(9):
        start = clock()
        read(memory.data_ptr(), memory.numel(), threads)
        best = max(best, memory.numel() / (clock() - start) / 1e9)
    return best


def multiply_limit(
    library: ctypes.CDLL, is_bf16: bool, threads: int, clock: Callable[[], float]
) -> float:
    """GF/s of multiply-adds in registers, best of nine."""
    multiply = library.everstep_multiply
    multiply.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
    multiply.restype = ctypes.c_int64
    best = 0.0
    for _ in range(9):
        start = clock()
        operations = multiply(is_bf16, 200_000, threads)
        best = max(best, threads * operations / (clock() - start) / 1e9)
    return best


def make_weights(kind: str, n: int, k: int) -> tuple[list[Weight], list[torch.Tensor]]:
    """As we multiply them, and as torch does (FP8: expanded beforehand)."""
    dtype = TYPES[kind]
    ours, theirs = [], []
    for _ in range(max(2, int(CYCLED_BYTES / (n * k * dtype.itemsize)))):
        w = torch.randn(n, k) / k**0.5
        if kind == "fp8":
            codes = (w * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
            weight = Weight(codes, dtype, "block", torch.rand(-(-n // 128), -(-k // 128)) / 500)
        else:
            weight = Weight(w.to(dtype), dtype)
        ours.append(weight)
        theirs.append(weight.expanded())
    return ours, theirs


def seconds(
    sides: dict[str, Callable[[int], object]], calls: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds a call of each side, the sides in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = clock()
            for i in range(calls):
                call(i)
            found[name].append((clock() - start) / calls)
    return {name: statistics.median(times) for name, times in found.items()}


def ours_of(x: torch.Tensor, weights: list[PackedWeight], i: int) -> torch.Tensor:
    return packed_linear(x, weights[i])


def torch_of(x: torch.Tensor, weights: list[torch.Tensor], i: int) -> torch.Tensor:
    return torch.mm(x, weights[i].t())


def compare(
    kind: str, n: int, k: int, options: argparse.Namespace, clock: Callable[[], float]
) -> None:
    weights, dense = make_weights(kind, n, k)
    packed: list[PackedWeight] = [pack(w) for w in weights]
    for rows in ROWS:
        x = torch.randn(rows, k).to(TYPES[kind])
        sides: dict[str, Callable[[int], object]] = {
            "ours": partial(ours_of, x, packed),
            "torch": partial(torch_of, x, dense),
        }
        calls = min(len(packed), max(1, int(2e9 / (rows * n * k * 2))))
        took = seconds(sides, calls, options.rounds, clock)
        ours, theirs = took["ours"], took["torch"]
        print(
            f"{kind:<5} {n:>5} {k:>5} {rows:>4}"
            f" {ours * 1e6:>9.0f} {theirs * 1e6:>9.0f} {theirs / ours:>6.2f}x"
            f" {packed[0].num_bytes / ours / 1e9:>8.1f} {2 * rows * n * k / ours / 1e9:>8.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--dtypes", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts this thread alone: use --threads 1")
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(options.threads)
    library, level = native.library(), native.level()
    if library is None:
        parser.error(f"no C++ library: {level.reason}")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"level {level.name}, {options.threads} threads, {options.clock} clock")
    print("load", *(f"{load:.1f}" for load in os.getloadavg()))
    limit = (library, options.threads, clock)
    print(f"limits: read {read_limit(*limit):.1f} GB/s", end="")
    for name, is_bf16 in (("bf16", True), ("f32", False)):
        peak = multiply_limit(library, is_bf16, options.threads, clock)
        print(f", {name} {peak:.0f} GF/s", end="")
    print("\ntype      N     K    M   ours µs  torch µs  ratio     GB/s     GF/s")
    for kind in options.dtypes:
        for n, k in SHAPES:
            compare(kind, n, k, options, clock)
    print("load", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ == "__main__":
    main()
