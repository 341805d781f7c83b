"""Versions of the weights from a trainer to an engine: how fast they travel, and what serving costs.

    python benchmarks/weights.py [--gb 0.1 0.5 1] [--rounds 3] [--engine] [--only NAME …]

One rank with float32 masters publishes bf16 versions of the given sizes: into shared memory, and to
a receiver in a process of its own over ipc and TCP on loopback, without and with CURVE. Beside them,
in the same rounds: a memcpy, the same bytes written into a new file in shared memory, and a raw
socket over loopback from one process to another. A figure is the median of the rounds.
4 GB need 8 GB for the masters, and 4 GB each for the new version and the one before: --gb 4.
--engine measures, at a small model, what follows in the engine: digests, reading, canaries, flip.
"""

import argparse
import math
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from everstep.engine.expected_tensors import expected_tensors
from everstep.engine.make_checkpoint import make_checkpoint
from everstep.engine.manifest import tensor_hash
from everstep.engine.stored_format import StoredFormat
from everstep.kernels.checksum import crc32
from everstep.trainer_bridge.curve import make_keys, read_keys
from everstep.trainer_bridge.sharding import World, join_world
from everstep.trainer_bridge.trainable import trainable_config
from everstep.trainer_bridge.weight_chunks import CHUNK_BYTES, chunks, new_buffer
from everstep.trainer_bridge.weight_folder import SHARED_MEMORY
from everstep.trainer_bridge.weight_sender import Published, WeightSender
from everstep.trainer_bridge.weight_targets import Elsewhere, Here, Target
from everstep.weights_receiving import Job, ReceiverChild

WIDTH = 1024
WAYS = ("shared memory", "ipc", "tcp", "ipc, CURVE", "tcp, CURVE")
BASES = ("memcpy", "new file", "raw socket")


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
            spec.name: values.repeat(-(-math.prod(spec.shape) // len(values)))[
                : math.prod(spec.shape)
            ].view(spec.shape)
            for spec in expected_tensors(self.config)
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `TrainableRing.tensors`."""
        yield from self._tensors.items()


def memcpy_s(num_bytes: int) -> float:
    """From memory to memory that is there, by one thread."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


def new_file_s(num_bytes: int, folder: Path) -> float:
    """The bytes of a cache-sized buffer into a new file in shared memory, by all threads."""
    data = memoryview(np.ones(CHUNK_BYTES, np.uint8))
    path = folder / "new"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            offsets = range(0, num_bytes, CHUNK_BYTES)
            for _ in pool.map(lambda offset: os.pwrite(file, data, offset), offsets):
                pass
        return time.perf_counter() - began
    finally:
        os.close(file)
        path.unlink()


def raw_socket_s(num_bytes: int) -> float:
    """Another process sends, this one receives, and does nothing with it."""
    listener = socket.create_server(("127.0.0.1", 0))
    if os.fork() == 0:
        with socket.create_connection(listener.getsockname()) as sender:
            data, left = bytes(CHUNK_BYTES), num_bytes
            while left > 0:
                left -= sender.send(data[:left] if left < CHUNK_BYTES else data)
        os._exit(0)
    with listener, listener.accept()[0] as receiver:
        buffer, found = bytearray(CHUNK_BYTES), 0
        began = time.perf_counter()
        while size := receiver.recv_into(buffer):
            found += size
        seconds = time.perf_counter() - began
    os.wait()
    assert found == num_bytes
    return seconds


def parts_s(sender: WeightSender) -> dict[str, float]:
    """What a version's bytes cost alone, on one thread: made, summed, hashed."""
    buffer = new_buffer(torch.device("cpu"))
    found = dict.fromkeys(("convert", "checksum", "sha256"), 0.0)
    began = time.perf_counter()
    for chunk in chunks(sender.layout.pieces(), lambda: buffer):
        made = time.perf_counter()
        crc32(np.frombuffer(chunk.data, np.uint8))
        summed = time.perf_counter()
        tensor_hash("", "BF16", ()).update(chunk.data)
        found["convert"] += made - began
        found["checksum"] += summed - made
        began = time.perf_counter()
        found["sha256"] += began - summed
    return found


@contextmanager
def targets(world: World, folder: Path, ways: Sequence[str]) -> Iterator[dict[str, Target]]:
    """Each way with folders of its own, and a receiver where one is needed."""
    make_keys(folder / "keys")
    with ExitStack() as stack:
        found: dict[str, Target] = {}
        for way in ways:
            root = folder / way.replace(", ", "-").replace(" ", "-")
            if way == "shared memory":
                found[way] = Here(world, root, keep=1)
                continue
            keys = folder / "keys" if "CURVE" in way else None
            bind = "tcp://127.0.0.1:0" if "tcp" in way else f"ipc://{root}.socket"
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
            found[way] = target
        yield found


def measure(gigabytes: float, rounds: int, ways: Sequence[str]) -> None:
    """One size: a table."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir=SHARED_MEMORY))
    seconds: dict[str, list[float]] = {name: [] for name in (*BASES, *ways)}
    published: dict[str, list[Published]] = {way: [] for way in ways}
    parts: list[dict[str, float]] = []
    try:
        source = make_checkpoint(folder / "source", shape="tiny")
        masters = Masters(source, gigabytes)
        with join_world("cpu") as world, targets(world, folder, ways) as found:
            senders = {
                way: WeightSender(
                    masters,  # type: ignore[arg-type]
                    world,
                    target,
                    source=source,
                    stored=StoredFormat(masters.config, torch.bfloat16),
                    lineage="bench",
                )
                for way, target in found.items()
            }
            num_bytes = senders[ways[0]].layout.num_bytes
            bases: dict[str, Callable[[], float]] = {
                "memcpy": lambda: memcpy_s(num_bytes),
                "new file": lambda: new_file_s(num_bytes, folder),
                "raw socket": lambda: raw_socket_s(num_bytes),
            }
            for number in range(1, rounds + 2):
                for name, base in bases.items():
                    seconds[name].append(base())
                for way, sender in senders.items():
                    one = sender.publish(number)
                    published[way].append(one)
                    seconds[way].append(one.write_s)
                    shutil.rmtree(one.path)
                parts.append(parts_s(next(iter(senders.values()))))
    finally:
        shutil.rmtree(folder)
    show(num_bytes, seconds, published, parts)


def show(
    num_bytes: int,
    seconds: dict[str, list[float]],
    published: dict[str, list[Published]],
    parts: list[dict[str, float]],
) -> None:
    """The first round warms up, and is not counted."""
    size = num_bytes / 1e9
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"\n{size:.2f} GB, {len(parts) - 1} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| | GB/s | / memcpy | / new file | / raw socket | write s | digests s | name s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, took in middle.items():
        row = [name, f"{size / took:.2f}"]
        row += [f"{middle[base] / took:.0%}" for base in BASES]
        if name in published:
            for field in ("write_s", "digest_s", "finish_s"):
                values = [getattr(one, field) for one in published[name][1:]]
                row.append(f"{statistics.median(values):.3f}")
        print(f"| {' | '.join([*row, *['', '', ''][: 8 - len(row)]])} |")
    alone = ", ".join(
        f"{part} {size / statistics.median(one[part] for one in parts[1:]):.2f} GB/s"
        for part in parts[0]
    )
    print(f"\non one thread, alone: {alone}")


def main() -> None:
    parser = argparse.ArgumentParser(description="versions of the weights on their way")
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for gigabytes in args.gb:
        measure(gigabytes, args.rounds, args.only)


if __name__ == "__main__":
    sys.exit(main())
