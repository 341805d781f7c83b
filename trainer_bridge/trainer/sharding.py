"""Ranks, and a model spread over them: `fully_shard` (FSDP2), one group of parameters per layer.

A single process is a world of one rank: the same path, without a network.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ...engine.errors import ConfigError, PeerMissing
from .rank_beats import Beats
from .trainable import TrainableRing


@dataclass(frozen=True)
class World:
    """The ranks that train one model. device: of this rank's tensors."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sums(self, *numbers: float) -> list[float]:
        """Over all ranks; every rank must call."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """Over all ranks; every rank must call."""
        return int(self._reduced((number,), dist.ReduceOp.MAX)[0])

    def same(self, text: str) -> str:
        """The first rank's; every rank must call."""
        texts = [text]
        dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
        return texts[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    def _reduced(self, numbers: tuple[float, ...], op: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=op)
        found: list[float] = values.tolist()
        return found


@contextmanager
def join_world(device: str = "auto", timeout_s: float = 600.0) -> Iterator[World]:
    """The world that torchrun made (RANK, WORLD_SIZE, MASTER_ADDR …), else one of one rank.

    Raises ConfigError where CUDA is asked for and there is none. PeerMissing takes the place of what
    torch says where the ranks do not meet, or where a call of all of them fails: it names who is
    gone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("numerics.device is 'cuda', and torch sees no CUDA device here")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    beats = None
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        beats = _meet(backend, timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        size = dist.get_world_size()
        where = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else "cpu"
        yield World(dist.get_rank(), size, torch.device(where), init_device_mesh(kind, (size,)))
    except RuntimeError as error:
        gone = [] if beats is None else beats.missing()
        if not gone and (beats is None or not _is_between_ranks(error)):
            raise
        names = " and ".join(f"rank {rank}" for rank in gone)
        what = f"{names} of {size} {'is' if len(gone) == 1 else 'are'} gone"
        if not gone:
            what = f"all {size} ranks live, and do not answer each other within {timeout_s:.0f} s"
        raise PeerMissing(
            f"{what} ({_first_line(error)}); start all ranks again: they go on from the newest "
            "checkpoint"
        ) from None
    finally:
        if beats is not None:
            beats.close()
        # it may be broken, and is given up either way
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(backend: str, timeout: timedelta) -> Beats:
    """With the ranks that torchrun started. Raises PeerMissing where some do not come."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        dist.init_process_group(backend, timeout=timeout)
        return Beats(host, port, dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        size = os.environ["WORLD_SIZE"]
        raise PeerMissing(
            f"the {size} ranks did not meet at {host}:{port} ({_first_line(error)})"
        ) from None


def _is_between_ranks(error: RuntimeError) -> bool:
    """Whether a call of all ranks failed, and not something of this rank's own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def shard(ring: TrainableRing, world: World, dtype: torch.dtype) -> None:
    """Spread a model made on "meta" over the ranks; its memory is there, and not filled.

    dtype  in which parameters are gathered and used; the shards stay float32, gradients are
           summed in float32

    One rank that uses float32 has nothing to gather or to cast: its parameters are plain tensors.
    """
    if world.size == 1 and dtype == torch.float32:
        ring.to_empty(device=world.device)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        # it would round a batch's temperatures too
        cast_forward_inputs=False,
    )
    for layer in ring.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(ring, mesh=world.mesh, mp_policy=policy)
    ring.to_empty(device=world.device)


def reshard(ring: TrainableRing) -> None:
    """Drop what is gathered of a sharded model, so that the next pass gathers the shards anew."""
    if isinstance(ring, FSDPModule):
        ring.reshard()
