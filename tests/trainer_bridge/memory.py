"""Folders in shared memory, where versions are written over older ones."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from everstep.engine.checkpoint.reader_locks import is_in_memory
from everstep.trainer_bridge.weights.folder import SHARED_MEMORY


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Skips where there is no such memory."""
    if not SHARED_MEMORY.is_dir():
        pytest.skip(f"no {SHARED_MEMORY} here")
    folder = Path(tempfile.mkdtemp(prefix="test-everstep-", dir=SHARED_MEMORY))
    try:
        file = os.open(folder, os.O_RDONLY)
        is_memory = is_in_memory(file)
        os.close(file)
        if not is_memory:
            pytest.skip(f"{SHARED_MEMORY} is no tmpfs")
        yield folder
    finally:
        shutil.rmtree(folder)
