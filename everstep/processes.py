"""Which processes a running `everstep serve` consists of, by /proc."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .engine.errors import ConfigError

_PROC = Path("/proc")
_LISTENING = "0A"


def check_proc() -> None:
    """Raise ConfigError where processes cannot be looked at."""
    if not (_PROC / "self" / "stat").exists():
        raise ConfigError("chaos finds its victims in /proc, which this system does not have")


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine."""
    sockets = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for pid in _pids():
        with contextlib.suppress(OSError):
            for link in (_PROC / str(pid) / "fd").iterdir():
                if os.readlink(link) in sockets:
                    return pid
    return None


def is_server(pid: int) -> bool:
    """Whether a process is an `everstep serve`, by its command line."""
    words = _command(pid)
    return "serve" in words and any("everstep" in Path(word).name for word in words)


def core_of(server: int) -> int | None:
    """The child of a server that is its core."""
    for pid in _pids():
        if _parent(pid) == server and any("everstep.engine.core.core" in w for w in _command(pid)):
            return pid
    return None


def is_alive(pid: int) -> bool:
    """Whether it runs; what has ended and waits for its parent does not."""
    try:
        return _stat(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def kill(pid: int, *, timeout_s: float = 10.0) -> bool:
    """SIGKILL, and wait until it is gone; False if it was gone before."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ConfigError(f"process {pid} belongs to somebody else: it cannot be killed") from None
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    return True


def _pids() -> Iterator[int]:
    return (int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit())


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _command(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
