"""Complete groups on disk until the trainer holds them durably: a `GroupSource` in a folder.

A file per iteration, written whole and synced before it has its name: a kill leaves an iteration
that is there or one that is not. Groups are read when they are sent; memory holds where they are.
Beside them stands which version the engines of the run serve: for those that come back with another.
"""

import asyncio
import contextlib
import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from ...engine.errors import BridgeError
from ...engine.journal.files import sync_folder
from ..protocol import TrajectoryGroup, encode

_NAME = re.compile(r"iteration-(\d+)\.groups")
_LENGTH = struct.Struct("<Q")
_decoder = msgspec.msgpack.Decoder(TrajectoryGroup)


class _Index(Struct, frozen=True):
    """Head of a file: per group its output tokens and its bytes."""

    tokens: list[int]
    sizes: list[int]


_index_decoder = msgspec.msgpack.Decoder(_Index)
_SERVING = "serving.json"


class Serving(Struct, frozen=True):
    """The version that all engines of the run are to serve. lineage: of the trainer that made it."""

    version: int
    digest: str
    path: str
    lineage: str


class Spool:
    """The iterations of one run that a trainer may still ask for, and what its engines serve."""

    def __init__(self, folder: Path) -> None:
        """Opens what is there. Raises BridgeError naming a file that is not what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._indexes: dict[int, tuple[_Index, int]] = {}
        self._released = -1
        self.serving = _read_serving(folder / _SERVING)
        for file in sorted(folder.iterdir()):
            found = _NAME.fullmatch(file.name)
            if found:
                self._indexes[int(found[1])] = _read_index(file)
            elif file.suffix == ".partial":
                file.unlink()

    @property
    def iterations(self) -> list[int]:
        """Those that are kept, in order."""
        return sorted(self._indexes)

    def add(self, iteration: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Keep an iteration; durable on return. Idempotent. Those before it are over."""
        if iteration in self._indexes:
            return
        frames = [encode(group) for group in groups]
        index = _Index([group.num_tokens for group in groups], list(map(len, frames)))
        head = encode(index)
        _write(self._file(iteration), [_LENGTH.pack(len(head)) + head, *frames])
        self._indexes[iteration] = index, _LENGTH.size + len(head)
        self._drop_released()

    def serve(self, serving: Serving) -> None:
        """Note what the engines serve from now on; durable on return."""
        _write(self._folder / _SERVING, [msgspec.json.encode(serving)])
        self.serving = serving

    def sizes(self, iteration: int) -> Sequence[int]:
        return self._indexes[iteration][0].tokens

    async def load(self, iteration: int, index: int) -> TrajectoryGroup:
        return await asyncio.to_thread(self.read, iteration, index)

    def read(self, iteration: int, index: int) -> TrajectoryGroup:
        """One group. Raises BridgeError where the file is not what was written."""
        head, start = self._indexes[iteration]
        with self._file(iteration).open("rb") as file:
            file.seek(start + sum(head.sizes[:index]))
            data = file.read(head.sizes[index])
        try:
            return _decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise BridgeError(f"{self._file(iteration)}: group {index}: {error}") from None

    async def release(self, through: int) -> None:
        """No trainer asks for what came up to this iteration any more.

        The newest stays all the same until there is another: an engine that is killed before it has
        noted what came of it begins with it again.
        """
        self._released = max(self._released, through)
        await asyncio.to_thread(self._drop_released)

    def remove(self) -> None:
        """The run is over: nothing of it is kept, unless something was not released."""
        self._drop([i for i in self._indexes if i <= self._released])
        if not self._indexes:
            (self._folder / _SERVING).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _drop_released(self) -> None:
        # from several threads: a list of the keys is made at once
        known = list(self._indexes)
        self._drop(i for i in known if i <= self._released and i != max(known))

    def _drop(self, iterations: Iterable[int]) -> None:
        for iteration in iterations:
            self._indexes.pop(iteration, None)
            self._file(iteration).unlink(missing_ok=True)

    def _file(self, iteration: int) -> Path:
        return self._folder / f"iteration-{iteration:08}.groups"


def _write(file: Path, parts: Sequence[bytes]) -> None:
    """Whole and durable, or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as written:
        written.writelines(parts)
        written.flush()
        os.fsync(written.fileno())
    partial.replace(file)
    sync_folder(file)


def _read_serving(file: Path) -> Serving | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Serving)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise BridgeError(f"{file}: {error}") from None


def _read_index(file: Path) -> tuple[_Index, int]:
    with file.open("rb") as opened:
        length = opened.read(_LENGTH.size)
        try:
            size = _LENGTH.unpack(length)[0]
            if size > file.stat().st_size:
                raise ValueError("its head is longer than the file")
            index = _index_decoder.decode(opened.read(size))
            start = _LENGTH.size + size
            if start + sum(index.sizes) != file.stat().st_size:
                raise ValueError("it is not as long as its head says")
        except (struct.error, msgspec.MsgspecError, ValueError) as error:
            raise BridgeError(f"{file}: {error}") from None
    return index, start
