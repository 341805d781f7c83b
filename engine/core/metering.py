"""Pools whose output tokens are metered: who of them may run, so that no step draws too many.

A rollout draws at most one token in a step. So a pool of which no more rollouts are in play
(running or waiting) than tokens are left of its limit never draws beyond it, whatever the planner
does. The others are held: they stand as paused ones do until there is room again. Those in play are
the first by `rank`, so that the last tokens go by admission.

A pool may have fewer places than rollouts, too: then the held ones stand by, and the next of them
runs in the step after the one in which a place became free.
"""

from .admission import LiveRollout


class PoolMeter:
    """One pool's: what it drew in this core, and who of it wants to run.

    limit    tokens that this core may draw of it, in all; None: any number
    places   how many may run at once; None: any number
    drawn    tokens that it drew
    members  live ones that the user has not paused
    held     of these: those for which there is no room
    is_due   somebody came while others were held: it may be their turn, or not
    """

    __slots__ = ("drawn", "held", "is_due", "limit", "members", "num_live", "places", "pool")

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.limit: int | None = None
        self.places: int | None = None
        self.drawn = 0
        self.is_due = False
        self.num_live = 0
        self.members: dict[LiveRollout, None] = {}
        self.held: dict[LiveRollout, None] = {}

    @property
    def is_limited(self) -> bool:
        return self.limit is not None or self.places is not None

    @property
    def room(self) -> int:
        """How many may be in play."""
        room = len(self.members) if self.limit is None else max(0, self.limit - self.drawn)
        return room if self.places is None else min(room, self.places)

    @property
    def num_in_play(self) -> int:
        return len(self.members) - len(self.held)

    def enter(self, rollout: LiveRollout) -> None:
        """It wants to run."""
        self.members[rollout] = None
        self.is_due |= bool(self.held)

    def surplus(self) -> list[LiveRollout]:
        """Those in play for which there is no room: the last by rank."""
        if self.is_due:
            self.is_due = False
            first = set(sorted(self.members, key=rank, reverse=True)[: self.room])
            return [one for one in self.members if one not in self.held and one not in first]
        count = self.num_in_play - self.room
        if count <= 0:
            return []
        return sorted((one for one in self.members if one not in self.held), key=rank)[:count]

    def released(self) -> list[LiveRollout]:
        """Those held for which there is room: the first by rank, best first."""
        count = self.room - self.num_in_play
        if count <= 0 or not self.held:
            return []
        return sorted(self.held, key=rank, reverse=True)[:count]


class Meters:
    """The meters of all named pools that have live rollouts or a limit; pool "" has none."""

    def __init__(self) -> None:
        self._by_pool: dict[str, PoolMeter] = {}
        self.limited: dict[PoolMeter, None] = {}
        """Those that have a limit, or had one and hold rollouts that are to be released."""

    def enter(self, rollout: LiveRollout) -> None:
        """A new rollout is on its pool's meter."""
        if rollout.add.pool:
            rollout.meter = self._of(rollout.add.pool)
            rollout.meter.num_live += 1

    def leave(self, rollout: LiveRollout) -> None:
        """It has ended."""
        meter = rollout.meter
        if meter is not None:
            meter.num_live -= 1
            self._forget_idle(meter)

    def set_limit(self, pool: str, limit: int | None, places: int | None) -> PoolMeter:
        """Effective from the next step on."""
        meter = self._of(pool)
        meter.limit, meter.places = limit, places
        if meter.is_limited or meter.held:
            self.limited[meter] = None
        self._forget_idle(meter)
        return meter

    def forget_lifted(self, meter: PoolMeter) -> None:
        """Its limit was lifted, and nobody is held any more."""
        if not meter.is_limited:
            del self.limited[meter]
            self._forget_idle(meter)

    def _of(self, pool: str) -> PoolMeter:
        meter = self._by_pool.get(pool)
        if meter is None:
            meter = self._by_pool[pool] = PoolMeter(pool)
        return meter

    def _forget_idle(self, meter: PoolMeter) -> None:
        if not meter.is_limited and not meter.num_live and meter not in self.limited:
            del self._by_pool[meter.pool]

    def check_invariants(self, live: dict[str, LiveRollout]) -> None:
        """Raise AssertionError unless each meter has its live rollouts, and holds only members."""
        for meter in self._by_pool.values():
            assert meter.num_live == sum(one.meter is meter for one in live.values())
            assert meter.num_live or meter.is_limited or meter in self.limited
            assert set(meter.held) <= set(meter.members) <= set(live.values())
            for one in meter.members:
                assert one.meter is meter
                assert (one in meter.held) == (one.state == "paused"), f"{one.id}: {one.state}"
        for one in live.values():
            assert (one.meter is None) == (not one.add.pool)
            assert one.meter is None or one.state == "paused" or one in one.meter.members


def rank(rollout: LiveRollout) -> tuple[int, bool, int]:
    """Priority; who runs before who waits; then who was admitted, or arrived, first."""
    is_running = rollout.state == "running"
    order = rollout.admission if is_running else rollout.arrival
    return rollout.add.priority, is_running, -order
