"""`everstep chaos`: kill the processes of a running server, and certify that nothing was lost.

The kill log lies outside of the journal and is written before each blow. A run in which no kill hit
the middle of a token stream has shown nothing, and fails.
"""

import asyncio
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from msgspec import Struct

from .. import processes
from ..engine.errors import ConfigError, EngineUnavailable
from .load import Load, Watch, summed, until_ready

if TYPE_CHECKING:
    from ..clients.async_client import AsyncClient

Victim = Literal["core", "server"]
VICTIMS: tuple[Victim, ...] = ("core", "server")
START_S = 600.0
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


class Plan(Struct, frozen=True, kw_only=True):
    """What to kill and how often. command: how the server is started ([]: it never is)."""

    url: str
    pid: int | None
    victims: tuple[Victim, ...]
    every_s: float
    duration_s: float
    kill_log: Path
    command: tuple[str, ...] = ()
    owns_server: bool = False
    """Started by the command at the beginning, and ended at the end."""
    has_load: bool = True
    width: int = 8
    max_tokens: int = 256
    seed: int | None = None


def seconds_of(text: str, flag: str) -> float:
    """`30`, `30s`, `10m`, `2h`; raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{flag} must be a time such as 30s, 10m or 2h, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def victims_of(text: str) -> tuple[Victim, ...]:
    """`core,server`; raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VICTIMS:
            raise ConfigError(f"--kill must name {' or '.join(VICTIMS)}, got {name!r}")
    return tuple(victim for victim in VICTIMS if victim in names)


def url_of(url: str | None, command: Sequence[str]) -> str:
    """Where the server is: as said, else by the command's own --port."""
    if url is None:
        port = "8000"
        for flag, value in pairwise([*command, ""]):
            if flag == "--port":
                port = value
            elif flag.startswith("--port="):
                port = flag.partition("=")[2]
        url = f"http://127.0.0.1:{port}"
    parts = urlsplit(url)
    try:
        is_usable = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(
            f"--url must be http://HOST:PORT of a server on this machine, got {url!r}"
        )
    return url


