"""What `everstep rollout` shows while it runs, on standard error: a live view on a terminal, plain
lines otherwise; and the tables at its end."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING

from ..progress import LINE_EVERY_S, duration, live_view, panel
from ..trainer_bridge.c3po.ledger import Books
from ..trainer_bridge.run.report import EngineReport, Lengths, Report

if TYPE_CHECKING:
    from rich.live import Live
    from rich.panel import Panel

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 24
_METER_WIDTH = 40
ACCOUNTS = ("delivered", "carried", "held", "purged", "regenerated", "cancelled")


class RolloutView:
    """Takes reports and notes, and shows them.

    Without a terminal: a line when an iteration is over, one every 10 s in between.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._limit = limit
        self._clock = clock
        self._said_s = clock()
        self._iteration: int | None = None
        self._report: Report | None = None
        self._live: Live | None = None
        if self._stream.isatty():
            self._live = live_view(self._stream)
            self._live.start()

    def __call__(self, report: Report) -> None:
        first = self._iteration is None
        is_over = not first and report.iteration != self._iteration
        self._iteration, self._report = report.iteration, report
        if self._live is not None:
            self._live.update(picture(report, self._limit), refresh=True)
            return
        now_s = self._clock()
        if is_over and report.last_books is not None:
            self._said_s = now_s
            self._write(iteration_line(report.last_books, report))
        elif now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            self._write(state_line(report))

    def note(self, text: str) -> None:
        """A line for people, above the live view."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            self._write(text)

    def close(self) -> None:
        """Leave the last picture where it is. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def iteration_line(books: Books, report: Report) -> str:
    """`iteration 3: 4096 sampled | delivered 2310, …`: the books of one iteration."""
    accounts = ", ".join(f"{name} {getattr(books, name)}" for name in ACCOUNTS)
    return (
        f"iteration {books.iteration}: {books.sampled} sampled | {accounts} | "
        f"{report.num_trajectories} trajectories, {report.tokens_per_s:.0f} tok/s"
    )


def state_line(report: Report) -> str:
    """What plain lines say between two iterations."""
    words = [
        f"iteration {report.iteration}",
        f"Φ {report.used}/{report.budget}",
        f"pool {report.num_live}/{report.capacity}",
        f"held {report.num_held}",
        f"lengths {lengths_text(report.live)}",
        f"{report.tokens_per_s:.0f} tok/s",
    ]
    return "  ".join(words)


def picture(report: Report, limit: int | None) -> "Panel":
    """The live view."""
    return panel("everstep rollout", picture_rows(report, limit))


def picture_rows(report: Report, limit: int | None) -> list[tuple[str, str]]:
    """(what, how it stands), line by line."""
    of = f" of {limit}" if limit is not None else ""
    total = report.total
    rows = [
        ("iteration", f"{report.iteration}{of}, {report.phase}; {duration(report.elapsed_s)}"),
        ("Φ", f"{meter(report.used, report.budget)}  {report.used}/{report.budget} {report.mode}"),
        (
            "pool",
            f"{report.num_live}/{report.capacity} under way, {report.num_held} held for their "
            f"groups, {report.num_waiting} waiting",
        ),
        ("delivered", f"{report.num_groups} groups, {report.num_trajectories} trajectories"),
        ("running", f"{histogram(report.live)}  {lengths_text(report.live)}"),
        ("ended", f"{histogram(report.ended)}  {lengths_text(report.ended)}"),
        ("speed", f"{report.tokens_per_s:.0f} tok/s"),
        ("tokens", "  ".join(f"{name} {getattr(total, name)}" for name in ACCOUNTS)),
        ("waste", waste_text(total)),
        ("staleness", staleness_text(report)),
    ]
    if report.num_bad_lines or report.num_abandoned:
        text = f"{report.num_bad_lines} bad lines, {report.num_abandoned} prompts given up"
        rows.append(("trouble", text))
    if len(report.engines) > 1:
        rows += [(engine.name, engine_text(engine)) for engine in report.engines]
    return rows


def meter(used: int, budget: int) -> str:
    """A bar; in mode completed Φ may be passed."""
    filled = min(_METER_WIDTH, _METER_WIDTH * used // budget)
    return "█" * filled + "░" * (_METER_WIDTH - filled)


def histogram(lengths: Sequence[int]) -> str:
    """Rollouts by length, from 0 to the longest, in equal bins."""
    most = max(lengths, default=0)
    if not most:
        return " " * _BINS
    counts = [0] * _BINS
    for length in lengths:
        counts[min(_BINS - 1, length * _BINS // (most + 1))] += 1
    top = max(counts)
    return "".join(_BARS[(len(_BARS) - 1) * count // top] if count else " " for count in counts)


def lengths_text(lengths: Sequence[int]) -> str:
    """`p50 310, p90 1204, max 4096`."""
    found = Lengths.of(lengths)
    return "-" if found is None else f"p50 {found.p50}, p90 {found.p90}, max {found.most}"


def waste_text(total: Books) -> str:
    """Tokens that nobody will train on, of all that were sampled."""
    share = f"{total.wasted / total.sampled:.1%}" if total.sampled else "-"
    return f"{total.wasted} of {total.sampled} tokens ({share})"


def staleness_text(report: Report) -> str:
    """Versions between what serves and the oldest token, and how often who runs was cut."""
    ages = ", ".join(f"{count} × {age}" for age, count in sorted(report.ages.items()))
    return f"{report.staleness} versions; cut so often: {ages or '-'}"


def engine_text(engine: EngineReport) -> str:
    if engine.is_away:
        return "stays away"
    lease = "no lease"
    if engine.leased is None:
        lease = f"lease {engine.used}, open"
    elif engine.leased:
        lease = f"lease {engine.used}/{engine.leased}"
    return f"{engine.num_live} under way, {lease}"


def books_rows(
    books: Sequence[Books], total: Books
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): the ledger by iteration, the last ones, and the whole run."""
    # eight columns on a terminal of 80
    short = {"regenerated": "regen.", "cancelled": "cancel."}
    header = ("it.", "sampled", *(short.get(name, name) for name in ACCOUNTS))
    shown = [
        (str(row.iteration), str(row.sampled), *(str(getattr(row, name)) for name in ACCOUNTS))
        for row in books[-_SHOWN_BOOKS:]
    ]
    if len(books) > _SHOWN_BOOKS:
        shown.insert(0, ("…",) + ("",) * (len(header) - 1))
    shown.append(("run", str(total.sampled), *(str(getattr(total, name)) for name in ACCOUNTS)))
    return header, shown


_SHOWN_BOOKS = 20
