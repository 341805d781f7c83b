"""Folders of versions of the weights, found by what is in them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .hub import Progress, ignore_progress
from .manifest import Version, read_manifest

CONFIG = "config.json"


def find_versions(
    roots: Iterable[Path], on_progress: Progress = ignore_progress
) -> dict[str, Version]:
    """By digest. A root is a version's folder, or holds such folders.

    A folder without a manifest is hashed, and is number 0; what a manifest says is checked when it
    is staged.
    Raises CheckpointError, naming the root that holds no version.
    """
    found: dict[str, Version] = {}
    for root in roots:
        for folder in _folders(root):
            manifest = read_manifest(folder)
            if manifest is not None:
                number, digest = manifest.version, manifest.digest
            else:
                number, digest = 0, Checkpoint.open(folder).content_digest(on_progress)
            found[digest] = Version(number=number, digest=digest, folder=str(folder))
    return found


def _folders(root: Path) -> Iterator[Path]:
    if (root / CONFIG).is_file():
        yield root
        return
    below = sorted(root.glob(f"*/{CONFIG}"))
    if not below:
        what = "is no folder" if not root.is_dir() else "holds no version of the weights"
        raise CheckpointError(f"{root} {what}: accepted are a checkpoint folder, or one of such")
    for path in below:
        yield path.parent
