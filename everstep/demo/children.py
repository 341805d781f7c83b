"""Processes of a demo: started, started again where somebody killed them, ended with it."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ..engine.errors import EverstepError

_PATIENCE_S = 15.0
# between two deaths that have nothing in between something is wrong that a start does not mend
_MOST_DEATHS = 20
Say = Callable[[str], None]


class ChildFailed(EverstepError):
    """A command of the demo ended by itself, with an error."""


class Child:
    """`everstep …` in a process of its own, whose output goes into a file.

    name     for people
    command  without `everstep`; it must go on where it was when it is given again
    say      told of deaths, one line
    Raises ChildFailed with the command's own last line.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, *, say: Say = lambda _: None
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._command, self._folder, self._say = list(command), folder, say
        self._process: subprocess.Popen[bytes] | None = None
        self.num_deaths = 0

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "everstep.demo.child", *self._command],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the demo, which ends its children in order
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.pid

    def is_done(self) -> bool:
        """Whether it ended well. One that was killed is started again first."""
        assert self._process is not None, "it was not started"
        code = self._process.poll()
        if code is None or code == 0:
            return code == 0
        self._let_go()
        if code > 0 or self.num_deaths == _MOST_DEATHS:
            raise ChildFailed(f"{self.name}: {self._last_line()} (all of it: {self.log})")
        self.num_deaths += 1
        word = signal.Signals(-code).name
        self._say(f"{self.name} was killed by {word}; it goes on as a new process")
        self.start()
        return False

    def end(self) -> None:
        """Interrupt it, and wait until it is gone. Idempotent."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        self._let_go()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _let_go(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "")
