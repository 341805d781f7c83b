"""Versions of the weights from a trainer to an engine: how fast they travel, and what serving costs.

    python benchmarks/weights.py [--gb 0.1 0.5 1] [--rounds 3] [--only WAY …] [--engine]

One rank with float32 masters publishes bf16 versions of a model with experts of 2 MiB: into shared
memory, and to a receiver in a process of its own over ipc and TCP on loopback, without and with
CURVE. The newest stays (keep = 1), so that from the third version on each is written over an older
one: the first ones, whose pages are new, are shown apart. Ways are measured one after the other, each
beside, in the same rounds:

    memcpy               between memory that is there, one thread
    new file             bytes that are in the cache into a new file in shared memory, all threads
    raw socket           over loopback from one process to another, which drops them
    raw socket to file   and which puts them into a new file in shared memory

(of 0.5 GB at most). A figure is the median of the rounds; processor seconds are those of both sides
together, and say more than the clock where other work shares the machine. GB/s are until the bytes
are there; "whole" is until the version has its name, with sha256 of every tensor. A size takes more
than four times itself of memory: masters of twice that, and two versions.
--engine adds what follows in an engine with a model of that size (weights_engine.py), and the whole
time from publish to serving.
"""

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np
import torch
import weights_engine
from msgspec.structs import replace
from torch import Tensor

from everstep.engine.checkpoint.expected_tensors import expected_tensors
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import tensor_hash
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.kernels.checksum import crc32
from everstep.trainer_bridge.curve import make_keys, read_keys
from everstep.trainer_bridge.trainer.sharding import World, join_world
from everstep.trainer_bridge.trainer.trainable import trainable_config
from everstep.trainer_bridge.weights.folder import SHARED_MEMORY
from everstep.trainer_bridge.weights.layout import PIECE_BYTES
from everstep.trainer_bridge.weights.sender import Published, WeightSender
from everstep.trainer_bridge.weights.targets import Elsewhere, Here, Target
from everstep.weights_receiving import Job, ReceiverChild

WIDTH = 1024
WAYS = ("shared memory", "ipc", "tcp", "ipc, CURVE", "tcp, CURVE")
BASES = ("memcpy", "new file", "raw socket", "raw socket to file")
BASE_BYTES = 500_000_000
# versions whose pages are new: with keep = 1 there are two files
NUM_NEW = 2
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Took(NamedTuple):
    """Seconds by the clock, and of the processors on both sides."""

    wall_s: float
    cpu_s: float

    def of(self, num_bytes: int) -> "Took":
        """For each GB."""
        return Took(*(1e9 * seconds / num_bytes for seconds in self))


class Way(NamedTuple):
    """A target, and the process at its other end."""

    target: Target
    receiver: ReceiverChild | None


