"""Where a model folder comes from: a path, the hub, or the embedded default. Torch-free.

A word on the command line becomes a folder here; `Checkpoint.open` then reads it.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""(stage, done, total); in bytes, files or tensors, as the stage says."""

DEFAULT = "default"
_DEFAULT_FOLDER = "default-smollm2-135m-ring-1"
_ACCEPTED = f'accepted: "{DEFAULT}", a model folder, or a hub id "organisation/name"'
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def ignore_progress(stage: str, done: int, total: int) -> None:
    """A Progress for callers that show none."""


def resolve(path_or_id: str, on_progress: Progress = ignore_progress) -> Path:
    """The folder of a model, made or fetched where necessary.

    "default"  the embedded default, converted on first use into the user's cache
    a folder   itself
    org/name   a snapshot from the Hugging Face hub (HF_HOME, HF_HUB_OFFLINE hold)

    Raises CheckpointError, in one line, for everything else and for every failure on the way.
    """
    if path_or_id == DEFAULT:
        return default_folder(on_progress)
    path = Path(path_or_id).expanduser()
    try:
        is_folder, is_model = path.is_dir(), (path / "config.json").is_file()
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_ACCEPTED}") from error
    if is_folder:
        if not is_model:
            raise CheckpointError(f"{path} is not a model folder: it has no config.json")
        return path
    if exists:
        kind = "a GGUF file" if path.suffix.lower() == ".gguf" else "a file"
        raise CheckpointError(f"{path} is {kind}, not a model folder; {_ACCEPTED}")
    if _HUB_ID.fullmatch(path_or_id) and not path_or_id.startswith("."):
        return _snapshot(path_or_id)
    raise CheckpointError(f"no model at {path_or_id!r}; {_ACCEPTED}")


def cache_folder() -> Path:
    """EVERSTEP_CACHE, else XDG_CACHE_HOME/everstep, else ~/.cache/everstep."""
    if own := os.environ.get("EVERSTEP_CACHE"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "everstep"


def default_folder(on_progress: Progress = ignore_progress) -> Path:
    """The embedded default (DESIGN.md §8), converted if the cache has none.

    Safe when processes race: each converts into a folder of its own and the first rename wins.
    """
    target = cache_folder() / _DEFAULT_FOLDER
    if (target / "config.json").is_file():
        return target
    # the conversion needs torch, gguf and tokenizers; a cached default needs none of them
    from .convert import convert_default

    with scratch_folder(target.parent) as scratch:
        made = scratch / target.name
        convert_default(made, on_progress=on_progress)
        try:
            made.rename(target)
        except OSError as error:
            if not (target / "config.json").is_file():
                raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error
    return target


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder beside the final place, so that a rename is atomic; removed at the end."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise CheckpointError(
            f"{parent} cannot be written: {error.strerror}; EVERSTEP_CACHE names another folder"
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepare_target(folder: Path, needed_bytes: int) -> None:
    """Make the folder that a checkpoint is to be written to.

    Raises CheckpointError if it holds anything, cannot be written, or its disk is too small.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not an empty folder")
        free = shutil.disk_usage(_existing_parent(folder)).free
        if free < needed_bytes:
            raise CheckpointError(
                f"{folder}: the checkpoint needs {needed_bytes / 1e9:.3f} GB of disk, "
                f"{free / 1e9:.3f} GB are free"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written: permission denied")


@contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[None]:
    """`prepare_target`, then leave the folder empty again if the block fails, so it can be retried.

    An OSError of the block (a disk that fills up) becomes a CheckpointError.
    """
    prepare_target(folder, needed_bytes)
    try:
        yield
    except BaseException as error:
        for path in folder.iterdir():
            path.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(f"{folder} cannot be written: {reason}") from error
        raise


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _snapshot(model_id: str) -> Path:
    """Download (or find in its cache) a hub snapshot; one line for each way it can fail."""
    # a slow import that only hub ids need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        reason = "the hub does not show it (wrong name, or HF_TOKEN is needed)"
        raise CheckpointError(f"{model_id}: {reason}; {_ACCEPTED}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "not in the hub's cache, and the hub cannot be reached (offline)"
        raise CheckpointError(f"{model_id}: {reason}; {_ACCEPTED}") from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{model_id}: the hub answered: {line}; {_ACCEPTED}") from error
