"""A side's process, as benchmarks/cpu.py holds it: asked one line at a time, still in between.

A side that is not asked is stopped (SIGSTOP), with the processes that it started, so that threads
that spin while they wait take nothing from the side that is measured.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent


class SideFailed(Exception):
    """The side cannot do what it was asked: one line for the table."""


class Driver:
    """One side; `log` takes what its engine prints."""

    def __init__(
        self, name: str, python: Path, script: str, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.said: dict[str, str] = {}
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [str(python), str(PEERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def load(
        self, model: Path, *, threads: int, context: int, concurrent: int, limit_s: float
    ) -> None:
        """Raises SideFailed."""
        self.said = self._ask(
            {
                "op": "load",
                "model": str(model),
                "threads": threads,
                "context": context,
                "concurrent": concurrent,
            },
            limit_s,
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, limit_s: float) -> float:
        """Seconds that the side took; raises SideFailed, also if tokens are missing."""
        answer = self._ask(
            {"op": "run", "prompts": prompts, "new_tokens": new_tokens, "seed": 0}, limit_s
        )
        wanted = len(prompts) * new_tokens
        if answer["tokens"] != wanted:
            raise SideFailed(f"{answer['tokens']} tokens instead of {wanted}")
        return float(answer["seconds"])

    def close(self) -> None:
        """End it and what it started. Idempotent."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        # its children too, who may outlive it
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            # what could not be written to a side that is gone
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, message: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(limit_s))
        except (OSError, ValueError):
            raise SideFailed(
                f"it ended (exit {self._process.wait(30)}); see {self._log.name}"
            ) from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer

    def _line(self, limit_s: float) -> bytes:
        """A line of its answers; raises SideFailed when none comes in time, and ends it."""
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + limit_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._signal(signal.SIGKILL)
                    raise SideFailed(f"no answer in {limit_s:.0f} s; ended")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise ValueError
                line += data
        return line

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