class Masters:
    """Stands for a model in training: the float32 tensors of one with experts of 2 MiB in bf16."""

    def __init__(self, source: Path, gigabytes: float) -> None:
        experts = max(16, round(gigabytes * 1e9 / (3 * 2 * WIDTH * WIDTH)))
        layers = max(1, experts // 64)
        self.config = replace(
            trainable_config(source),
            hidden_size=WIDTH,
            moe_intermediate_size=WIDTH,
            moe_shared_expert_intermediate_size=WIDTH,
            num_hidden_layers=layers + 1,
            first_k_dense_replace=1,
            num_experts=experts // layers,
        )
        values = torch.randn(WIDTH * WIDTH)
        self._tensors = {
            spec.name: _of(values, math.prod(spec.shape)).view(spec.shape)
            for spec in expected_tensors(self.config)
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `TrainableRing.tensors`."""
        yield from self._tensors.items()


def _of(values: Tensor, count: int) -> Tensor:
    return values.repeat(-(-count // len(values)))[:count]


@contextmanager
def timed(found: list[Took], pids: Sequence[int] = ()) -> Iterator[None]:
    """Adds what the block took, here, in children that ended in it and in these processes."""

    def cpu_s() -> float:
        usages = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return sum(u.ru_utime + u.ru_stime for u in usages) + sum(map(_cpu_s, pids))

    wall, cpu = time.perf_counter(), cpu_s()
    yield
    found.append(Took(time.perf_counter() - wall, cpu_s() - cpu))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def middle(took: Sequence[Took]) -> Took:
    return Took(*map(statistics.median, zip(*took, strict=True)))


def memcpy(num_bytes: int, found: list[Took]) -> None:
    """Again and again between two places of 64 MiB, which no cache holds."""
    size = 64 * 2**20
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    with timed(found):
        for start in range(0, num_bytes, size):
            np.copyto(target[: num_bytes - start], source[: num_bytes - start])


@contextmanager
def new_file(folder: Path) -> Iterator[int]:
    path = folder / "new"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield file
    finally:
        os.close(file)
        path.unlink()


def write_file(num_bytes: int, folder: Path, found: list[Took]) -> None:
    """By as many threads as there are cores."""
    data = np.ones(PIECE_BYTES, np.uint8).data
    with new_file(folder) as file, timed(found), ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(
            lambda offset: os.pwrite(file, data, offset), range(0, num_bytes, PIECE_BYTES)
        ):
            pass


class RawSender:
    """A process that sends. It is begun before there are masters: a fork beside them copies the tables
    of all their pages, and whatever is written next is a fault."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._jobs, jobs = context.Pipe()
        context.Process(target=self._run, args=(jobs,), daemon=True).start()

    def begin(self, address: tuple[str, int], num_bytes: int) -> None:
        """Send so much there."""
        self._jobs.send((address, num_bytes))

    def end(self) -> float:
        """Processor seconds that it took."""
        took: float = self._jobs.recv()
        return took

    @staticmethod
    def _run(jobs: "Connection[float, tuple[tuple[str, int], int]]") -> None:
        data = memoryview(bytes(PIECE_BYTES))
        while True:
            address, num_bytes = jobs.recv()
            began = time.process_time()
            with socket.create_connection(address) as sender:
                for start in range(0, num_bytes, PIECE_BYTES):
                    sender.sendall(data[: num_bytes - start])
            jobs.send(time.process_time() - began)


def raw_socket(
    num_bytes: int, found: list[Took], source: RawSender, folder: Path | None = None
) -> None:
    """Another process sends, this one receives; into a new file where there is a folder."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, ExitStack() as stack:
        file = None if folder is None else stack.enter_context(new_file(folder))
        with timed(found):
            source.begin(listener.getsockname(), num_bytes)
            buffer, got = memoryview(bytearray(PIECE_BYTES)), 0
            with listener.accept()[0] as receiver:
                while size := receiver.recv_into(buffer, PIECE_BYTES):
                    if file is not None:
                        os.pwrite(file, buffer[:size], got)
                    got += size
        wall_s, cpu_s = found.pop()
        found.append(Took(wall_s, cpu_s + source.end()))
    assert got == num_bytes


def parts(sender: WeightSender) -> dict[str, float]:
    """Processor seconds of a version's bytes alone, on one thread: made, summed, hashed."""
    found = dict.fromkeys(("convert", "checksum", "sha256"), 0.0)
    began = time.thread_time()
    for piece in sender.layout.pieces():
        data = piece.data().view(torch.uint8).numpy()
        made = time.thread_time()
        crc32(data)
        summed = time.thread_time()
        tensor_hash("", "BF16", ()).update(data.data)
        found["convert"] += made - began
        found["checksum"] += summed - made
        began = time.thread_time()
        found["sha256"] += began - summed
    return found


@contextmanager
def opened(world: World, folder: Path, name: str) -> Iterator[Way]:
    """With a folder of its own, and a receiver where one is needed."""
    with ExitStack() as stack:
        root = folder / "versions"
        stack.callback(shutil.rmtree, root)
        if name == "shared memory":
            here = Here(world, root, keep=1)
            stack.callback(here.close)
            yield Way(here, None)
            return
        keys = folder / "keys" if "CURVE" in name else None
        bind = "tcp://127.0.0.1:0" if "tcp" in name else f"ipc://{folder}/socket"
        job = Job(bind, "bench", str(root), None if keys is None else str(keys))
        child = stack.enter_context(ReceiverChild(job))
        # "weights of the run 'bench' arrive at ADDRESS, in ROOT"
        address = child.ready().partition(" arrive at ")[2].partition(",")[0]
        target = Elsewhere(
            world,
            [address],
            run="bench",
            lineage=token_hex(4),
            keys=None if keys is None else read_keys(keys, "trainer"),
            keep=1,
        )
        stack.callback(target.close)
        yield Way(target, child)


def free_bytes() -> int:
    """Memory that can be had."""
    [line] = [s for s in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in s]
    return int(line.split()[1]) * 1024


class Measured:
    """One size: everything, by rounds; published: the versions of each way."""

    def __init__(self, gigabytes: float, ways: Sequence[str], source: RawSender) -> None:
        self._gigabytes, self._ways, self._source = gigabytes, ways, source
        self._bases: dict[str, list[Took]] = {name: [] for name in BASES}
        self._took: dict[str, list[Took]] = {name: [] for name in ways}
        self._published: dict[str, list[Published]] = {way: [] for way in ways}
        self._parts: list[dict[str, float]] = []
        self._num_bytes = 0
        self._most_bytes = 0
        """Memory that was taken."""

    def run(self, rounds: int) -> None:
        before = free_bytes()
        needs = 4 * self._gigabytes * 1e9 + 2 * BASE_BYTES
        if needs > before:
            raise SystemExit(
                f"--gb {self._gigabytes:g} needs {needs / 1e9:.1f} GB of memory, "
                f"{before / 1e9:.1f} are free"
            )
        folder = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir=SHARED_MEMORY))
        try:
            source = make_checkpoint(folder / "source", shape="tiny")
            make_keys(folder / "keys")
            masters = Masters(source, self._gigabytes)
            with join_world("cpu") as world:
                for name in self._ways:
                    with opened(world, folder, name) as way:
                        sender = WeightSender(
                            masters,  # type: ignore[arg-type]
                            world,
                            way.target,
                            source=source,
                            stored=StoredFormat(masters.config, torch.bfloat16),
                            lineage="bench",
                        )
                        self._num_bytes = sender.layout.num_bytes
                        for number in range(rounds + NUM_NEW):
                            self._round(number, folder, name, way, sender)
                            self._most_bytes = max(self._most_bytes, before - free_bytes())
                        self._parts.append(parts(sender))
        finally:
            shutil.rmtree(folder)

    def _round(self, number: int, folder: Path, name: str, way: Way, sender: WeightSender) -> None:
        size = min(BASE_BYTES, self._num_bytes)
        bases: dict[str, Callable[[list[Took]], None]] = {
            "memcpy": lambda found: memcpy(size, found),
            "new file": lambda found: write_file(size, folder, found),
            "raw socket": lambda found: raw_socket(size, found, self._source),
            "raw socket to file": lambda found: raw_socket(size, found, self._source, folder),
        }
        for base, measure in bases.items():
            found: list[Took] = []
            measure(found)
            if number:
                self._bases[base].append(found[0].of(size))
        found = []
        with timed(found, [] if way.receiver is None else [way.receiver.pid]):
            published = sender.publish(number)
        # by the clock: until the bytes are there; digests and the folder's name come after
        self._took[name].append(Took(published.write_s, found[0].cpu_s).of(self._num_bytes))
        self._published[name].append(published)

    def show(self) -> None:
        size = self._num_bytes / 1e9
        rounds = min(map(len, self._took.values())) - NUM_NEW
        print(f"\n{size:.2f} GB, {rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
        bases = {name: middle(took) for name, took in self._bases.items()}
        heads = ["", "new pages GB/s", "GB/s", *(f"/ {base}" for base in BASES), "whole GB/s"]
        heads += ["processor s/GB", "write s", "digests s", "name s"]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        for name, base in bases.items():
            self._show_row(name, [], base, bases, [])
        for name, took in self._took.items():
            steady = self._published[name][NUM_NEW:]
            # the very first also waits for what every process does once
            new = f"{1 / took[NUM_NEW - 1].wall_s:.2f}"
            self._show_row(name, [new], middle(took[NUM_NEW:]), bases, steady)
        alone = ", ".join(
            f"{part} {statistics.median(one[part] for one in self._parts) / size:.2f}"
            for part in self._parts[0]
        )
        print(f"\nprocessor s/GB of one thread, alone: {alone}")
        print(f"memory: {self._most_bytes / 1e9:.1f} GB at the most, masters included")

    def _show_row(
        self,
        name: str,
        new: list[str],
        took: Took,
        bases: dict[str, Took],
        published: Sequence[Published],
    ) -> None:
        row = [name, *(new or [""]), f"{1 / took.wall_s:.2f}"]
        row += [f"{base.wall_s / took.wall_s:.0%}" for base in bases.values()]
        seconds = [
            statistics.median(getattr(one, field) for one in published) if published else 0.0
            for field in ("write_s", "digest_s", "finish_s")
        ]
        row.append(f"{self._num_bytes / 1e9 / sum(seconds):.2f}" if published else "")
        row.append(f"{took.cpu_s:.2f}")
        row += [f"{one:.3f}" if published else "" for one in seconds]
        print(f"| {' | '.join(row)} |")

    def show_serving(self, rounds: int) -> None:
        """What follows in an engine, nothing being generated and then beside generation."""
        with tempfile.TemporaryDirectory(prefix="everstep-bench-") as scratch:
            model = weights_engine.synthetic(Path(scratch) / "model", self._num_bytes)
            figures = weights_engine.measure(model, rounds=rounds)
        print("\n" + "\n".join(weights_engine.lines("in the engine", figures)))
        print("\nfrom publish to serving, seconds:\n")
        staging = ("idle", "full", "background")
        print(f"| | until it is there | {' | '.join(f'serves, {name}' for name in staging)} |")
        print("|---" * (len(staging) + 2) + "|")
        for way, published in self._published.items():
            there = statistics.median(
                one.write_s + one.digest_s + one.finish_s for one in published[NUM_NEW:]
            )
            serves = [f"{there + figures.serving_s[name]:.2f}" for name in staging]
            print(f"| {' | '.join([way, f'{there:.2f}', *serves])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="versions of the weights on their way")
    parser.add_argument("--gb", type=float, nargs="*", default=[0.1, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--engine", action="store_true", help="and what follows in an engine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    source = RawSender()
    for gigabytes in args.gb:
        measured = Measured(gigabytes, args.only, source)
        measured.run(args.rounds)
        measured.show()
        if args.engine:
            measured.show_serving(args.rounds)


if __name__ == "__main__":
    main()
