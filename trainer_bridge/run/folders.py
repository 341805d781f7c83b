"""The folders in which runs keep versions of their weights: what is there, and what may go.

A version stays as long as an engine serves it or may start with it again. So a trainer removes
versions at the end of its run only, when the engines have said what they need, and what a killed
one left is for the same run to go on with.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ...engine.errors import ConfigError
from ..weights.folder import SHARED_MEMORY, VERSION_NAME, default_root

_LOCK = "lock"


def hold(root: Path, settings: str) -> BinaryIO:
    """Nobody else writes versions there until this file is closed, or the process has ended.

    settings  what the user may change

    Raises ConfigError where somebody else does, or where it cannot be.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / _LOCK).open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{root} holds the versions of a trainer that runs now; give this one another {settings}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{root} cannot be written: {error.strerror}") from None
    return file


def runs_there(memory: Path = SHARED_MEMORY) -> list[Path]:
    """The folders of runs in shared memory that hold versions."""
    found = memory.glob(default_root("*").name) if memory.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and sizes_of(path))


def sizes_of(root: Path) -> dict[str, int]:
    """Versions in the folder of a run, half-written ones too → bytes."""
    found: dict[str, int] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if VERSION_NAME.fullmatch(folder.name):
            # a trainer may be taking it away just now
            with contextlib.suppress(OSError):
                found[folder.name] = sum(file.stat().st_size for file in folder.iterdir())
    return found


def remove_versions(root: Path, needed: Sequence[str]) -> None:
    """All but those whose folders are needed; the folder of the run too, where it is empty then."""
    for name in sizes_of(root):
        if str(root / name) not in needed:
            shutil.rmtree(root / name, ignore_errors=True)
    if not sizes_of(root):
        with contextlib.suppress(OSError):
            (root / _LOCK).unlink(missing_ok=True)
            root.rmdir()
