"""Where servers and batches keep what outlives them: journals of rollouts, files."""

import math
import os
from pathlib import Path

from msgspec.structs import replace

from ..engine.config import JournalConfig
from ..engine.errors import ConfigError
from ..engine.journal.journal import Journal
from ..engine.journal.thread import JournalThread
from ..engine.metrics import Registry

OFF = "off"


def state_folder() -> Path:
    """XDG_STATE_HOME/everstep, else ~/.local/state/everstep."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "everstep"


def journal_path(config: JournalConfig, port: int) -> Path | None:
    """The file, or None: none is kept.

    Without a name it is that of the port: whoever serves there goes on with what was begun there.
    Port 0 is another each time, so that nothing would ever be found again.
    """
    if config.path is not None:
        return None if config.path == OFF else Path(config.path).expanduser()
    return state_folder() / f"journal-{port}.db" if port else None


def files_folder(config: JournalConfig, port: int) -> Path | None:
    """Where /v1/files are kept: beside the journal; None without one."""
    path = journal_path(config, port)
    return None if path is None else path.with_name(f"{path.stem}-files")


def batch_journal_path(config: JournalConfig, output: Path) -> Path | None:
    """The journal of `everstep batch`: beside its output unless it is named; None: none."""
    if config.path is not None:
        return None if config.path == OFF else Path(config.path).expanduser()
    return output.with_name(f"{output.name}.journal")


def open_batch_journal(
    config: JournalConfig, output: Path, metrics: Registry
) -> JournalThread | None:
    """The journal of a batch on its thread. Raises JournalError.

    Nothing is synced: what a power loss takes of it is generated again, to the same bits.
    """
    path = batch_journal_path(config, output)
    if path is None:
        return None
    settings = replace(config, durability="process", retain_keys_s=math.inf)
    return JournalThread(Journal.open(path, settings), metrics=metrics)


def remove_batch_journal(config: JournalConfig, output: Path) -> None:
    """Every line has its record: a journal that nobody named has done its work.

    The caller holds the lock of `output`, so nobody else can have it open.
    """
    path = batch_journal_path(config, output)
    if path is not None and config.path is None:
        for suffix in ("-lock", "-wal", "-shm", ""):
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def open_journal(config: JournalConfig, port: int, metrics: Registry) -> JournalThread | None:
    """The journal on its thread. Raises JournalError, ConfigError where its folder cannot be."""
    path = journal_path(config, port)
    if path is None:
        return None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the journal's folder {path.parent} cannot be made ({error.strerror}); name a file "
            "with --journal PATH, or serve without one: --journal off"
        ) from None
    return JournalThread(Journal.open(path, config), metrics=metrics)
