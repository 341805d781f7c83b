"""What a run shows of itself while it goes on: pools, Φ, lengths, speed, waste, staleness."""

import asyncio
import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from msgspec import Struct

from ...engine.errors import EverstepError
from ...engine.rollout import Rollout
from ..c3po.ledger import Books
from ..c3po.words import Held, Live, oldest_of
from .engine import Engine
from .state import RunState

REPORT_EVERY_S = 0.5
GLANCE_S = 2.0
# speed is that of the last so many seconds
_WINDOW_S = 10.0
# lengths of so many endings are remembered
_MAX_LENGTHS = 4096


class EngineReport(Struct, frozen=True):
    """One engine. used, leased: tokens of the lease that it holds; None: as many as come."""

    name: str
    is_away: bool
    num_live: int
    used: int
    leased: int | None


class Lengths(Struct, frozen=True):
    """Output tokens per rollout: median, 90th percentile, largest, and how many rollouts."""

    count: int
    p50: int
    p90: int
    most: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths | None":
        """None where there are none."""
        if not lengths:
            return None
        ordered = sorted(lengths)
        return cls(len(ordered), _quantile(ordered, 0.5), _quantile(ordered, 0.9), ordered[-1])


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Report(Struct, frozen=True, kw_only=True):
    """The run at this moment.

    used          tokens of this iteration that budgets count
    num_live      rollouts that have a place: of the pool the first Ω
    num_held      samples that ended and wait for their group
    num_waiting   samples without a place: in the stream, or standing by in an engine
    live, ended   lengths of who has begun, and of the last who ended
    total         the ledger of the run; what grows now is in it once it is told
    staleness     version that serves minus that of the oldest token under way
    ages          retention → rollouts that have a place
    """

    iteration: int
    phase: str
    mode: str
    budget: int
    used: int
    capacity: int
    num_live: int
    num_held: int
    num_waiting: int
    num_groups: int
    num_trajectories: int
    num_abandoned: int
    num_bad_lines: int
    live: Sequence[int]
    ended: Sequence[int]
    total: Books
    lost_budget: int
    version: int | None
    staleness: int
    ages: Mapping[int, int]
    engines: Sequence[EngineReport]
    tokens_per_s: float
    elapsed_s: float
    last_books: Books | None


class Reporter:
    """Looks at state and engines now and then. Nothing depends on it."""

    def __init__(
        self,
        state: RunState,
        engines: Mapping[str, Engine],
        on_report: Callable[[Report], None],
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._engines = engines
        self._on_report = on_report
        self._clock = clock
        self._began_s = clock()
        self._used: dict[str, int] = {}
        """Budget → tokens, of those that are open."""
        self._live: dict[str, list[int]] = {}
        self._ended: deque[int] = deque(maxlen=_MAX_LENGTHS)
        self._seen: deque[tuple[float, int]] = deque()

    def note_ended(self, rollout: Rollout) -> None:
        self._ended.append(len(rollout.output_ids))

    def note_iteration(self) -> None:
        """An iteration is over."""
        self._used.clear()
        self.report()

    async def run(self) -> None:
        """Report until it is cancelled."""
        while True:
            await asyncio.gather(*(self._glance(name) for name in self._state.engines))
            self.report()
            await asyncio.sleep(REPORT_EVERY_S)

    async def _glance(self, name: str) -> None:
        """What an engine knows that nobody has told yet."""
        engine, state = self._engines[name], self._state
        ids = [p.rollout_id for p in state.places.values() if p.engine == name]
        budgets = [v.budget_id for v in state.active_leases() if v.engine == name]
        with contextlib.suppress(EverstepError, TimeoutError):
            async with asyncio.timeout(GLANCE_S):
                for budget_id in budgets:
                    if budget_id is not None:
                        self._used[budget_id] = (await engine.budget(budget_id, 0.0)).used
                known = [rollout_id for rollout_id in ids if rollout_id is not None]
                self._live[name] = await engine.lengths(state.pool, known) if known else []

    def report(self) -> None:
        """Say how it stands."""
        state, machine = self._state, self._state.machine
        now_s, used = self._clock(), self._used_now()
        done = sum(books.sampled for books in state.books) + used
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and self._seen[0][0] < now_s - _WINDOW_S:
            self._seen.popleft()
        since_s, before = self._seen[0]
        placed = list(islice(machine.pool.values(), machine.config.capacity))
        ages = Counter(live.retention for live in placed)
        self._on_report(
            Report(
                iteration=machine.iteration,
                phase=machine.phase,
                mode=machine.config.mode,
                budget=machine.config.budget,
                used=used if machine.config.mode == "generated" else machine.counted,
                capacity=machine.config.capacity,
                num_live=len(placed),
                num_held=sum(map(len, machine.hold.values())),
                num_waiting=len(machine.stream) + len(machine.pool) - len(placed),
                num_groups=state.tally.num_groups,
                num_trajectories=state.tally.num_trajectories,
                num_abandoned=len(state.abandoned),
                num_bad_lines=len(state.bad_lines),
                live=[n for name in state.engines for n in self._live.get(name, ()) if n]
                if machine.pool
                else [],
                ended=list(self._ended),
                total=machine.total,
                lost_budget=state.tally.lost_budget,
                version=machine.version,
                staleness=self._staleness(),
                ages=ages,
                engines=[self._engine(name) for name in self._engines],
                tokens_per_s=(done - before) / (now_s - since_s) if now_s > since_s else 0.0,
                elapsed_s=now_s - self._began_s,
                last_books=machine.last_books,
            )
        )

    def _used_now(self) -> int:
        """Of this iteration: what leases came to, and what open ones have come to by now."""
        return sum(
            lease.used if not lease.is_active else self._used.get(lease.budget_id or "", 0)
            for lease in self._state.leases.values()
            if lease.iteration == self._state.machine.iteration
        )

    def _staleness(self) -> int:
        machine = self._state.machine
        members: list[Live | Held] = [*machine.pool.values()]
        members += (held for found in machine.hold.values() for held in found.values())
        oldest = oldest_of(span for member in members for span in member.spans)
        return 0 if oldest is None else max(0, (machine.version or 0) - oldest)

    def _engine(self, name: str) -> EngineReport:
        state = self._state
        active = [lease for lease in state.active_leases() if lease.engine == name]
        lease = active[-1] if active else None
        used = 0 if lease is None else self._used.get(lease.budget_id or "", 0)
        is_away = name not in state.engines
        num_live = state.live().get(name, 0)
        return EngineReport(name, is_away, num_live, used, lease.tokens if lease else 0)
