"""One command, one server: the core's process, the manager and HTTP, from start to drain.

HTTP answers from the first moment (/health: 503 with what is loading). SIGTERM and SIGINT stop
the accepting of work, give what is in flight `grace_s` seconds (then it ends as aborted, with the
tokens it has), and end the process with 0; meanwhile /health says 503, and so do calls that bring
work. A second signal ends it at once. Durable rollouts are not
waited for and not ended: they go on at the next start. A core that cannot be started again ends
the server.
"""

import asyncio
import contextlib
import errno
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import uvicorn
from msgspec import Struct
from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine import log
from ..engine.checkpoint.hub import Progress, resolve
from ..engine.errors import ConfigError, EngineDied, EngineUnavailable
from ..engine.manager.manager import RolloutManager
from ..engine.messages import Loading, Ready, Stats
from ..engine.metrics import Registry
from ..engine.native import ProcessBackend
from ..engine.tokenizer import Tokenizer
from .app import create_app
from .batches.batch_queue import BatchQueue
from .config import HttpConfig, ServeConfig
from .state import files_folder, journal_path, open_journal

STATUS_EVERY_S = 10.0
POLL_S = 0.5
# for answers of rollouts that were cut off at the end of the drain
LAST_WORDS_S = 5
# longer than clients keep an idle connection (httpx: 5 s): who closes first must not be us, or a
# request that is just being sent is lost
KEEP_ALIVE_S = 75


class Serving(Struct, frozen=True):
    """What the start-up banner says."""

    ready: Ready
    names: tuple[str, ...]
    url: str
    run_seed: int
    pid: int | None
    journal: str
    """Where it is, or why there is none, and what it brought back."""


OnServing = Callable[[Serving], None]


def serve(
    config: ServeConfig,
    *,
    on_progress: Progress,
    on_serving: OnServing,
    json_log: bool = False,
    grace_s: float = 30.0,
) -> None:
    """Serve until a signal. Raises ConfigError, CheckpointError, EngineDied."""
    config.check()
    with bind(config.http) as listener:
        # a journal names it, and the next start may be in another folder
        folder = resolve(config.engine.model.path, on_progress).absolute()
        tokenizer = None if config.skip_tokenizer_init else Tokenizer.from_folder(folder)
        model = msgspec.structs.replace(config.engine.model, path=str(folder))

        def on_loading(loading: Loading) -> None:
            on_progress(loading.stage, loading.done, loading.total)

        backend = ProcessBackend(
            msgspec.structs.replace(config.engine, model=model),
            on_loading=on_loading,
            json_log=json_log,
        )
        seed = config.engine.seed
        metrics = Registry()
        # before the model is loaded: a journal that cannot be used is said at once
        journal = open_journal(config.journal, config.http.port, metrics)
        manager = RolloutManager(
            backend,
            tokenizer,
            run_seed=secrets.randbits(63) if seed is None else seed,
            max_live=config.engine.batch.max_queue,
            restarts=config.restart,
            journal=journal,
            retain_keys_s=config.journal.retain_keys_s,
            allow_other_weights=config.journal.other_weights == "continue",
            model_path=str(folder),
            metrics=metrics,
        )
        kept = files_folder(config.journal, config.http.port)
        batches = None
        if kept is not None:
            batches = BatchQueue(
                manager, tokenizer, kept, model_names=config.model_names, openai=config.openai
            )
            batches.open()
        server = Server(config, backend, manager, batches, tokenizer, listener, on_serving, grace_s)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(server.run())


