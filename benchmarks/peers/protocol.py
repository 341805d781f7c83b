"""What benchmarks/cpu.py and the process of a side say to each other: JSON lines over pipes.

    {"op": "load", "model": path, "threads": 2, "context": 2304, "concurrent": 128}
        → {"version": "…", "path": "how tokens are made"}
    {"op": "run", "prompts": [[ids]], "new_tokens": 128, "seed": 0}
        → {"seconds": 1.5, "tokens": 1024}
    anything that fails → {"error": "one line"}

A driver is a script that calls `serve`; it imports the standard library and its engine alone, for
it runs in a virtual environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Side(Protocol):
    """An engine, as a driver wraps it."""

    def load(self, model: str, *, threads: int, context: int, concurrent: int) -> dict[str, str]:
        """Load `model`; says `version` and `path`."""

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> int:
        """All prompts at once, at temperature 1, EOS ignored; returns the tokens generated.

        A side may have `prepare(concurrent, length)`, which is called before and not timed.
        """


def serve(make: Callable[[], Side]) -> None:
    """Answer the lines of standard input until it ends."""
    # engines print to standard output: what they print goes to standard error, ours to the pipe
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        side = None
        for line in sys.stdin:
            try:
                side = side or make()
                answer = _answer(side, json.loads(line))
            except BaseException as error:
                # whatever ails an engine is a line in the table, not the end of the benchmark
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        close = getattr(side, "close", None)
        if close is not None:
            close()


def _answer(side: Side, ask: dict[str, Any]) -> dict[str, Any]:
    if ask["op"] == "load":
        return side.load(
            ask["model"],
            threads=ask["threads"],
            context=ask["context"],
            concurrent=ask["concurrent"],
        )
    prepare = getattr(side, "prepare", None)
    if prepare is not None:
        prepare(len(ask["prompts"]), len(ask["prompts"][0]) + ask["new_tokens"])
    started = time.perf_counter()
    tokens = side.generate(ask["prompts"], ask["new_tokens"], ask["seed"])
    return {"seconds": time.perf_counter() - started, "tokens": tokens}
