"""Where a server keeps what outlives it: the journal of its durable rollouts."""

import os
from pathlib import Path

from ..engine.config import JournalConfig
from ..engine.errors import ConfigError
from ..engine.journal import Journal
from ..engine.journal_thread import JournalThread
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
