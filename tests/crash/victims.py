"""What the nemesis strikes: the server under test, its core, the client, and the journal's disk."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_S = 60.0
CORE_NAMES = ("everstep-core", "everstep.engine.core.core")


class Server:
    """The server under test; started again whenever it is gone."""

    def __init__(self, work: Path, port: int, arguments: list[str], *, is_cold: bool) -> None:
        self.pid: int | None = None
        self.num_starts = 0
        self.start_seconds: list[float] = []
        self._port, self._arguments, self._is_cold = port, arguments, is_cold
        self._log = work / "server.log"
        self._cold: subprocess.Popen[bytes] | None = None
        self._launcher: subprocess.Popen[bytes] | None = None
        if not is_cold:
            self._launcher = subprocess.Popen(
                [sys.executable, str(HERE / "launcher.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._messages = read_lines(self._launcher)
            next(self._messages)

    def start(self, faults: list[str]) -> None:
        self.num_starts += 1
        began = time.monotonic()
        if self._launcher is None:
            command = [sys.executable, str(HERE / "launcher.py"), "--cold"]
            with self._log.open("ab") as log:
                self._cold = subprocess.Popen(
                    [*command, json.dumps(faults), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.pid = self._cold.pid
        else:
            assert self._launcher.stdin is not None
            request = {"start": self._arguments, "faults": faults, "log": str(self._log)}
            self._launcher.stdin.write(json.dumps(request).encode() + b"\n")
            self._launcher.stdin.flush()
            while "pid" not in (message := next(self._messages)):
                pass
            self.pid = message["pid"]
        self._began = began
        self._is_ready = False

    def look(self) -> bool:
        """Whether it is ready; None-like False while it starts. Notes when it has gone."""
        if self.pid is not None and self._has_exited():
            self.pid = None
        if self.pid is not None and not self._is_ready and self._answers():
            self._is_ready = True
            self.start_seconds.append(time.monotonic() - self._began)
        return self.pid is not None and self._is_ready

    def core(self) -> int | None:
        """Process id of its core."""
        return None if self.pid is None else find_core(self.pid)

    def close(self) -> None:
        """Ask it to end, as an operator does; then end the launcher."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            deadline = time.monotonic() + START_S
            while self.pid is not None:
                self.look()
                if time.monotonic() > deadline:
                    raise SystemExit("the server does not end at SIGTERM")
                time.sleep(0.01)
        if self._launcher is not None:
            assert self._launcher.stdin is not None
            self._launcher.stdin.close()
            self._launcher.wait()
            assert self._launcher.stdout is not None
            self._launcher.stdout.close()

    def _has_exited(self) -> bool:
        if self._cold is not None:
            return self._cold.poll() is not None
        assert self._launcher is not None
        assert self._launcher.stdout is not None
        while select.select([self._launcher.stdout], [], [], 0)[0]:
            if next(self._messages).get("exited") == self.pid:
                return True
        return False

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
                return b" 200 " in connection.recv(64)
        except OSError:
            return False


def read_lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Unbuffered, so that `select` and this agree about what is there."""
    assert process.stdout is not None
    line = b""
    while byte := os.read(process.stdout.fileno(), 1):
        if byte == b"\n":
            yield json.loads(line)
            line = b""
        else:
            line += byte


def find_core(server: int) -> int | None:
    """The descendant of a server that is its core."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()
                if state[0] != "Z":
                    parents[int(folder.name)] = int(state[1])
    family, found = {server}, None
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family - {server}:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name == CORE_NAMES[0] or CORE_NAMES[1] in Path(f"/proc/{pid}/cmdline").read_text():
                found = pid
    return found


class SmallDisk:
    """A file system of a few MiB for the journal, which can be filled up. Needs root."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "crash", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"--disk: a small file system cannot be had: {done.stderr.strip()}")

    def fill(self) -> None:
        """To the last byte."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (65536, 4096, 512, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


class Client:
    """The client under the nemesis; a killed one takes up its history where it stood."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
