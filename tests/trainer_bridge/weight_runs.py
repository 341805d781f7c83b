"""Small models whose weights are sent, and folders to compare."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from everstep.engine.checkpoint.fp8_policy import Fp8Format
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.trainer_bridge.run.folders import sizes_of
from everstep.trainer_bridge.trainer.sharding import World, join_world, shard
from everstep.trainer_bridge.trainer.trainable import TrainableRing, trainable_config
from everstep.trainer_bridge.weights.receiver import WeightReceiver, receiving
from everstep.trainer_bridge.weights.sender import WeightSender
from everstep.trainer_bridge.weights.targets import Elsewhere, Here, Target

from .training_runs import free_port

Bytes = dict[str, bytes]


def start_ranks(
    work: Callable[..., None], world: int, *arguments: Any, join: bool = True
) -> mp.ProcessContext | None:
    """`work(rank, world, port, *arguments)` in forked processes: torch is loaded once."""
    # what is left of worlds of this process must not be: a fork that frees them waits for threads
    # that it does not have
    gc.collect()
    return mp.start_processes(
        work, (world, free_port(), *arguments), nprocs=world, join=join, start_method="fork"
    )  # type: ignore[no-untyped-call]


def ring_of(source: Path, world: World) -> TrainableRing:
    ring = TrainableRing(trainable_config(source), device="meta")
    shard(ring, world, torch.float32)
    ring.load(source)
    return ring


def change(ring: TrainableRing) -> None:
    """As a step of training would."""
    with torch.no_grad():
        for _, tensor in ring.tensors():
            tensor.mul_(1.01)


def sender_of(
    ring: TrainableRing, world: World, target: Target, source: Path, fp8: Fp8Format | None = None
) -> WeightSender:
    stored = StoredFormat(ring.config, torch.bfloat16, fp8)
    return WeightSender(ring, world, target, source=source, stored=stored, lineage="a")


@contextmanager
def taking(root: Path, **options: Any) -> Iterator[str]:
    """A receiver on a thread of this process; its address."""
    options = {"run": "run", "endpoint": "tcp://127.0.0.1:0", "heartbeat_s": 0.2} | options
    with receiving(WeightReceiver(root, **options)) as endpoint:
        yield endpoint


@contextmanager
def sending(
    source: Path, endpoints: Sequence[str], here: Path | None = None, **options: Any
) -> Iterator[tuple[WeightSender, WeightSender | None]]:
    """A world of one rank: what publishes to receivers, and what publishes here."""
    options = {"run": "run", "lineage": "a", "deadline_s": 10.0} | options
    with join_world("cpu") as world, ExitStack() as stack:
        ring = ring_of(source, world)
        sender = sender_of(ring, world, Elsewhere(world, endpoints, **options), source)
        stack.callback(sender.close)
        beside = None
        if here is not None:
            beside = sender_of(ring, world, Here(world, here), source)
        yield sender, beside


def files_of(folder: Path) -> Bytes:
    """Everything in it, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names_of(root: Path) -> list[str]:
    """Versions there, half-written ones too."""
    return list(sizes_of(root))
