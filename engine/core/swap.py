"""The core's side of a change of weights: staged beside generation, then flipped between two steps.

A stager makes the next weights in pieces of a millisecond or two. They are run between steps, a
slice at a time. In the background they get a share of the time that steps take, so that generation
goes on at nearly its speed; at full priority there is a slice between every two steps; while there
is nothing to generate they are run one after another.
"""

import time
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Any, Protocol

import msgspec

from .. import log
from ..errors import EverstepError, WeightsRefused
from ..messages import (
    Flip,
    Flipped,
    FromCore,
    Priority,
    Refused,
    Stage,
    Staged,
    StageReport,
    Staging,
)
from .scheduler import Scheduler

Part = tuple[str, int, int]
"""(name of the part, done, total), after each piece of work."""
PROGRESS_EVERY_S = 0.25
# how long a step may be held up at once, but for the last piece
SLICE_S = 0.004
FULL_SLICE_S = 0.006
Clock = Callable[[], float]


class Prepared(Protocol):
    """Weights that a stager has made, checked and ready to run."""

    @property
    def digest(self) -> str: ...


class Stager(Protocol):
    """Makes weights and puts them in place (engine/model/staging.py; FakeStager in tests)."""

    def stage(self, order: Stage) -> Generator[Part, None, tuple[Prepared, StageReport]]:
        """Read, check and score, a piece at a time. Raises WeightsRefused, CheckpointError,
        ConfigError. The report's times are filled in by the caller."""
        ...

    def flip(self, prepared: Any) -> Generator[None, None, None]:
        """Serve what was prepared, at once; then give back the old weights, a piece at a time."""
        ...

    def discard(self) -> Generator[None, None, None]:
        """Give back what was staged, wholly or in part, and not flipped to, a piece at a time."""
        ...


