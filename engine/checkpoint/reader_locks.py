"""Who reads a file of weights that may be written over.

A trainer writes a version over the pages of one that fell out (trainer_bridge/weights/pages.py), and
only in memory (tmpfs). Whoever maps such a file holds a shared lock on it (flock) for as long; the
writer takes the version's name away, and then looks for locks: a file that is read is left to its
readers. A reader locks first and then looks whether the name still means that file. In either order
one of the two sees the other; a process that is killed holds no locks.
"""

import fcntl
import os
from pathlib import Path

from ..errors import CheckpointError

_MOUNTS = Path("/proc/self/mountinfo")


def is_in_memory(file: int) -> bool | None:
    """Whether an open file is on a tmpfs; None where the system does not say."""
    device = os.fstat(file).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        # id, parent, device, root, place, options …, "-", type, source, options (proc(5))
        lines = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return None
    types = {words[words.index("-") + 1] for words in lines if words[2] == number}
    return types == {"tmpfs"}


def lock_for_reading(file: int, path: Path) -> None:
    """Nobody writes over the file while it is open or mapped: the lock is of the open file, and a map
    keeps that open.

    Raises CheckpointError where the file no longer is what `path` means.
    """
    # other files are never written over, and their file systems may have no locks, or slow ones
    if is_in_memory(file) is False:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        is_there = os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:
        raise CheckpointError(
            f"{path} is gone: it was of an old version, whose memory a newer one takes"
        )


def is_read(file: int) -> bool:
    """Whether anybody has locked it for reading. From a name that is taken away before, nobody will."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
