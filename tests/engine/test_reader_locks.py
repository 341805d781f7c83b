"""Files of weights are locked as long as they are read, and no longer."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.reader_locks import is_in_memory, is_read
from everstep.engine.config import ModelConfig
from everstep.engine.errors import CheckpointError
from everstep.engine.messages import Refused, Stage, Staged
from everstep.engine.model.weights import load_weights
from tests.trainer_bridge.memory import memory_folder

from .flips import FlippingCore, make_versions


@pytest.fixture
def root() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def is_locked(folder: Path) -> bool:
    file = os.open(folder / "model.safetensors", os.O_RDWR)
    try:
        return is_read(file)
    finally:
        os.close(file)


@pytest.mark.parametrize("format", ["bf16", "f32", "fp8-block", "fp8-channel"])
def test_a_checkpoint_is_locked_while_it_is_read(format: str, root: Path) -> None:
    folder = make_checkpoint(root / "v1", format=format)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(folder)
    weights = load_weights(checkpoint, ModelConfig(), version=1, on_progress=lambda *_: None)
    assert is_locked(folder)
    checkpoint.close()
    # what serves has nothing of the file
    assert not is_locked(folder)
    assert weights.version == 1


def test_a_tensor_that_aliases_the_map_keeps_the_lock(root: Path) -> None:
    folder = make_checkpoint(root / "v1")
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.tensor(checkpoint.names[0])
    checkpoint.close()
    assert is_locked(folder)
    del tensor
    assert not is_locked(folder)


def test_a_version_that_is_written_over_is_not_read(root: Path) -> None:
    folder = make_checkpoint(root / "v1")
    checkpoint = Checkpoint.open(folder)
    folder.rename(root / "other")
    with pytest.raises(CheckpointError, match=r"v1/model.safetensors.* cannot be read: .*No such"):
        checkpoint.tensor(checkpoint.names[0])


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_version_is_locked_while_it_is_staged(is_refused: bool, root: Path) -> None:
    """And not while it waits for its flip, or was refused."""
    core = FlippingCore(folders := make_versions(root, 2))
    core.take(core.core.handle(Stage(1, str(folders[1]))))
    swap, locked = core.core._swap, False
    assert swap is not None
    if is_refused:
        with (folders[1] / "model.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\1\2")
    while not any(isinstance(message, Staged | Refused) for message in core.told):
        swap.nothing_to_run()
        core.take(swap.work())
        locked |= is_locked(folders[1])
    assert any(isinstance(message, Refused) for message in core.told) == is_refused
    assert locked
    assert not is_locked(folders[1])


def test_what_is_on_a_disk_is_not_locked(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    is_disk = is_in_memory(file) is False
    os.close(file)
    if not is_disk:
        pytest.skip("the folder of the tests is in memory")
    folder = make_checkpoint(tmp_path / "v1")
    checkpoint = Checkpoint.open(folder)
    checkpoint.tensor(checkpoint.names[0])
    assert not is_locked(folder)