def bind(http: HttpConfig) -> socket.socket:
    """A socket on host and port, before anything is loaded. Raises ConfigError if taken."""
    host = http.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, http.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "in use; name another with --port, or 0 for any free one"
        elif error.errno == errno.EACCES:
            reason = "not allowed for this user; name one above 1023 with --port"
        else:
            raise ConfigError(
                f"http.host {http.host!r} cannot be bound: {error.strerror or error}"
            ) from None
        raise ConfigError(f"port {http.port} of {http.host} is {reason}") from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: they would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class InFlight:
    """An app, and how many of its requests have no whole answer yet."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._count = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._count += 1
        self._is_idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1
            if not self._count:
                self._is_idle.set()

    async def ended(self) -> None:
        """Return as soon as there is none."""
        await self._is_idle.wait()


class Server:
    """The front while it lives."""

    def __init__(
        self,
        config: ServeConfig,
        backend: ProcessBackend,
        manager: RolloutManager,
        batches: BatchQueue | None,
        tokenizer: Tokenizer | None,
        listener: socket.socket,
        on_serving: OnServing,
        grace_s: float,
    ) -> None:
        self._config = config
        self._backend = backend
        self._listener = listener
        self._on_serving = on_serving
        self._grace_s = grace_s
        self._deadline: asyncio.Task[None] | None = None
        self._manager = manager
        self._batches = batches
        self._in_flight = InFlight(create_app(manager, tokenizer, config, batches))
        self._http = _Uvicorn(
            uvicorn.Config(
                self._in_flight,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                # by then every rollout has ended, so that only a client who does not read is left
                timeout_graceful_shutdown=LAST_WORDS_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )

    async def run(self) -> None:
        """Until a signal, or the core is gone for good."""
        self._handle_signals()
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        starting = asyncio.create_task(self._manager.start())
        try:
            await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises what the core could not do
                if self._batches is not None:
                    self._batches.start()
                self._on_serving(self._banner())
                await self._watch(serving)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            self._http.should_exit = True
            await serving
            if self._deadline is not None:
                self._deadline.cancel()
                await asyncio.gather(self._deadline, return_exceptions=True)
            if self._batches is not None:
                await self._batches.close()
            await self._manager.close()
        if starting.cancelled() or self._manager.is_healthy:
            log.event("server.stopped")
        else:
            raise EngineDied("the engine died and could not be started again; see the log above")

    def _banner(self) -> Serving:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return Serving(
            ready=self._manager.info,
            names=self._config.model_names,
            url=f"http://{shown}:{port}",
            run_seed=self._manager.run_seed,
            pid=self._backend.pid,
            journal=self._journal_words(),
        )

    def _journal_words(self) -> str:
        path = journal_path(self._config.journal, self._config.http.port)
        if path is None:
            return "off; durable rollouts are refused (--journal PATH keeps them)"
        count = self._manager.num_recovered
        return f"{path} ({self._config.journal.durability}); {count} rollouts go on from it"

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._stop, name)

    def _stop(self, name: signal.Signals) -> None:
        """First signal: no new work, the rest may end. Second: now."""
        if self._deadline is not None or self._http.should_exit:
            self._http.should_exit = self._http.force_exit = True
            return
        log.event(
            "server.draining",
            signal=name.name,
            in_flight=self._manager.num_live,
            grace_s=self._grace_s,
        )
        self._manager.drain()
        self._deadline = asyncio.create_task(self._wind_up())

    async def _wind_up(self) -> None:
        """Until what is in flight has its answer; at the end of the grace end what runs: each
        answers with what it has (abort)."""
        try:
            await asyncio.wait_for(self._in_flight.ended(), self._grace_s)
        except TimeoutError:
            if self._manager.num_live:
                log.event("server.cut_off", level="warning", rollouts=self._manager.num_live)
            await self._manager.close()
        self._http.should_exit = True

    async def _watch(self, serving: "asyncio.Task[None]") -> None:
        """One status line every 10 s when busy, until HTTP has ended."""
        status = StatusLine()
        status.due(self._manager.stats, time.monotonic())
        next_line = time.monotonic() + STATUS_EVERY_S
        while not serving.done():
            await asyncio.wait([serving], timeout=POLL_S)
            if not self._manager.is_healthy:
                self._http.should_exit = True
            if time.monotonic() >= next_line:
                next_line += STATUS_EVERY_S
                fields = status.due(self._manager.stats, time.monotonic())
                # while a core is started again there is nothing to say
                with contextlib.suppress(EngineUnavailable):
                    if fields:
                        info = self._manager.info
                        version = f"{info.version}@{info.digest[:4]}"
                        log.event("decode", level="info", **fields, version=version)


class StatusLine:
    """The fields of the line that people paste into issues; rates since the line before."""

    def __init__(self) -> None:
        self._tokens = 0
        self._at_s = 0.0

    def due(self, stats: Stats | None, now_s: float) -> dict[str, float]:
        """The fields, or none where nothing ran since the last call."""
        if stats is None:
            self._at_s = now_s
            return {}
        tokens = stats.generation_tokens_total - self._tokens
        rate = max(0.0, tokens) / max(now_s - self._at_s, 1e-9)
        self._tokens, self._at_s = stats.generation_tokens_total, now_s
        if not (tokens or stats.num_running or stats.num_waiting):
            return {}
        return {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv": round(stats.num_blocks_used / max(1, stats.num_blocks), 2),
            "tok/s": round(rate, 1),
            "paused": stats.num_paused,
        }
