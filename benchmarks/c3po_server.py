"""benchmarks/c3po.py server: short rollouts over HTTP, and how full the steps of the server are.

A server of a tiny model, and the driver of `everstep rollout` over its /rollouts API. Steps, tokens
and requests are counted, which no other work on the machine changes much; processor time is that of
each process.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import c3po_engine
import httpx
from c3po_engine import GROUP, C3po, forced
from msgspec import Struct

from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.processes import core_of
from everstep.rollout.http_engine import HttpEngine
from everstep.trainer_bridge.c3po.comparison import retention_without_purges
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.run.engine import Work

WARM_UP = 4
_TICKS = os.sysconf("SC_CLK_TCK")
HEADER = (
    *("Ω", "median", "rollouts", "tokens", "rollouts per step", "of Ω", "requests per rollout"),
    *("front ms", "core ms", "driver ms", "tok/s"),
)


class Usage(Struct):
    """What there was by a moment: of the server, of the requests to it, and processor seconds."""

    steps: float
    tokens: float
    requests: Counter[str]
    front_s: float
    core_s: float
    driver_s: float


class ForcedServer(HttpEngine):
    """Every sample and attempt has a length of its own; requests are counted."""

    lengths_: CappedLognormal

    def __init__(self, url: str, lengths: CappedLognormal) -> None:
        super().__init__(url, wait_s=30.0, is_known=False)
        self.lengths_ = lengths
        self.requests: Counter[str] = Counter()
        self._http.event_hooks = {"request": [self._count]}

    async def _count(self, request: httpx.Request) -> None:
        path = re.sub(r"/(ro|bud)-[^/]+", "/{id}", request.url.path)
        self.requests[f"{request.method} {path}"] += 1

    async def submit(self, work: Work) -> str:
        return await super().submit(forced(work, self.lengths_))

    async def close(self) -> None:
        """One engine for several runs."""


class Server:
    """`everstep serve` of a small checkpoint."""

    def __init__(self, folder: Path, args: argparse.Namespace, num_seqs: int) -> None:
        checkpoint = make_checkpoint(folder / "model", seed=1)
        command = [sys.executable, "-m", "everstep", "serve", str(checkpoint), "--port"]
        command += [str(args.port), "--num-threads", "1", "--max-num-seqs", str(num_seqs)]
        command += ["--max-model-len", "1024", "--journal", str(folder / "journal.db")]
        self.url = f"http://127.0.0.1:{args.port}"
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def ready(self) -> None:
        while True:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, "the server has ended"
            time.sleep(0.1)

    def usage(self, requests: Counter[str]) -> Usage:
        # the core's counters come now and then
        time.sleep(c3po_engine.STATS_S)
        text = httpx.get(f"{self.url}/metrics").text
        core = core_of(self.process.pid)
        assert core is not None
        return Usage(
            _metric(text, "everstep:steps_total"),
            _metric(text, "everstep:generation_tokens_total"),
            requests.copy(),
            _processor_s(self.process.pid),
            _processor_s(core),
            time.process_time(),
        )


def _metric(text: str, name: str) -> float:
    [value] = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(value)


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def _measure(server: Server, folder: Path, args: argparse.Namespace) -> None:
    lengths = CappedLognormal(median=args.median, ratio=args.ratio)
    budget = round(args.capacity * lengths.mean)
    retention = retention_without_purges(lengths.cap, budget=budget, capacity=args.capacity)
    engine = ForcedServer(server.url, lengths)
    run = C3po(
        engine,
        folder,
        lengths,
        retention,
        args.capacity,
        num_phases=args.phases,
        has_standby=not args.no_standby,
    )
    await run.run(WARM_UP)
    before = await asyncio.to_thread(server.usage, engine.requests)
    phase = await run.run(args.iterations)
    after = await asyncio.to_thread(server.usage, engine.requests)
    steps, tokens = after.steps - before.steps, after.tokens - before.tokens
    requests = after.requests - before.requests
    rollouts = phase.delivered / lengths.mean
    cells = [
        str(args.capacity),
        str(args.median),
        f"{rollouts:.0f}",
        f"{tokens:.0f}",
        f"{tokens / steps:.1f}",
        f"{100 * tokens / steps / args.capacity:.0f} %",
        f"{requests.total() / rollouts:.2f}",
        *(
            f"{1e3 * (getattr(after, name) - getattr(before, name)) / rollouts:.1f}"
            for name in ("front_s", "core_s", "driver_s")
        ),
        f"{tokens / phase.seconds:.0f}",
    ]
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    print("| " + " | ".join(cells) + " |")
    print("\nprocessor time is per rollout; requests by kind, per rollout:")
    for kind, count in requests.most_common():
        print(f"    {count / rollouts:6.2f}  {kind}")
    print(f"\nload {os.getloadavg()[0]:.1f} at the end", flush=True)
    await run.close()
    await engine._http.aclose()


def run(args: argparse.Namespace) -> None:
    if args.capacity % GROUP:
        raise SystemExit(f"--capacity must be a multiple of {GROUP}, the samples of a group")
    with tempfile.TemporaryDirectory(prefix="everstep-c3po-server-") as name:
        folder = Path(name)
        server = Server(folder, args, args.capacity)
        try:
            server.ready()
            asyncio.run(_measure(server, folder, args))
        finally:
            server.process.terminate()
            server.process.wait(60)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("server", help="over HTTP: places run, requests, processor time")
    parser.add_argument("--capacity", type=int, default=16, help="Ω")
    parser.add_argument("--median", type=int, default=c3po_engine.MEDIAN, help="tokens")
    parser.add_argument("--ratio", type=int, default=4, help="cap / median")
    parser.add_argument(
        "--phases", type=float, default=1.0, help="Φ, in lengths of all places one after another"
    )
    parser.add_argument(
        "--no-standby", action="store_true", help="as with several servers: nobody waits in them"
    )
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--port", type=int, default=8731)
    parser.set_defaults(run=run)
