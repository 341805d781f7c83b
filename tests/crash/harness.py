"""One run of the crash harness: servers that are killed, a client that is not told, a verdict.

    python harness.py --work FOLDER --seconds 60                   as CI does
    python harness.py --work FOLDER --kills 1000                   until that many were killed
    python harness.py --work FOLDER --seconds 600 --cold           servers started as a user's are

It starts a server over a tiny random checkpoint, a client (client.py) that submits, reads and
acknowledges over HTTP, and kills the server or its core with SIGKILL at random moments and at named
points of the code (faults.py), freezes them with SIGSTOP, and now and then kills the client too.
What it killed and when is written to FOLDER/kills.jsonl, outside of everything that is tried. Then
the same rollouts run again with nobody disturbing them, and checker.py judges. The exit code is the
checker's.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from victims import HERE, START_S, Client, Server, SmallDisk

VICTIMS = ("server", "core", "client")

# points where a server may be told to die, and how often each is passed: k is drawn below it
FAILPOINTS = {
    "before_accept": 3,
    "after_accept": 3,
    "before_append": 200,
    "after_append": 200,
    "before_end": 8,
    "after_end": 8,
    "before_ack": 4,
    "after_ack": 4,
    "before_pause": 2,
    "after_pause": 2,
    "before_resume": 2,
    "after_resume": 2,
    "mid_transaction": 300,
    "mid_recovery": 3,
    "before_resubmission": 1,
    "after_recovery": 1,
    "before_compaction": 3,
    "mid_compaction": 3,
    "after_compaction": 3,
    "before_step": 200,
    "after_step": 200,
}


def options(model: Path, journal: Path, port: int) -> list[str]:
    """Few blocks and a small batch, so that rollouts wait, are preempted and share prefixes."""
    return [
        *("serve", str(model), "--port", str(port), "--journal", str(journal), "--seed", "1"),
        *("--max-num-seqs", "12", "--engine.kv.num-blocks", "160", "--engine.num-threads", "1"),
        *("--max-num-batched-tokens", "96", "--max-model-len", "640"),
    ]


@dataclass
class KillLog:
    """The kill log: outside of what is tried, and on the disk before the blow."""

    path: Path

    def write(self, **fields: Any) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps({"at": time.monotonic_ns(), **fields}).encode() + b"\n")


class Nemesis:
    """What happens to the processes, from one random generator."""

    def __init__(
        self, server: Server, log: KillLog, disk: SmallDisk | None, given: argparse.Namespace
    ) -> None:
        self._server, self._log, self._disk, self._given = server, log, disk, given
        self._rng = random.Random(given.seed)

    def start_server(self) -> None:
        """Most servers will die by themselves, at a point of their code, if nothing is faster."""
        faults = ["compact_often", *self._given.fault]
        if self._given.failpoints and self._rng.random() < 0.75:
            for name in self._rng.sample(sorted(FAILPOINTS), 2):
                passing = self._rng.randrange(1, FAILPOINTS[name] + 1)
                faults.append(f"die:{name}:{passing}:{self._log.path}")
        self._server.start(faults)

    def run(self, client: Client) -> None:
        """Until the time is over or enough were killed."""
        end_s = time.monotonic() + self._given.seconds
        while time.monotonic() < end_s and self._count() < self._given.kills:
            self._wait_until_ready()
            pause_s = self._rng.expovariate(1 / self._given.every)
            deadline = time.monotonic() + min(pause_s, 4 * self._given.every)
            while self._server.look() and time.monotonic() < deadline:
                time.sleep(0.005)
            if client.code is not None:
                # the checker will say that it did not come to its end
                return
            if self._server.pid is not None:
                self._strike(client)

    def _count(self) -> int:
        """Those that died at a failpoint have written it down themselves."""
        if not self._log.path.exists():
            return 0
        lines = self._log.path.read_text().splitlines()
        return sum(json.loads(line)["what"] in VICTIMS for line in lines)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._server.look():
            if self._server.pid is None:
                self.start_server()
            if time.monotonic() > deadline:
                raise SystemExit(f"no server within {START_S} s; see server.log")
            time.sleep(0.005)

    def _strike(self, client: Client) -> None:
        what = self._rng.choices(
            ("server", "core", "both", "stop", "client"), self._given.weights, k=1
        )[0]
        core = self._server.core()
        if what in ("core", "both") and core is not None:
            self._kill(core, "core")
        if what in ("server", "both") and self._server.pid is not None:
            self._kill(self._server.pid, "server")
            while self._server.pid is not None:
                self._server.look()
                time.sleep(0.001)
        if what == "stop":
            self._freeze(self._rng.choice((core, self._server.pid)))
        if self._disk is not None and self._rng.random() < 0.3:
            self._fill(self._disk)
        if what == "client":
            self._log.write(what="client", how="random", pid=client.pid)
            client.kill()
            client.start()

    def _fill(self, disk: SmallDisk) -> None:
        """The disk is full for a while; half of the servers die while it is."""
        disk.fill()
        self._log.write(what="full", how="random")
        time.sleep(self._rng.uniform(0.3, 1.5))
        if self._server.pid is not None and self._rng.random() < 0.5:
            self._kill(self._server.pid, "server")
        disk.free()

    def _kill(self, pid: int, what: str) -> None:
        self._log.write(what=what, how="random", pid=pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _freeze(self, pid: int | None) -> None:
        """As a machine that swaps, or an operator's Ctrl-Z; half of them die frozen."""
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._log.write(what="stop", how="random", pid=pid)
            time.sleep(self._rng.uniform(0.05, 1.0))
            os.kill(pid, signal.SIGCONT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def everstep(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of everstep's, as a user gives it."""
    command = [str(Path(sys.executable).with_name("everstep")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make_model(folder: Path) -> Path:
    if not folder.exists():
        made = everstep(
            *("make-checkpoint", str(folder), "--format", "f32"),
            *("--size", "num_hidden_layers=2", "--seed", "3"),
        )
        if made.returncode:
            raise SystemExit(f"no checkpoint: {made.stderr}")
    return folder


def client_command(url: str, history: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(HERE / "client.py"), "--url", url, "--history", str(history)),
        *more,
    ]


def journal_of(work: Path, given: argparse.Namespace) -> Path:
    return (work / "disk" if given.disk else work) / "journal.db"


def harm(work: Path, model: Path, given: argparse.Namespace) -> float:
    """The run with the nemesis; returns its seconds."""
    port = free_port()
    disk = SmallDisk(work / "disk", given.disk) if given.disk else None
    journal = journal_of(work, given)
    server = Server(work, port, options(model, journal, port), is_cold=given.cold)
    client: Client | None = None
    nemesis = Nemesis(server, KillLog(work / "kills.jsonl"), disk, given)
    began = time.monotonic()
    try:
        nemesis.start_server()
        command = client_command(
            f"http://127.0.0.1:{port}",
            work / "history.jsonl",
            *("--seed", str(given.seed), "--stop-file", str(work / "stop")),
            *("--tokens", str(given.tokens)),
        )
        client = Client(command)
        nemesis.run(client)
        took = time.monotonic() - began
        (work / "stop").touch()
        # a client that needs longer is waiting for something that was lost
        deadline = time.monotonic() + given.end
        while client.code is None and time.monotonic() < deadline:
            if not server.look() and server.pid is None:
                server.start(list(given.fault))
            time.sleep(0.01)
        if client.code is None:
            print("the client waits for something that does not come", file=sys.stderr)
    finally:
        if client is not None and client.code is None:
            client.kill()
        server.close()
        if disk is not None:
            shutil.copy(journal, work / "journal.db")
            disk.close()
    starts = sorted(server.start_seconds)
    if starts:
        print(
            f"{server.num_starts} servers started, ready after {starts[len(starts) // 2]:.2f} s "
            f"(median), {starts[-1]:.2f} s (slowest)"
        )
    return took


def calm(work: Path, model: Path) -> None:
    """The same rollouts, undisturbed, in a journal of their own."""
    port = free_port()
    arguments = options(model, work / "unharmed.db", port)
    server = Server(work, port, arguments, is_cold=False)
    try:
        server.start([])
        deadline = time.monotonic() + START_S
        while not server.look():
            if server.pid is None or time.monotonic() > deadline:
                raise SystemExit("no server for the unharmed run; see server.log")
            time.sleep(0.01)
        twins = ("--twins", str(work / "history.jsonl"))
        command = client_command(f"http://127.0.0.1:{port}", work / "unharmed.jsonl", *twins)
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("the unharmed run failed")
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="kill servers and prove that nothing was lost")
    parser.add_argument("--work", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--kills", type=int, default=10**9)
    parser.add_argument("--every", type=float, default=0.5, help="mean seconds between strikes")
    parser.add_argument(
        "--weights",
        type=float,
        nargs=5,
        default=(8, 6, 2, 2, 1),
        metavar="W",
        help="of: server, core, both, SIGSTOP, client",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=300, help="longest rollout")
    parser.add_argument("--cold", action="store_true", help="start servers as a user does")
    parser.add_argument("--no-failpoints", dest="failpoints", action="store_false")
    parser.add_argument("--fault", action="append", default=[], help="plant a bug (faults.py)")
    parser.add_argument(
        "--end", type=float, default=60.0, help="seconds given to the last rollouts"
    )
    parser.add_argument(
        "--no-unharmed", dest="unharmed", action="store_false", help="leave out the undisturbed run"
    )
    parser.add_argument(
        "--disk", type=int, metavar="MIB", help="journal on a small disk, full now and then (root)"
    )
    parser.add_argument("--judge", type=float, default=1.0, help="share of rollouts to recompute")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = make_model(given.work / "model")
    took = harm(given.work, model, given)
    checked = everstep("journal", "check", str(given.work / "journal.db"))
    print(f"everstep journal check: {(checked.stdout + checked.stderr).strip()}")
    command = [
        *(sys.executable, str(HERE / "checker.py"), "--model", str(model)),
        *("--history", str(given.work / "history.jsonl")),
        *("--kills", str(given.work / "kills.jsonl"), "--judge", str(given.judge)),
        *("--json", str(given.work / "report.json")),
    ]
    if given.unharmed:
        calm(given.work, model)
        command += ["--unharmed", str(given.work / "unharmed.jsonl")]
    verdict = subprocess.run(command, check=False)
    print(f"{took:.0f} s under the nemesis")
    return verdict.returncode or checked.returncode


if __name__ == "__main__":
    sys.exit(main())
