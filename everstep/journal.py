"""What `everstep journal` does: check, export and compact the file of a server that is not running."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from .engine.errors import ConfigError, JournalDamaged
from .engine.journal import files
from .engine.journal.journal import Journal
from .engine.journal.ops import Query, Summary
from .engine.trajectory import pack, seal

_ALL = Query(limit=sys.maxsize)


def run_check(path: Path) -> int:
    """Says what is in it and what is wrong with it; returns the exit code."""
    try:
        with opened(path) as journal:
            found = journal.check()
            summaries = journal.list(_ALL)
            num_bytes, schema, num_budgets = journal.num_bytes, journal.schema, journal.num_budgets
    except JournalDamaged as error:
        sys.stdout.write(f"{error}\n")
        return 1
    for line in found:
        sys.stdout.write(f"journal {path}: damaged: {line}\n")
    num_live = sum(not summary.state.is_ended for summary in summaries)
    num_acked = sum(summary.is_acked for summary in summaries)
    num_tokens = sum(summary.num_output_tokens for summary in summaries if not summary.is_acked)
    sys.stdout.write(
        f"{path}: schema {schema}, {num_bytes} bytes, {num_live} live rollouts, "
        f"{len(summaries) - num_live - num_acked} ended, {num_acked} acknowledged, "
        f"{num_tokens} output tokens, {num_budgets} budgets, {len(found)} damaged records\n"
    )
    return 1 if found else 0


def run_export(path: Path, output: Path | None, *, is_sealed: bool, only_ended: bool) -> int:
    """Writes the rollouts; returns the exit code. A record that is damaged costs itself only."""
    if is_sealed and output is None:
        raise ConfigError("--format trajectory writes files: name a folder, --output FOLDER")
    code = count = 0
    with opened(path) as journal, _Sink(output, is_sealed=is_sealed) as sink:
        for summary in journal.list(_ALL):
            if summary.is_acked or (only_ended and not summary.state.is_ended):
                continue
            try:
                rollout = journal.read(summary.id)
            except JournalDamaged as error:
                sys.stderr.write(f"error: {error}\n")
                code = 1
                continue
            assert rollout is not None
            if is_sealed:
                sink.write(summary, seal(pack(rollout)))
            else:
                sink.write(summary, msgspec.json.encode(rollout) + b"\n")
            count += 1
    if output is not None:
        sys.stdout.write(f"{output}: {count} rollout{'s' * (count != 1)}\n")
    return code


def run_compact(path: Path) -> None:
    _check_is_file(path)
    log = path.with_name(f"{path.name}-wal")
    before = path.stat().st_size + (log.stat().st_size if log.exists() else 0)
    with contextlib.closing(Journal.open(path)) as journal:
        journal.compact(is_thorough=True)
    sys.stdout.write(f"{path}: {before} → {path.stat().st_size} bytes\n")


class _Sink:
    """Where an export goes: standard output, a file of lines, or a folder of sealed files."""

    def __init__(self, output: Path | None, *, is_sealed: bool) -> None:
        self._folder = output if is_sealed else None
        self._file = sys.stdout.buffer
        if output is not None and is_sealed:
            output.mkdir(parents=True, exist_ok=True)
        elif output is not None:
            self._file = output.open("wb")

    def write(self, summary: Summary, data: bytes) -> None:
        if self._folder is None:
            self._file.write(data)
            return
        # an imported rollout's id was chosen by somebody else
        name = summary.id if re.fullmatch(r"[\w-]{1,100}", summary.id) else "rollout"
        (self._folder / f"{summary.number:08d}-{name}.evst").write_bytes(data)

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        if self._file is not sys.stdout.buffer:
            self._file.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Journal]:
    """The journal, read only; the file of a process that was killed is read beside a copy of its
    log, since SQLite would write a log's index next to it."""
    _check_is_file(path)
    files.check_unowned(str(path))
    log = path.with_name(f"{path.name}-wal")
    with contextlib.ExitStack() as stack:
        if log.exists() and log.stat().st_size:
            path = _beside_a_copy(path, log, stack)
        yield stack.enter_context(contextlib.closing(Journal.open(path, is_read_only=True)))


def _beside_a_copy(path: Path, log: Path, stack: contextlib.ExitStack) -> Path:
    """A second name for the file in a temporary folder, with a copy of its log."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError:
        folder = tempfile.TemporaryDirectory()
    copy = Path(stack.enter_context(folder)) / path.name
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)
    shutil.copyfile(log, copy.with_name(log.name))
    return copy


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a journal (everstep serve --journal PATH)")
