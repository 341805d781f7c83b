"""Backend over our own core: in a process of its own (ZeroMQ), or on a thread of this one.

Both carry the same messages; `serve` uses the process, `everstep.LLM` and one-shot commands
the thread.
"""

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from . import errors
from .checkpoint.manifest import Version
from .config import PATIENCE, EngineConfig
from .errors import EngineDied, EngineUnavailable, EverstepError
from .messages import Died, FromCore, Loading, Ready, Shutdown, ToCore, decode_from_core, encode

OnLoading = Callable[[Loading], None]
GRACE_S = 5.0


def _ignore(_: Loading) -> None:
    return None


def error_of(died: Died) -> EverstepError:
    """The error that a core's last message stands for."""
    for kind in (errors.CheckpointError, errors.ConfigError, errors.MissingExtra):
        if kind.code == died.code:
            error = EverstepError.__new__(kind)
            error.args = (died.message,)
            return error
    return EngineDied(died.message)


class ProcessBackend:
    """The core as a child process; its standard input is the line that keeps it alive."""

    def __init__(
        self, config: EngineConfig, *, on_loading: OnLoading = _ignore, json_log: bool = False
    ) -> None:
        self._config = config
        self._on_loading = on_loading
        self._json_log = json_log
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._backlog: list[FromCore] = []

    @property
    def pid(self) -> int | None:
        """Process id of the core, None before start."""
        return self._process.pid if self._process else None

    async def start(self, weights: Version | None = None, /) -> Ready:
        await self.close()
        # a private folder: nobody else may speak to the core
        self._folder = tempfile.TemporaryDirectory(prefix="everstep-")
        endpoint = f"ipc://{self._folder.name}/core"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._process = _spawn()
        assert self._process.stdin is not None
        job = {
            "endpoint": endpoint,
            "config": msgspec.to_builtins(self._config),
            "weights": msgspec.to_builtins(weights),
            "json_log": self._json_log,
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            for index, message in enumerate(batch := await self.receive()):
                match message:
                    case Loading():
                        self._on_loading(message)
                    case Ready():
                        self._backlog += batch[index + 1 :]
                        return message
                    case Died():
                        await self.close()
                        raise error_of(message)

    def send(self, messages: Sequence[ToCore]) -> None:
        if self._socket is None:
            return
        # zmq.asyncio keeps what the peer has not taken; a dead peer is seen by receive()
        sending = asyncio.ensure_future(self._socket.send(encode(list(messages))))
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def receive(self) -> list[FromCore]:
        if self._backlog:
            found, self._backlog = self._backlog, []
            return found
        while self._socket is not None and self._process is not None:
            if await self._socket.poll(200):
                return decode_from_core(await self._socket.recv())
            code = self._process.poll()
            if code is not None and not await self._socket.poll(0):
                return [Died(f"the engine's core ended with code {code}")]
        return [Died("the engine's core is not running")]

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None and self._socket is not None:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.send(encode([Shutdown()]))
            assert process.stdin is not None
            await asyncio.to_thread(_end, process)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._backlog = []


def own_python(statement: str) -> list[str]:
    """A command that runs it with this interpreter and this copy of the package.

    The package's root goes to the end of the path: at its front a checkout's `kernels` would
    hide another package of that name.
    """
    root = str(Path(__file__).parent.parent)
    package_root = root if Path(root, "everstep").is_dir() else str(Path(root).parent)
    code = f"import sys; sys.path.append({package_root!r}); {statement}"
    return [sys.executable, "-P", "-c", code]


def _spawn() -> subprocess.Popen[bytes]:
    """Start a core."""
    return subprocess.Popen(
        own_python("from everstep.engine.core.core import main; main()"),
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else None,
        env=PATIENCE | dict(os.environ),
        # Ctrl-C in the terminal is the front's to handle
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait a little for a polite end, then insist."""
    assert process.stdin is not None
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(OSError):
        process.stdin.close()


class ThreadBackend:
    """The core on a thread of this process."""

    def __init__(self, config: EngineConfig, *, on_loading: OnLoading = _ignore) -> None:
        self._config = config
        self._on_loading = on_loading
        self._to_core: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self._from_core: asyncio.Queue[list[FromCore]] = asyncio.Queue()
        self._thread: threading.Thread | None = None
        self._is_closing = threading.Event()

    async def start(self, weights: Version | None = None, /) -> Ready:
        await self.close()
        loop = asyncio.get_running_loop()
        self._to_core = queue.SimpleQueue()
        self._from_core = asyncio.Queue()
        self._is_closing = threading.Event()
        found, is_closing = self._from_core, self._is_closing

        def say_loading(loading: Loading) -> None:
            if is_closing.is_set():
                # loading gigabytes is not waited for
                raise EngineUnavailable("the engine was closed while it was loading")
            send([loading])

        def send(messages: list[FromCore]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(found.put_nowait, messages)

        if "torch" not in sys.modules:
            os.environ.update(PATIENCE | dict(os.environ))
        self._thread = threading.Thread(
            target=_run_on_thread,
            args=(self._config, weights, self._to_core, send, say_loading),
            daemon=True,
        )
        self._thread.start()
        while True:
            for message in await self.receive():
                match message:
                    case Loading():
                        self._on_loading(message)
                    case Ready():
                        return message
                    case Died():
                        raise error_of(message)

    def send(self, messages: Sequence[ToCore]) -> None:
        for message in messages:
            self._to_core.put(message)

    async def receive(self) -> list[FromCore]:
        return await self._from_core.get()

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._is_closing.set()
            self._to_core.put(Shutdown())
            # not asyncio.to_thread: at the interpreter's end no new thread can be started
            while thread.is_alive():
                await asyncio.sleep(0.005)


def _run_on_thread(
    config: EngineConfig,
    weights: Version | None,
    to_core: "queue.SimpleQueue[ToCore]",
    send: Callable[[list[FromCore]], None],
    say_loading: OnLoading,
) -> None:
    from .core.core import build

    def receive(timeout_s: float) -> list[ToCore]:
        found: list[ToCore] = []
        try:
            found.append(to_core.get(timeout=timeout_s) if timeout_s else to_core.get_nowait())
            while True:
                found.append(to_core.get_nowait())
        except queue.Empty:
            return found

    try:
        core, ready = build(config, say_loading, weights)
        send([ready])
        core.loop(receive, send)
        send([Died("the engine was closed")])
    except EverstepError as error:
        send([Died(str(error), error.code)])
    except Exception as error:
        send([Died(f"{type(error).__name__}: {error}")])
