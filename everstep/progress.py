"""Progress of long work: a bar on a terminal, plain lines otherwise. Always on standard error."""

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from .engine.messages import Loading
    from .server.batches.run import Counts

LINE_EVERY_S = 10.0
# a hair below 5 %, so that rounding does not skip a line
LINE_EVERY_FRACTION = 0.05 - 1e-9


def duration(seconds: float | None) -> str:
    """`8.2 s`, `3 min 05 s`, `2 h 10 min`; a dash for the unknown."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Stages:
    """Shows (stage, done, total): the `Progress` of hub, convert, checks and loading.

    Without a terminal: one line when a stage is done, and one every 10 s before.
    """

    def __init__(
        self, stream: IO[str] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._stage = ""
        self._began_s = self._said_s = clock()
        self._is_said = True
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if self._stream.isatty():
            self._bar = _bar(self._stream)
            self._bar.start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage, self._is_said = stage, False
            self._began_s = self._said_s = self._clock()
            if self._bar is not None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(stage)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None)
        elif not self._is_said:
            self._say(done, total)

    def on_loading(self, loading: "Loading") -> None:
        """A core's word of how far it is."""
        self(loading.stage, loading.done, loading.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _say(self, done: int, total: int) -> None:
        now = self._clock()
        if done >= total:
            self._is_said = True
            self._write(f"{self._stage}: done in {duration(now - self._began_s)}")
        elif now - self._said_s >= LINE_EVERY_S:
            self._said_s = now
            self._write(f"{self._stage}: {100 * done / total:.0f} %")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _bar(stream: IO[str]) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
    )


def live_view(stream: IO[str]) -> "Live":
    """A picture on a terminal that changes when it is told to."""
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(file=stream, highlight=False), auto_refresh=False)


def panel(title: str, rows: Iterable[tuple[str, str]]) -> "Panel":
    """(what, how it stands), line by line, in a frame."""
    from rich import box
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return Panel(table, title=title, box=box.ROUNDED, expand=False)


class BatchProgress:
    """Shows the counts of a batch: a bar with tokens/s and time left, or a line per 5 % or 10 s."""

    def __init__(
        self, stream: IO[str] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._said_s = clock()
        self._said_fraction = 0.0
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __call__(self, counts: "Counts") -> None:
        if self._stream.isatty():
            # not before: until then the stages of loading have the terminal
            if self._bar is None:
                self._begin()
            assert self._bar is not None
            assert self._task is not None
            self._bar.update(self._task, completed=counts.fraction, description=describe(counts))
            return
        now = self._clock()
        is_due = (
            now - self._said_s >= LINE_EVERY_S
            or counts.fraction - self._said_fraction >= LINE_EVERY_FRACTION
            or self._said_fraction < counts.fraction == 1.0
        )
        if is_due:
            self._said_s, self._said_fraction = now, counts.fraction
            self._stream.write(f"batch: {100 * counts.fraction:.0f} %  {describe(counts)}\n")
            self._stream.flush()

    def _begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn("batch"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=Console(file=self._stream),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=1.0)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(counts: "Counts") -> str:
    """`120 answered, 1 error, 40 done before, 61 tok/s, 2 min 10 s left`."""
    words = [f"{counts.num_answered} answered"]
    if counts.num_errors:
        words.append(f"{counts.num_errors} error{'s' if counts.num_errors > 1 else ''}")
    if counts.num_skipped:
        words.append(f"{counts.num_skipped} done before")
    words.append(f"{counts.tokens_per_s:.0f} tok/s")
    if counts.fraction < 1.0 and counts.eta_s is not None:
        words.append(f"{duration(counts.eta_s)} left")
    return ", ".join(words)
