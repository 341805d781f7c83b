"""The server under test: everstep's own command line, in a process that may carry a planted fault.

The shipped code has no switches for tests, so whatever a test wants to happen inside a server (die
at the k-th commit, acknowledge too early) is patched in here, from outside. It is the only program
of this folder that imports everstep.

    python launcher.py            serves requests on standard input, one JSON line each:
        {"start": ["serve", …], "log": PATH, "faults": ["die:after_commit:3", …]} → {"pid": N}
      and says {"exited": N, "code": C} of those that ended. It has loaded everything once and
      forks, so that a restart costs a tenth of a second instead of the seconds that `import torch`
      takes: a thousand kills fit into minutes. The processes are real, and so is SIGKILL.
    python launcher.py --cold '["die:…"]' serve …
      the same, starting as a user's server does.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

CORE_NAME = "everstep-core"
PR_SET_NAME, PR_SET_PDEATHSIG = 15, 1

# the folder of this file would hide nothing, the checkout's root would (tests/conftest.py)
sys.path[:] = [p for p in sys.path if p not in ("", str(Path(__file__).parents[2]))]
sys.path.append(str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parent))


def preload() -> None:
    """Import what a server and a core import; start no thread and run no operation."""
    import everstep.cli
    import everstep.engine.core.core
    import everstep.engine.model.runner
    import everstep.engine.model.weights
    import everstep.kernels.native
    import everstep.offline
    import everstep.progress
    import everstep.server.app
    import everstep.server.launch  # noqa: F401


def name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


class CoreNursery:
    """A child that forks cores for one server; it ends with the server, as its cores do."""

    def __init__(self, faults: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        if os.fork() == 0:
            self._socket.close()
            name_process("core-nursery")
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            with contextlib.suppress(BaseException):
                self._serve(theirs, faults)
            os._exit(0)
        theirs.close()
        self._lock = threading.Lock()

    def spawn(self) -> "ForkedCore":
        """What `native._spawn` does, by a fork."""
        reading, writing = os.pipe()
        with self._lock:
            socket.send_fds(self._socket, [b"core"], [reading])
            pid = int.from_bytes(self._socket.recv(8), "little")
        os.close(reading)
        return ForkedCore(pid, os.fdopen(writing, "wb"))

    @staticmethod
    def _serve(theirs: socket.socket, faults: Sequence[str]) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(theirs, 16, 1)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                theirs.close()
                os.setsid()
                name_process(CORE_NAME)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(fds[0], 0)
                os.close(fds[0])
                sys.stdin = os.fdopen(0)
                run_core(faults)
            os.close(fds[0])
            theirs.send(pid.to_bytes(8, "little"))


def run_core(faults: Sequence[str]) -> None:
    code = 1
    try:
        install(faults, "core")
        from everstep.engine.core.core import main

        main()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


class ForkedCore:
    """As much of `subprocess.Popen` as the backend uses, over somebody else's child."""

    def __init__(self, pid: int, stdin: IO[bytes]) -> None:
        self.pid, self.stdin = pid, stdin
        try:
            self._fd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = None

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(CORE_NAME, timeout or 0)
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self._fd is None:
            return -signal.SIGKILL
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if not poller.poll(None if timeout is None else timeout * 1000):
            return None
        os.close(self._fd)
        self._fd = None
        return -signal.SIGKILL


def install(faults: Sequence[str], place: str) -> None:
    """Patch the faults of this place, `server` or `core`, into this process."""
    if faults:
        from faults import plant

        for fault in faults:
            plant(fault, place)


def run_server(arguments: Sequence[str], faults: Sequence[str], log: str) -> None:
    """In a forked child: never returns."""
    code = 70
    try:
        os.setsid()
        name_process("everstep-server")
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        from everstep.engine import native

        native._spawn = CoreNursery(faults).spawn  # type: ignore[assignment]
        install(faults, "server")
        from everstep.cli import run

        code = run(list(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_cold(faults: Sequence[str], arguments: Sequence[str]) -> int:
    """One server, started as a user's is; faults of a core have no place here."""
    install(faults, "server")
    from everstep.cli import run

    return run(list(arguments))


def say(**fields: Any) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def serve_requests() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    began = time.monotonic()
    preload()
    say(ready=True, seconds=round(time.monotonic() - began, 2))
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.05)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            say(exited=pid, code=os.waitstatus_to_exitcode(status))
        if not readable:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                run_server(request["start"], request.get("faults", []), request["log"])
            say(pid=pid)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cold"]:
        sys.exit(run_cold(json.loads(sys.argv[2]), sys.argv[3:]))
    serve_requests()
