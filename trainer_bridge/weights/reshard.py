"""Who writes which bytes: from tensors spread over ranks to one file, as a plan made once.

Pure arithmetic over shapes. A rank holds a block of a tensor (an offset and a shape); the file holds
every tensor whole, row after row. A block becomes runs of consecutive elements. Every byte is
written once: of ranks that hold the same block, the one with least to do writes it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from ...engine.errors import BridgeError

Shape = tuple[int, ...]


class Block(NamedTuple):
    """What a rank holds of a tensor; an empty one has a 0 in its shape."""

    offset: Shape
    shape: Shape

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Run(NamedTuple):
    """`size` elements: from `source` of the rank's block on, to `target` of the whole tensor."""

    source: int
    target: int
    size: int


class Share(NamedTuple):
    """What a rank writes of a tensor."""

    name: str
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return sum(run.size for run in self.runs)


Plan = list[list[Share]]
"""By rank."""


def runs_of(block: Block, whole: Shape) -> Iterator[Run]:
    """The block as runs of consecutive elements of the whole tensor, in order."""
    if block.size == 0:
        return
    # trailing dimensions that are all there are consecutive, and so is the one before them
    first = len(whole)
    while first > 0 and block.shape[first - 1] == whole[first - 1]:
        first -= 1
    first = max(0, first - 1)
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    size = math.prod(block.shape[first:])
    base = sum(o * s for o, s in zip(block.offset, strides, strict=True))
    for number, index in enumerate(product(*(range(n) for n in block.shape[:first]))):
        target = base + sum(i * s for i, s in zip(index, strides, strict=False))
        yield Run(number * size, target, size)


def plan(
    shapes: Mapping[str, Shape], itemsizes: Mapping[str, int], blocks: Sequence[Mapping[str, Block]]
) -> Plan:
    """The plan for these tensors.

    shapes, itemsizes  of the whole tensors as stored
    blocks             what each rank holds, by tensor
    Raises BridgeError naming the tensor of which an element is nowhere, or in blocks that overlap.
    """
    shares: Plan = [[] for _ in blocks]
    loads = [0] * len(blocks)
    for name, whole in shapes.items():
        holders: dict[Block, list[int]] = {}
        for rank, held in enumerate(blocks):
            block = held.get(name)
            if block is not None and block.size:
                holders.setdefault(block, []).append(rank)
        found: list[Run] = []
        for block, ranks in sorted(holders.items()):
            rank = min(ranks, key=lambda r: (loads[r], r))
            runs = tuple(runs_of(block, whole))
            found += runs
            shares[rank].append(Share(name, runs))
            loads[rank] += block.size * itemsizes[name]
        _check(name, whole, found)
    return shares


def _check(name: str, whole: Shape, runs: Sequence[Run]) -> None:
    """Every element once."""
    end = 0
    for run in sorted(runs, key=lambda run: run.target):
        if run.target != end:
            what = "is held by no rank" if run.target > end else "is in blocks that overlap"
            raise BridgeError(f"{name}: element {min(run.target, end)} {what}")
        end += run.size
    if end != math.prod(whole):
        raise BridgeError(f"{name}: element {end} is held by no rank")


def rows_of(whole: Shape, rank: int, world: int) -> Block:
    """What FSDP2 gives a rank: rows in chunks of ⌈rows / world⌉, the last ones maybe empty."""
    if not whole:
        return Block((), ()) if rank == 0 else Block((0,), (0,))
    chunk = -(-whole[0] // world)
    start = min(rank * chunk, whole[0])
    size = min(chunk, whole[0] - start)
    return Block((start, *(0 for _ in whole[1:])), (size, *whole[1:]))


def explain(made: Plan, itemsizes: Mapping[str, int]) -> str:
    """Who writes what, a line per rank and tensor."""
    total = sum(s.size * itemsizes[s.name] for shares in made for s in shares)
    lines = [f"{total} bytes in all, each written once"]
    for rank, shares in enumerate(made):
        num_bytes = sum(share.size * itemsizes[share.name] for share in shares)
        lines.append(f"rank {rank}: {num_bytes} bytes of {len(shares)} tensors")
        for share in shares:
            first, last = share.runs[0], share.runs[-1]
            span = f"elements {first.target}..{last.target + last.size - 1}"
            runs = "" if len(share.runs) == 1 else f" in {len(share.runs)} runs"
            lines.append(
                f"  {share.name}: {share.size * itemsizes[share.name]} bytes, {span}{runs}"
            )
    return "\n".join(lines)
