"""A sharded model as a Hugging Face folder, as the engine and its `verify` read them.

One tensor at a time is whole, on every rank; the first rank writes it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ...engine.checkpoint.expected_tensors import TensorSpec, expected_tensors
from ...engine.checkpoint.hub import prepare_target
from ...engine.checkpoint.safetensors_writer import Unit, write_shards
from ...engine.checkpoint.stored_format import StoredFormat
from .optimiser import whole_of
from .sharding import World
from .trainable import TrainableRing

_SLACK_BYTES = 16 << 20


@torch.no_grad()
def export(
    ring: TrainableRing, source: Path, target: Path, dtype: torch.dtype, world: World
) -> None:
    """Write `target`: weights in `dtype`, configuration and tokenizer of `source`. Collective.

    The folder appears whole or not at all. Raises CheckpointError where it cannot be written.
    """
    stored = StoredFormat(ring.config, dtype)
    tensors = dict(ring.tensors())
    units = [_unit(spec, tensors[spec.name], stored) for spec in expected_tensors(ring.config)]
    if not world.is_first:
        for unit in units:
            # the others take part in gathering
            for _ in unit.pieces():
                pass
        world.barrier()
        return
    partial = target.parent / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    prepare_target(partial, sum(unit.num_bytes for unit in units) + _SLACK_BYTES)
    write_shards(partial, units)
    for file, content in stored.companions(source).items():
        (partial / file).write_bytes(content)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    world.barrier()


def _unit(spec: TensorSpec, tensor: torch.Tensor, stored: StoredFormat) -> Unit:
    (part,) = stored.parts(spec)

    def pieces() -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, whole_of(tensor).detach().to("cpu", part.dtype)

    return Unit((part,), pieces)
