"""The output of `everstep rollout`: JSON lines, or Parquet made of them when the run is over.

Lines of an iteration are appended and synced before the run file says that they count; what is
behind the size that it names was written by a process that was killed in between, and is cut off.
A Parquet file has its index at the end, so it cannot grow so: its lines are kept beside it
(`OUT.lines`) until the run is over.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ..engine.errors import ConfigError, MissingExtra
from ..trainer_bridge.run.parts import Delivered
from ..trainer_bridge.trajectories.record import Trajectory, decode_line, encode_line, trajectory_of

SUFFIXES = (".jsonl", ".parquet")
# trajectories of one row group
_ROWS = 1024


class RolloutOutput:
    """The file of lines, open; a `Sink` of the driver."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where it cannot be, MissingExtra for Parquet without pyarrow."""
        check_output(path)
        self.path = path
        self.is_parquet = path.suffix == ".parquet"
        self.lines = lines_path(path)
        self._fd = _open(self.lines)
        self._size = os.fstat(self._fd).st_size

    def cut(self, size: int) -> None:
        """Take away what was written and never counted. Raises ConfigError where lines that
        counted are gone."""
        if self._size == size:
            return
        if self._size < size:
            raise ConfigError(
                f"{self.lines} has {self._size} bytes, and the run has written {size}: it was "
                "changed meanwhile; put it back, or name another output"
            )
        with _translated(self.lines):
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        self._size = size

    def write(self, groups: Sequence[Sequence[Delivered]]) -> int:
        """Append their lines, durably; returns the new size."""
        with _translated(self.lines):
            for group in groups:
                data = b"".join(encode_line(trajectory_of(one)) + b"\n" for one in group)
                self._append(memoryview(data))
            os.fsync(self._fd)
        return self._size

    def finish(self, size: int) -> None:
        """The run is over, with so many bytes of lines: the Parquet file, where one is wanted, takes
        their place. May be asked again of a run that is over. Raises as `cut` does."""
        is_made = self.is_parquet and not self._size and self.path.exists()
        if not is_made:
            self.cut(size)
        if self.is_parquet:
            if not is_made:
                write_parquet(self.lines, self.path)
            self.lines.unlink()

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, data: memoryview) -> None:
        while data:
            written = os.write(self._fd, data)
            self._size += written
            data = data[written:]


def lines_path(path: Path) -> Path:
    """Where the lines of an output are while its run goes on."""
    return path.with_name(f"{path.name}.lines") if path.suffix == ".parquet" else path


def check_output(path: Path) -> None:
    """Raise ConfigError, or MissingExtra, unless the run can be written there. Nothing is made."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--out must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file; name one for the output")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"{path} cannot be written: Permission denied")
    if path.suffix == ".parquet":
        _pyarrow()


def write_parquet(lines: Path, target: Path) -> int:
    """A Parquet file of the lines, put in place by one rename; returns the number of rows."""
    arrow, parquet = _pyarrow()
    schema = _schema(arrow)
    scratch = target.with_name(f"{target.name}.part")
    count = 0
    try:
        with _translated(target), open(lines, "rb", buffering=1 << 20) as source:
            with parquet.ParquetWriter(scratch, schema, compression="zstd") as writer:
                for rows in _chunks(source):
                    table = arrow.Table.from_pylist([_row(one) for one in rows], schema=schema)
                    writer.write_table(table)
                    count += len(rows)
            with open(scratch, "rb+") as made:
                os.fsync(made.fileno())
            os.replace(scratch, target)
    finally:
        # where the disk is full, half a file only takes room
        scratch.unlink(missing_ok=True)
    return count


def _chunks(lines: Any) -> Iterator[list[Trajectory]]:
    while found := [decode_line(line) for line in islice(lines, _ROWS)]:
        yield found


def _row(trajectory: Trajectory) -> dict[str, Any]:
    """What JSON says freely, as text: what a user put in, and a stop's id or string."""
    row: dict[str, Any] = msgspec.to_builtins(trajectory)
    row["metadata"] = msgspec.json.encode(trajectory.metadata).decode()
    matched = trajectory.finish_reason.matched
    row["finish_reason"] = {
        "type": trajectory.finish_reason.type,
        "matched": None if matched is None else msgspec.json.encode(matched).decode(),
        "detail": trajectory.finish_reason.detail,
    }
    for name, parts in _RUNS.items():
        row[name] = [dict(zip(parts, run, strict=True)) for run in row[name]]
    return row


_RUNS = {"versions": ("version", "count"), "iterations": ("iteration", "version", "count")}
_TEXTS = ("prompt_id", "group_id", "text", "metadata", "rollout_id", "engine")
_INTS = (
    *("line", "epoch", "index", "attempt", "iteration", "retention", "seed"),
    "num_preemptions",
)


def _schema(arrow: Any) -> Any:
    floats, ids = arrow.list_(arrow.float32()), arrow.list_(arrow.int32())
    counts = {
        name: arrow.list_(arrow.struct([(part, arrow.int64()) for part in parts]))
        for name, parts in _RUNS.items()
    }
    segment = [
        *(("start", arrow.int64()), ("version", arrow.int64())),
        *((name, arrow.string()) for name in ("digest", "numerics", "core", "kv")),
    ]
    earlier = [("attempt", arrow.int64()), ("reason", arrow.string()), ("tokens", arrow.int64())]
    reason = [(name, arrow.string()) for name in ("type", "matched", "detail")]
    columns = {
        **dict.fromkeys(_TEXTS, arrow.string()),
        **dict.fromkeys(_INTS, arrow.int64()),
        **dict.fromkeys(("prompt_ids", "output_ids"), ids),
        **dict.fromkeys(("lp_sampled", "lp_temp", "lp_raw", "kept_mass"), floats),
        **dict.fromkeys(("temperature", "reward"), arrow.float64()),
        **dict.fromkeys(("created_s", "first_token_s", "ended_s"), arrow.float64()),
        **counts,
        "kept_ids": arrow.list_(ids),
        "flags": arrow.list_(arrow.uint8()),
        "segments": arrow.list_(arrow.struct(segment)),
        "earlier": arrow.list_(arrow.struct(earlier)),
        "finish_reason": arrow.struct(reason),
    }
    return arrow.schema([(name, columns[name]) for name in Trajectory.__struct_fields__])


def _pyarrow() -> tuple[Any, Any]:
    """Raises MissingExtra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", "a Parquet output") from None
    return pyarrow, pyarrow.parquet


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with _translated(path):
        return os.open(path, flags, 0o666)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{path}: no space left on the disk; what is written is whole: make room and run "
                "the same command again"
            ) from None
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
