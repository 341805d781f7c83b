"""Checkpoints that a run goes on from, to the bit: every rank writes its shards, one rename commits.

    checkpoints/00000020/   tensors (torch.distributed.checkpoint), and STABLE
    checkpoints/.partial-…  being written or removed, or left by a kill; never read

A checkpoint without the file STABLE is none. It is written last, after the tensors are on the disk.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct, field
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ...engine.errors import CheckpointError
from ...engine.journal.files import sync_folder
from ..losses.alarms import AlarmState
from .sharding import World

STABLE = "STABLE"
FORMAT = 1


class TrainerState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint holds beside tensors.

    version      iterations that were trained, which numbers the weights
    num_updates  that the optimiser has made
    held         weights that are in it too: versions for the old policy `exact`, the reference
    digests      version → digest of what was published, of those that can be held
    alarms       what was seen and raised
    settings     of the run: path → value in JSON; empty in a checkpoint that does not say
    """

    format: int = FORMAT
    version: int
    num_updates: int
    held: tuple[str, ...] = ()
    digests: dict[int, str] = {}
    alarms: AlarmState = field(default_factory=AlarmState)
    settings: dict[str, str] = {}


class Checkpoints:
    """The checkpoints of a run in one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def stable(self) -> list[Path]:
        """Those that are complete, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(path for path in found if (path / STABLE).is_file())

    def oldest(self) -> int:
        """The least version that the run may go on from one day: 0, with which it began, until as
        many checkpoints as stay are there."""
        found = self.stable()
        return int(found[0].name) if len(found) >= self._keep else 0

    def save(self, tensors: Mapping[str, torch.Tensor], state: TrainerState, world: World) -> Path:
        """Write one and drop those that are too old; returns its folder. Every rank must call.

        Raises CheckpointError where a rank cannot write; those before it are as they were.
        """
        final = self.folder / f"{state.version:08}"
        partial = self.folder / f".partial-{final.name}"
        if world.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob(".partial-*"), final):
                shutil.rmtree(left, ignore_errors=True)
        world.barrier()
        try:
            save(dict(tensors), checkpoint_id=partial)
        except CheckpointException as error:
            # every rank is told of it by the others
            if world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final} cannot be written: {_why(error)}; those before it are whole"
            ) from None
        world.barrier()
        if world.is_first:
            _write(partial / STABLE, msgspec.json.encode(state))
            partial.rename(final)
            sync_folder(final)
            for old in self.stable()[: -self._keep]:
                # a kill on the way leaves what the next one removes, and no half of a checkpoint
                shutil.rmtree(old.rename(old.with_name(f".partial-{old.name}")))
        world.barrier()
        return final


def read_state(folder: Path) -> TrainerState:
    """Raises CheckpointError for a folder that is no complete checkpoint of this format."""
    try:
        state = msgspec.json.decode((folder / STABLE).read_bytes(), type=TrainerState)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint of a trainer: {error}") from None
    if state.format != FORMAT:
        raise CheckpointError(
            f"{folder / STABLE}: format {state.format}; this version reads {FORMAT}"
        )
    return state


def read_tensors(folder: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Fill `into` with what was saved by the same names, each rank its own shards.

    Raises CheckpointError where names or shapes are not those of the checkpoint.
    """
    tensors: dict[str, Any] = dict(into)
    try:
        load(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not fit this model: {_why(error)}") from None


def _why(error: CheckpointException) -> str:
    """What the first rank that failed says, in one line."""
    first = next(iter(error.failures.values()))[0]
    if isinstance(first, OSError) and first.strerror:
        return first.strerror
    return " ".join(str(first).split())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)
