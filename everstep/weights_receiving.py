"""`everstep receive-weights`: a trainer's versions arrive on this host; and the same as a child of
`everstep rollout --weights-bind`."""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from .engine import log
from .engine.config import PATIENCE
from .engine.errors import ConfigError, EverstepError
from .engine.native import own_python
from .environment import log_format

# it may have to compile the kernels
READY_S = 600.0
_ERROR = "error: "
_GRACE_S = 5.0
_PAUSE_S = 0.5
# of glibc's mallopt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# what is freed stays with the process, so much of it, and blocks up to so many bytes
_KEPT_BYTES, _LARGEST_KEPT = 256 << 20, 32 << 20


class Job(msgspec.Struct, frozen=True):
    """What a receiver is to do.

    keys    folder of the engine's side, None for none
    prefix  of the flags: --bind and --root, or --weights-bind and --weights-root
    """

    endpoint: str
    run: str
    root: str
    keys: str | None
    prefix: str = ""

    @classmethod
    def of(
        cls, endpoint: str, run: str, root: Path | None, keys: Path | None, *, prefix: str
    ) -> Self:
        """From flags: without a root the run's own folder in shared memory. Raises ConfigError for
        a name that no run can have."""
        from .trainer_bridge.protocol import check_run_name
        from .trainer_bridge.weights.folder import default_root

        check_run_name(run, "--run-name")
        folder = default_root(run) if root is None else root.resolve()
        return cls(endpoint, run, str(folder), None if keys is None else str(keys), prefix)

    def check(self) -> None:
        """Raises ConfigError for an address or keys that cannot be used."""
        from .trainer_bridge.curve import check_endpoint, read_keys

        keys = None if self.keys is None else read_keys(Path(self.keys), "engine")
        check_endpoint(self.endpoint, keys, f"--{self.prefix}bind")


def receive(job: Job) -> None:
    """Until a signal."""
    _receive(job, lambda _: None, says_arrivals=True)


class ReceiverChild:
    """A receiver as a child of this process, started again whenever it dies.

    Its standard input is the line that keeps it alive: it ends with us, however we end.
    """

    def __init__(self, job: Job) -> None:
        """Raises ConfigError as `Job.check`."""
        job.check()
        self._job = job
        self._is_closing = threading.Event()
        self._process = self._spawn()
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="weights", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process as it is now."""
        return self._process.pid

    def ready(self) -> str:
        """Wait until it listens; what it says of itself. Raises ConfigError where it cannot."""
        try:
            said = self._said.get(timeout=READY_S)
        except queue.Empty:
            raise ConfigError(f"the receiver of weights says nothing for {READY_S:.0f} s") from None
        if said.startswith(_ERROR):
            raise ConfigError(said.removeprefix(_ERROR))
        return said

    def close(self) -> None:
        """End it."""
        self._is_closing.set()
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        self._thread.join()

    def _watch(self) -> None:
        """What it says goes to whoever waits for it; when it dies another one is started."""
        while True:
            process = self._process
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    self._said.put(line.decode().strip())
            code = process.wait()
            if self._is_closing.wait(_PAUSE_S):
                return
            log.event("weights.receiver_died", level="warning", code=code)
            self._process = self._spawn()
            if self._is_closing.is_set():
                # it was started while we were closed
                self._process.kill()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            own_python("from everstep.weights_receiving import main; main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=PATIENCE | dict(os.environ),
            # Ctrl-C in the terminal is the parent's to handle
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(self._job) + b"\n")
            process.stdin.flush()
        return process


def main() -> None:
    """Entry of the child: a `Job` on one line of standard input, whose end ends it."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    log.setup(json_lines=log_format() == "json", level="warning")
    try:
        _receive(job, _watch_parent, says_arrivals=False)
    except EverstepError as error:
        _say(f"{_ERROR}{error}")


def _watch_parent(stop: Callable[[], None]) -> None:
    def until_its_end() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        stop()

    threading.Thread(target=until_its_end, daemon=True).start()


def _receive(job: Job, watch: Callable[[Callable[[], None]], None], *, says_arrivals: bool) -> None:
    """watch  told how the receiver is stopped, when it has begun"""
    from .trainer_bridge.curve import read_keys
    from .trainer_bridge.weights.receiver import Settings, WeightReceiver

    _keep_memory()
    receiver = WeightReceiver(
        Path(job.root),
        run=job.run,
        endpoint=job.endpoint,
        settings=Settings(f"--{job.prefix}bind", f"--run-name or --{job.prefix}root"),
        keys=None if job.keys is None else read_keys(Path(job.keys), "engine"),
        on_arrival=_tell if says_arrivals else lambda *_: None,
    )
    try:
        bound = receiver.start()
        _say(f"weights of the run {job.run!r} arrive at {bound}, in {job.root}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: receiver.stop())
        watch(receiver.stop)
        receiver.run()
    finally:
        receiver.close()


def _keep_memory() -> None:
    """A page that the system has to find anew for every message costs more than to receive it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def _tell(version: int, path: Path, num_bytes: int, seconds: float) -> None:
    speed = num_bytes / max(seconds, 1e-9) / 1e9
    _say(
        f"version {version}: {num_bytes / 1e6:.1f} MB in {seconds:.2f} s ({speed:.2f} GB/s), {path}"
    )


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
