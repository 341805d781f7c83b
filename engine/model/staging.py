"""The next weights, made beside those that serve: read, checked and scored a piece at a time.

    layout     manifest and headers: names, types, shapes
    digests    every tensor against the manifest; values that are not finite
    read       into the form that the kernels multiply, as any checkpoint is read
    canaries   the manifest's sequences, scored in what was read

What a piece touches is bounded (kernels/pieces.py), so that a step never waits for long
(engine/core/swap.py).
"""

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ...kernels import PackedWeight, Pieces
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import (
    Manifest,
    check_digest,
    check_layout,
    combine_digests,
    read_manifest,
)
from ..checkpoint.safetensors_header import DTYPES
from ..config import ModelConfig
from ..core.swap import Part
from ..errors import CheckpointError, WeightsRefused
from ..messages import Stage, StageReport
from .canaries import Comparison, scoring
from .runner import ModelRunner
from .step import ForwardPass
from .weights import Part as WeightPart
from .weights import WeightReader, Weights

T = TypeVar("T")
# of the memory that is free: what the estimate leaves to everybody else
SPARE_BYTES = 64 << 20
# of old weights, given back at once
FREE_BYTES = 16 << 20


@dataclass(frozen=True)
class Loaded:
    """Weights that passed, and the forward pass over the runner's KV that runs them."""

    weights: Weights
    forward: ForwardPass

    @property
    def digest(self) -> str:
        return self.weights.digest


class WeightStager:
    """`swap.Stager` over a model runner.

    free_bytes  how much memory can be had now
    """

    def __init__(
        self, runner: ModelRunner, config: ModelConfig, *, free_bytes: Callable[[], int]
    ) -> None:
        self._runner = runner
        self._config = config
        self._free_bytes = free_bytes
        self._made: list[WeightPart] = []
        """What is staged, or was until it was refused."""

    def stage(self, order: Stage) -> Generator[Part, None, tuple[Loaded, StageReport]]:
        folder = Path(order.path)
        manifest = self._manifest(order, folder)
        checkpoint = yield from _told(Checkpoint.opening(folder), lambda: ("layout", 0, 1))
        # from here on the file is locked, and only as long as it is read
        with closing(checkpoint):
            if manifest is not None:
                found = {name: (e.dtype, e.shape) for name, e in checkpoint.entries.items()}
                check_layout(manifest, found, folder)
            reader = self._reader(checkpoint)
            self._made = reader.made
            yield "layout", 1, 1
            num_bytes = self._check_room(checkpoint, reader)
            digest = yield from _digests(checkpoint, manifest)
            if order.digest and digest != order.digest:
                raise WeightsRefused(
                    f"{folder}: digest {digest[:12]}, version {order.version} has {order.digest[:12]}"
                )
            read = yield from _read(reader, order.version)
        weights = replace(read, digest=digest, config=self._runner.weights.config)
        comparison = Comparison(weights, self._runner.numerics)
        if manifest is not None:
            yield from self._score(weights, manifest, comparison)
        loaded = Loaded(weights, self._runner.forward_of(weights))
        return loaded, StageReport(
            num_bytes=num_bytes,
            seconds=0.0,
            busy_seconds=0.0,
            slices=0,
            longest_slice_s=0.0,
            canary_tokens=comparison.num_tokens,
            max_delta=comparison.max_delta,
            mean_delta=comparison.mean_delta,
            max_bound=comparison.bounds.max_delta,
            mean_bound=comparison.bounds.mean_delta,
            experts_reached=comparison.experts_reached if comparison.num_tokens else None,
        )

    def flip(self, prepared: Loaded) -> Generator[None, None, None]:
        old, self._made = list(self._runner.weights.parts), []
        self._runner.flip(prepared.weights, prepared.forward)
        return _give_back(old)

    def discard(self) -> Generator[None, None, None]:
        made, self._made = self._made, []
        return _give_back(made)

    def _manifest(self, order: Stage, folder: Path) -> Manifest | None:
        manifest = read_manifest(folder)
        if manifest is None:
            if not order.digest:
                raise CheckpointError(
                    f"{folder} has no manifest.json: it is not a version of the weights"
                )
        elif manifest.version != order.version:
            raise WeightsRefused(
                f"{folder}: manifest.json says version {manifest.version}, asked for is "
                f"{order.version}"
            )
        return manifest

    def _reader(self, checkpoint: Checkpoint) -> WeightReader:
        """Raises WeightsRefused unless it is of the very model that is served."""
        live = self._runner.weights
        for name in live.config.__struct_fields__:
            here, there = getattr(live.config, name), getattr(checkpoint.config, name)
            # in which type it is run is compared below
            if here != there and name not in ("defaults_used", "dtype"):
                raise WeightsRefused(
                    f"{checkpoint.folder}: config.json: {name} is {there!r}, the model that is "
                    f"served has {here!r}: another model needs another server"
                )
        reader = WeightReader(checkpoint, self._config)
        if (reader.dtype, reader.formats) != (live.dtype, live.formats):
            raise WeightsRefused(
                f"{checkpoint.folder}: {reader.formats} in {reader.dtype}, served is "
                f"{live.formats} in {live.dtype}"
            )
        return reader

    def _check_room(self, checkpoint: Checkpoint, reader: WeightReader) -> int:
        """Raise WeightsRefused unless the weights fit beside those that serve."""
        needed = reader.num_bytes + SPARE_BYTES
        free = self._free_bytes()
        if needed > free:
            raise WeightsRefused(
                f"{checkpoint.folder}: to stage it takes {needed / 1e9:.2f} GB beside the weights "
                f"that serve, {free / 1e9:.2f} GB are free: give the machine more memory, or the "
                "KV cache less (kv.memory_bytes)"
            )
        entries = checkpoint.entries.values()
        return sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries)

    def _score(
        self, weights: Weights, manifest: Manifest, comparison: Comparison
    ) -> Generator[Part, None, None]:
        count = len(manifest.canaries)
        for index, canary in enumerate(manifest.canaries):
            fault = comparison.check(canary)
            if fault is None and len(canary.ids) > len(self._runner.tables[0]):
                fault = f"{len(canary.ids)} tokens, the context holds {len(self._runner.tables[0])}"
            if fault is not None:
                raise WeightsRefused(f"version {manifest.version}: canaries[{index}]: {fault}")
            pieces = scoring(weights, canary.ids, canary.num_prompt, self._runner.tables)
            score = yield from _told(pieces, partial(_part, "canaries", index, count))
            comparison.add(canary, score)
        comparison.judge(manifest.version)