class Swap:
    """At most one version is staged, or being staged. Knows no transport and no tensors.

    share  of the time of steps that pieces of work take in the background
    """

    def __init__(
        self,
        stager: Stager,
        scheduler: Scheduler,
        *,
        share: float,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._stager = stager
        self._scheduler = scheduler
        self._share = share
        self._clock = clock
        self._credit_s = 0.0
        self._priority: Priority = "background"
        self._work: _Work | None = None
        self._staged: tuple[Stage, Prepared] | None = None
        self._leftovers: Iterator[None] | None = None
        self._flipped: Flipped | None = None
        # of the step loop: when the last step ended, None if there was nothing to do since
        self._idle_since_s: float | None = None
        self._step_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether `work` has something to do."""
        return self._work is not None or self._leftovers is not None or self._flipped is not None

    # --- what the front asks for ---------------------------------------------------------

    def stage(self, order: Stage) -> list[FromCore]:
        answers = self._give_up("another version is staged instead")
        self._work = _Work(order, self._stager.stage(order), self._clock())
        self._priority = order.priority
        return answers

    def unstage(self, version: int) -> list[FromCore]:
        """Unknown numbers are ignored."""
        work, staged = self._work, self._staged
        order = work.order if work is not None else staged[0] if staged is not None else None
        if order is None or order.version != version:
            return []
        return self._give_up("it was given up (unstage)")

    def flip(self, order: Flip) -> list[FromCore]:
        """Between two steps; `Flipped` comes with the first step under the new weights."""
        if self._staged is None or self._staged[0].version != order.version:
            return [_not_flipped(order, f"version {order.version} is not staged here")]
        _, prepared = self._staged
        if prepared.digest != order.digest:
            staged = prepared.digest[:12]
            return [
                _not_flipped(
                    order,
                    f"version {order.version} is staged with the digest {staged}, "
                    f"not {order.digest[:12]}",
                )
            ]
        started = self._clock()
        self._staged = None
        self._give_back(self._stager.flip(prepared))
        counts = self._scheduler.flip(prepared.digest, order.kv)
        self._flipped = Flipped(
            version=order.version,
            digest=prepared.digest,
            kv=order.kv,
            stall_s=0.0,
            flip_s=self._clock() - started,
            steps_lost=0.0,
            kept_rollouts=counts.kept_rollouts,
            dropped_tokens=counts.dropped_tokens,
        )
        return []

    def _give_up(self, reason: str) -> list[FromCore]:
        work, self._work, self._staged = self._work, None, None
        if work is not None:
            work.pieces.close()
        self._give_back(self._stager.discard())
        if work is None:
            return []
        return [Refused(work.order.version, f"version {work.order.version}: {reason}")]

    def _give_back(self, pieces: Iterator[None]) -> None:
        """When there is time for it, but before another version is read."""
        self._leftovers = pieces if self._leftovers is None else chain(self._leftovers, pieces)

    # --- around steps ----------------------------------------------------------------------

    def before_step(self) -> list[FromCore]:
        """A step begins: the first after a flip tells how long generation stood still."""
        flipped, self._flipped = self._flipped, None
        if flipped is None:
            return []
        if self._idle_since_s is not None:
            flipped.stall_s = self._clock() - self._idle_since_s
            if self._step_s:
                flipped.steps_lost = flipped.stall_s / self._step_s
        return [flipped]

    def after_step(self, started_s: float, ended_s: float) -> None:
        self._idle_since_s = ended_s
        seconds = ended_s - started_s
        self._step_s = 0.8 * self._step_s + 0.2 * seconds if self._step_s else seconds
        if self._priority == "full":
            self._credit_s = FULL_SLICE_S
        elif self._work is not None or self._leftovers is not None:
            # a piece may cost more than a step has left; what was overdrawn is waited for
            self._credit_s = min(self._credit_s + self._share * seconds, SLICE_S)

    def nothing_to_run(self) -> None:
        """No step: nothing stands still, and all of the time is there for work."""
        self._idle_since_s = None
        self._credit_s = SLICE_S

    def work(self) -> list[FromCore]:
        """A slice of work, if the steps have left time for it; returns the news."""
        news: list[FromCore] = []
        if self._idle_since_s is None:
            news += self.before_step()
        began = now = self._clock()
        while self._credit_s > 0:
            if self._leftovers is not None:
                if next(self._leftovers, self) is self:
                    self._leftovers = None
            elif self._work is not None:
                news += self._advance(self._work, began, now)
            else:
                break
            before, now = now, self._clock()
            self._credit_s -= now - before
        if self._work is not None and now > began:
            self._work.note_slice(now - began)
        return news

    def _advance(self, work: "_Work", slice_began_s: float, began_s: float) -> list[FromCore]:
        """A piece that begins now."""
        order = work.order
        try:
            part = next(work.pieces)
        except StopIteration as stop:
            self._work = None
            prepared, report = stop.value
            self._staged = order, prepared
            now = self._clock()
            work.note_piece(now - began_s)
            work.note_slice(now - slice_began_s)
            return [Staged(order.version, prepared.digest, work.timed(report, now))]
        except Exception as error:
            # whatever it is: what serves goes on serving
            self._work = None
            self._give_back(self._stager.discard())
            return [_refusal(order, error)]
        now, is_new = self._clock(), part[0] != work.part
        work.part = part[0]
        work.note_piece(now - began_s)
        if now - work.told_s < PROGRESS_EVERY_S and not is_new:
            return []
        work.told_s = now
        return [Staging(order.version, *part)]


class _Work:
    """A version that is being staged."""

    def __init__(
        self,
        order: Stage,
        pieces: Generator[Part, None, tuple[Prepared, StageReport]],
        started_s: float,
    ) -> None:
        self.order = order
        self.pieces = pieces
        self.told_s = 0.0
        self.part = ""
        """That the last piece was of."""
        self._started_s = started_s
        self._busy_s = self._longest_s = 0.0
        self._slices = 0
        self._parts: dict[str, float] = {}

    def note_piece(self, seconds: float) -> None:
        """One of the part that is in hand took so long."""
        self._parts[self.part] = self._parts.get(self.part, 0.0) + seconds

    def note_slice(self, seconds: float) -> None:
        """Steps were held up for so long."""
        self._slices += 1
        self._busy_s += seconds
        self._longest_s = max(self._longest_s, seconds)

    def timed(self, report: StageReport, now_s: float) -> StageReport:
        """The report with the times that were noted."""
        return msgspec.structs.replace(
            report,
            seconds=now_s - self._started_s,
            busy_seconds=self._busy_s,
            parts=self._parts,
            slices=self._slices,
            longest_slice_s=self._longest_s,
        )


def _not_flipped(order: Flip, reason: str) -> Refused:
    return Refused(order.version, reason, what="flip")


def _refusal(order: Stage, error: Exception) -> Refused:
    """One line, with what is known of the place."""
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, EverstepError):
        message = f"{order.path}: {type(error).__name__}: {message}"
    tensor = layer = None
    if isinstance(error, WeightsRefused):
        tensor, layer = error.tensor, error.layer
    log.event("weights.refused", level="warning", version=order.version, reason=message)
    return Refused(order.version, message, tensor, layer)