class Server:
    """The server under chaos: where its processes are, and how it comes back."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ConfigError where the command cannot be run."""
        try:
            self._process = subprocess.Popen(
                self._plan.command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"{shlex.join(self._plan.command)}: {error.strerror}") from None

    def pid(self) -> int | None:
        """Of the process that answers HTTP. Raises ConfigError if that is no `everstep serve`."""
        port = urlsplit(self._plan.url).port or 80
        pid = processes.listener(port)
        if pid is None and self._plan.pid is not None and processes.is_alive(self._plan.pid):
            pid = self._plan.pid
        if pid is not None and not processes.is_server(pid):
            raise ConfigError(f"process {pid} on port {port} is no `everstep serve`: not killed")
        return pid

    def find(self, victim: Victim) -> int | None:
        pid = self.pid()
        return pid if victim == "server" or pid is None else processes.core_of(pid)

    def has_given_up(self) -> bool:
        """Whether the server that we started ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def reap(self) -> None:
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, as an operator does."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


class Certificate(Struct, kw_only=True):
    """What a run has shown. `faults` empty: it holds."""

    seconds: float
    kills: dict[str, int]
    num_in_mid_stream: int
    accepted: int
    delivered: int
    acknowledged: int
    duplicates: int
    regenerated_tokens: int
    watched: int
    slowest_return_s: float
    faults: list[str]
    has_load: bool

    def lines(self) -> list[str]:
        by_victim = ", ".join(f"{name} {count}" for name, count in self.kills.items())
        rows = [
            ("killed", f"{sum(self.kills.values())} ({by_victim})"),
            ("in mid-stream", str(self.num_in_mid_stream)),
            ("back after", f"{self.slowest_return_s:.1f} s at most"),
        ]
        if self.has_load:
            rows += [
                ("accepted", str(self.accepted)),
                ("delivered", str(self.delivered)),
                ("duplicates", str(self.duplicates)),
                ("regenerated", f"{self.regenerated_tokens} tokens (identical)"),
            ]
        rows.append(("watched", f"{self.watched} rollouts of this server"))
        if self.has_load:
            is_balanced = self.accepted == self.delivered == self.acknowledged
            rows.append(("books", "balanced" if is_balanced else "NOT balanced"))
        rows.append(("time", f"{self.seconds:.0f} s"))
        width = max(len(name) for name, _ in rows)
        faults = [f"FAULT {fault}" for fault in summed(self.faults)]
        verdict = f"{len(self.faults)} FAULTS" if self.faults else "nothing lost, nothing twice"
        return [
            *(f"  {name:<{width}}  {value}" for name, value in rows),
            *faults,
            f"certificate: {verdict}",
        ]


async def run(plan: Plan) -> Certificate:
    """Kill until the time is over, let everything end, and certify. Raises EverstepError."""
    from ..clients.async_client import AsyncClient

    processes.check_proc()
    server = Server(plan)
    if plan.owns_server:
        server.start()
    try:
        async with AsyncClient(plan.url, retry_s=START_S) as client:
            await until_ready(plan.url, START_S if plan.owns_server else 10.0)
            return await Run(plan, server, client).run()
    finally:
        if plan.owns_server:
            server.stop()


class Run:
    """One run of chaos over a server that answers."""

    def __init__(self, plan: Plan, server: Server, client: "AsyncClient") -> None:
        self._plan, self._server, self._client = plan, server, client
        self._load = Load(client, width=plan.width, max_tokens=plan.max_tokens)
        self._watch = Watch(client)
        self._rng = random.Random(plan.seed)
        self._kills: dict[str, int] = dict.fromkeys(plan.victims, 0)
        self._num_hits = 0
        self._slowest_s = 0.0

    async def run(self) -> Certificate:
        began = time.monotonic()
        if "server" in self._plan.victims and not self._plan.command:
            raise ConfigError(
                "--kill server needs to know how to start it again: --restart COMMAND, or let "
                "chaos start it: everstep chaos … -- everstep serve …"
            )
        await self._watch.look()
        load = asyncio.create_task(self._load.run()) if self._plan.has_load else None
        try:
            await self._kill_all(began + self._plan.duration_s, load)
            self._load.stop()
            if load is not None:
                await load
                await self._load.check_again()
                await self._load.check_list()
        finally:
            if load is not None:
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
        await self._watch.look()
        return self._certify(time.monotonic() - began)

    async def _kill_all(self, end_s: float, load: "asyncio.Task[None] | None") -> None:
        while True:
            # not in step with anything that the server does every so often
            await asyncio.sleep(self._plan.every_s * self._rng.uniform(0.5, 1.5))
            if time.monotonic() >= end_s:
                return
            if load is not None and load.done():
                load.result()
            await self._strike(self._plan.victims[self._rng.randrange(len(self._plan.victims))])

    async def _strike(self, victim: Victim) -> None:
        await self._watch.look()
        pid = self._server.find(victim)
        if pid is None:
            _say(f"no {victim} to kill now; it is being started")
            return
        self._watch.hit()
        num_streams = self._load.hit()
        record = {"time": time.time(), "victim": victim, "pid": pid, "streams": num_streams}
        with self._plan.kill_log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        if not processes.kill(pid):
            return
        self._kills[victim] += 1
        self._num_hits += num_streams > 0
        if victim == "server":
            self._server.reap()
            self._server.start()
        back_s = await self._until_back(victim, pid)
        self._slowest_s = max(self._slowest_s, back_s)
        _say(f"killed {victim} {pid} in {num_streams} streams; back after {back_s:.1f} s")

    async def _until_back(self, victim: Victim, killed: int) -> float:
        """Wait for a new process in its place that answers. Raises EngineUnavailable."""
        began = time.monotonic()
        while True:
            pid = self._server.find(victim)
            if pid is not None and pid != killed:
                await until_ready(self._plan.url, START_S)
                return time.monotonic() - began
            if self._server.has_given_up():
                raise EngineUnavailable("the server ended by itself; its own log says why")
            if time.monotonic() - began > START_S:
                raise EngineUnavailable(f"no {victim} came back within {START_S:.0f} s")
            await asyncio.sleep(0.05)

    def _certify(self, seconds: float) -> Certificate:
        load, watch = self._load, self._watch
        num_hits = self._num_hits if self._plan.has_load else watch.num_hits()
        faults = [*load.faults, *watch.faults]
        if not sum(self._kills.values()):
            faults.append("nothing was killed: a longer --duration or a shorter --every")
        elif not num_hits:
            faults.append("no kill hit the middle of a token stream: this run has shown nothing")
        if load.num_delivered != len(load.seen):
            faults.append(f"{len(load.seen)} rollouts accepted, {load.num_delivered} delivered")
        return Certificate(
            seconds=seconds,
            kills=self._kills,
            num_in_mid_stream=num_hits,
            accepted=len(load.seen),
            delivered=load.num_delivered,
            acknowledged=load.num_acknowledged,
            duplicates=load.num_duplicates,
            regenerated_tokens=load.num_identical_tokens,
            watched=watch.num_watched,
            slowest_return_s=self._slowest_s,
            faults=faults,
            has_load=self._plan.has_load,
        )


def run_chaos(plan: Plan) -> int:
    """Run and print; returns the exit code."""
    certificate = asyncio.run(run(plan))
    sys.stdout.writelines(line + "\n" for line in certificate.lines())
    sys.stdout.write(f"kill log: {plan.kill_log}\n")
    return 1 if certificate.faults else 0


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