def _digests(checkpoint: Checkpoint, manifest: Manifest | None) -> Generator[Part, None, str]:
    digests: dict[str, str] = {}
    count = len(checkpoint.names)
    for name in checkpoint.names:
        pieces = checkpoint.verifying(name)
        digests[name] = yield from _told(pieces, lambda: ("digests", len(digests), count))
        if manifest is not None:
            check_digest(manifest, name, digests[name], checkpoint.folder)
    return combine_digests(digests)


def _read(reader: WeightReader, version: int) -> Generator[Part, None, Weights]:
    count = reader.config.num_hidden_layers
    begun: list[int] = []
    pieces = reader.reading(version=version, on_layer=begun.append)
    return (yield from _told(pieces, lambda: ("read", len(begun) - 1, count)))


def _part(name: str, done: int, total: int) -> Part:
    return name, done, total


def _told(pieces: Pieces[T], part: Callable[[], Part]) -> Generator[Part, None, T]:
    """The pieces, each of which says where it stands."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            result: T = stop.value
            return result
        yield part()


def _give_back(parts: list[WeightPart]) -> Generator[None, None, None]:
    """To unmap gigabytes at once would hold up a step. What was allocated last goes first: a heap
    gives its upper end back to the system, and else would give back all of it at the last part."""
    freed = 0
    while parts:
        part = parts.pop()
        freed += part.num_bytes if isinstance(part, PackedWeight) else part.nbytes
        if freed >= FREE_BYTES:
            freed = 0
            yield
