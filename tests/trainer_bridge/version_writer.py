"""Versions of one tensor, made without torch; as a program, a trainer of two ranks that publishes until
its first one is killed.

python -m tests.trainer_bridge.version_writer ROOT FIRST KEEP SIZE
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everstep.engine.checkpoint.manifest import (
    Manifest,
    combine_digests,
    read_manifest,
    tensor_hash,
)
from everstep.engine.errors import CheckpointError
from everstep.trainer_bridge.weights.folder import Span, VersionFolder, stored_tensors
from everstep.trainer_bridge.weights.pages import FILE, Pages

STEP = 5000  # bytes that are written at once: no multiple of a page
PAUSE_S = 0.0002  # between two of them: a kill finds both ranks in the middle


def head_of(size: int) -> bytes:
    text = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}})
    text += " " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text.encode()


def values_of(seed: int, size: int) -> bytes:
    """No byte is that of another seed."""
    return ((np.arange(size) * 7 + seed) % 251).astype(np.uint8).tobytes()


def begin(pages: Pages, version: int, size: int) -> VersionFolder:
    folder = VersionFolder(pages, version)
    head = head_of(size)
    folder.begin(head, len(head) + size, {"config.json": b"{}"})
    return folder


def fill(
    ranks: Sequence[VersionFolder | None], seed: int, size: int, *, pause_s: float = 0.0
) -> None:
    """The ranks take turns; what is another process's is None."""
    start, values = len(head_of(size)), memoryview(values_of(seed, size))
    for number, offset in enumerate(range(0, size, STEP)):
        part = values[offset : offset + STEP]
        if (folder := ranks[number % len(ranks)]) is not None:
            folder.write([Span(start + offset, len(part))], part)
            time.sleep(pause_s)


def finish(folder: VersionFolder, version: int, size: int, keep: int) -> Path:
    records = folder.records(stored_tensors(head_of(size)), 2)
    digest = combine_digests({name: record.digest for name, record in records.items()})
    folder.finish(Manifest(version=version, digest=digest, tensors=records), keep)
    return folder.path


def publish(pages: Pages, version: int, seed: int, size: int, keep: int) -> Path:
    folder = begin(pages, version, size)
    fill([folder], seed, size)
    return finish(folder, version, size, keep)


def check_whole(folder: Path, data: bytes | None = None) -> None:
    """What it says of itself is so. Raises FileNotFoundError where it goes meanwhile."""
    (folder / "config.json").stat()
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(folder)
    assert folder.name == f"v{manifest.version}"
    check_bytes(manifest, (folder / FILE).read_bytes() if data is None else data)


def check_bytes(manifest: Manifest, data: bytes) -> None:
    """Those of that version."""
    [(name, record)] = manifest.tensors.items()
    hashing: hashlib._Hash = tensor_hash(name, record.dtype, record.shape)
    hashing.update(data[len(data) - record.shape[0] :])
    assert hashing.hexdigest() == record.digest


def main() -> None:
    root, (first, keep, size) = Path(sys.argv[1]), map(int, sys.argv[2:])
    here, there = socket.socketpair()
    if os.fork() == 0:
        here.close()
        second_rank(root, there, size)
        os._exit(0)
    there.close()
    pages = Pages(root)
    for version in itertools.count(first):
        folder = begin(pages, version, size)
        here.send(struct.pack("<q", version))
        fill([folder, None], version, size, pause_s=PAUSE_S)
        assert here.recv(1)
        assert finish(folder, version, size, keep)
        sys.stdout.write(f"{version}\n")
        sys.stdout.flush()


def second_rank(root: Path, first: socket.socket, size: int) -> None:
    """Ends when the first one is gone, after what it has to write."""
    pages = Pages(root)
    while order := first.recv(8):
        [version] = struct.unpack("<q", order)
        # the folder may be gone with the first rank
        with contextlib.suppress(CheckpointError, BrokenPipeError):
            fill([None, VersionFolder(pages, version)], version, size, pause_s=PAUSE_S)
            first.send(b"\0")


if __name__ == "__main__":
    main()
