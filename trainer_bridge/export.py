"""A sharded model as a Hugging Face folder, as the engine and its `verify` read them.

One tensor at a time is whole, on every rank; the first rank writes it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..engine.hub import prepare_target
from ..engine.json_keys import read_json, write_json
from ..engine.safetensors_writer import Part, Unit, write_shards
from .optimiser import whole_of
from .sharding import World
from .trainable import TrainableRing

_SLACK_BYTES = 16 << 20
# written anew, or of another version of the weights
_NOT_COPIED = (".safetensors", ".py", ".bin", ".gguf")
_WRITTEN = ("config.json", "model.safetensors.index.json", "manifest.json")


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In what a tensor is stored in a checkpoint of `dtype`: the router's bias is float32."""
    return torch.float32 if name.endswith("expert_bias") else dtype


@torch.no_grad()
def export(
    ring: TrainableRing, source: Path, target: Path, dtype: torch.dtype, world: World
) -> None:
    """Write `target`: weights in `dtype`, configuration and tokenizer of `source`. Collective.

    The folder appears whole or not at all. Raises CheckpointError where it cannot be written.
    """
    units = [_unit(name, tensor, dtype) for name, tensor in ring.tensors()]
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
    copy_companions(source, partial, dtype)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    world.barrier()


def copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """What a checkpoint has beside its tensors: tokenizer, templates, and config.json last."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _NOT_COPIED and file.name not in _WRITTEN:
            shutil.copyfile(file, target / file.name)
    write_json(target / "config.json", _config(read_json(source / "config.json"), dtype))


def _unit(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Unit:
    stored = stored_dtype(name, dtype)

    def pieces() -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, whole_of(tensor).detach().to("cpu", stored)

    return Unit((Part(name, stored, tuple(tensor.shape)),), pieces)


def _config(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of what was trained: its dtype, no MTP layers (they were not trained)."""
    data = dict(data)
    data.pop("dtype", None)
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    data["num_nextn_predict_layers"] = 0
    return data
