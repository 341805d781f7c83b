"""`everstep serve` as a process: started, killed, started again."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Served:
    """A server of a small checkpoint on a port and a journal of its own. more: flags."""

    def __init__(self, checkpoint: Path, folder: Path, *more: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ["--port", str(self.port), "--journal", str(folder / "journal.db")]
        flags += ["--max-model-len", "1024", "--num-threads", "1", *more]
        self._command = [sys.executable, "-m", "everstep", "serve", str(checkpoint), *flags]
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """The banner."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stderr=log, cwd=Path(__file__).parents[1]
            )
        while "URL" not in (banner := self._log.read_text()):
            assert self._process.poll() is None, banner
            time.sleep(0.05)
        return banner

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        assert self._process is not None
        return self._process.wait(60)

    def end(self) -> None:
        """Whatever became of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)


@contextmanager
def two_served(checkpoint: Path, folder: Path, *more: str) -> Iterator[list[Served]]:
    """Two servers of the checkpoint, started side by side, each with a folder of its own."""
    found = []
    for name in "ab":
        (folder / name).mkdir()
        found.append(Served(checkpoint, folder / name, *more))
    starts = [threading.Thread(target=server.start) for server in found]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    try:
        yield found
    finally:
        for server in found:
            server.end()
