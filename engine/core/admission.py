"""Live rollouts of a core, and the order in which those that wait are admitted.

Larger priority first; among equals the client that was served the fewest tokens; then arrival.
A rollout that comes back (preempted, resumed, deferred) keeps the place of its arrival.
"""

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..messages import Add
from ..rollout import KVState
from .kv_cache import RolloutKV

if TYPE_CHECKING:
    from .metering import PoolMeter

Move = Literal["running", "preempted", "paused", "queued"]
State = Move | Literal["ended"]


class Share:
    """What a client was given, in tokens computed for it."""

    __slots__ = ("client", "num_active", "served_tokens")

    def __init__(self, client: str) -> None:
        self.client = client
        self.served_tokens = 0
        self.num_active = 0
        """Rollouts that are neither paused nor ended."""


class LiveRollout:
    """The scheduler's books on one rollout, from its Add to its end."""

    __slots__ = (
        "add",
        "admission",
        "arrival",
        "due",
        "followers",
        "follows",
        "has_extras",
        "has_record",
        "id",
        "ids",
        "is_counted_active",
        "is_queued",
        "kv",
        "kv_state",
        "length_before",
        "max_length",
        "meter",
        "min_length",
        "needs_every_row",
        "num_cached_tokens",
        "num_prompt",
        "num_unreported_rows",
        "parent_hash",
        "place",
        "sampling",
        "seed",
        "share",
        "state",
        "stop_ids",
    )

    def __init__(self, add: Add, ids: list[int], kv: RolloutKV, arrival: int) -> None:
        self.add = add
        self.id = add.rollout_id
        self.ids = ids
        """prompt + output; the rows of a plan and the KV's table look at this very list."""
        self.kv = kv
        self.num_prompt = len(add.prompt_ids)
        self.max_length = self.num_prompt + add.max_tokens
        self.stop_ids = frozenset(add.stop_ids)
        sampling = self.sampling = add.sampling
        self.seed = add.seed
        self.min_length = self.num_prompt + sampling.min_tokens
        """Up to here the ids of `add.banned_ids` are not drawn."""
        records_routing = "routing" in sampling.record
        self.needs_every_row = sampling.prompt_logprobs is not None or records_routing
        self.has_extras = self.needs_every_row or bool(sampling.record or sampling.top_logprobs)
        self.state: State = "queued"
        self.kv_state: KVState = "computed"
        """As the front knows it: what its tokens are drawn over (`Segment.kv`)."""
        self.length_before = len(ids)
        """Tokens that it had when the KV that it has was begun, or its prompt's was written again."""
        self.arrival = arrival
        self.admission = 0
        """Running number of its latest admission; 0: never admitted."""
        self.num_unreported_rows = len(ids)
        """See `num_reported_rows`; counted from the end of `ids`, it is 1 as long as it decodes."""
        self.place = 0
        """Written by Decoding: where it stands on the ring of block borders."""
        self.due: int | None = None
        """Written by Decoding: number of the step for which it stands in the calendar."""
        self.num_cached_tokens: int | None = None
        """To be sent with its next tokens."""
        self.follows: LiveRollout | None = None
        """Who is computing its prefix; it waits for that one outside of the queue."""
        self.followers: dict[LiveRollout, int] = {}
        """Who waits → num_computed_tokens from which they need not wait any more."""
        self.parent_hash: bytes | None = None
        """Chain hash under which it is listed as computing a prefix."""
        self.meter: PoolMeter | None = None
        """Of its pool; None: pool ""."""
        self.share: Share = NO_SHARE
        self.is_counted_active = False
        self.is_queued = False
        self.has_record = False
        """Written by WaitingQueue: it is in the queue; it has a record there, valid or not."""

    @property
    def has_drawn(self) -> bool:
        """A token was drawn over the KV that it has; so all but the newest is computed."""
        return len(self.ids) > self.length_before

    @property
    def num_reported_rows(self) -> int:
        """Positions whose rows were computed and reported; recomputing them is not news."""
        return len(self.ids) - self.num_unreported_rows


NO_SHARE = Share("")


class Shares:
    """Fair queueing: tokens served per client, comparable among those that are active.

    A client that becomes active is lifted to the least served active one, so that it neither
    saves up credit while away nor pays for having been alone.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, Share] = {}

    @property
    def num_clients(self) -> int:
        return len(self._by_client)

    def activate(self, rollout: LiveRollout) -> None:
        """The rollout wants to run."""
        if rollout.is_counted_active:
            return
        share = self._by_client.get(rollout.add.client)
        if share is None:
            share = self._by_client[rollout.add.client] = Share(rollout.add.client)
        if share.num_active == 0:
            least = min((s.served_tokens for s in self._active()), default=0)
            share.served_tokens = max(share.served_tokens, least)
        share.num_active += 1
        rollout.share, rollout.is_counted_active = share, True

    def deactivate(self, rollout: LiveRollout) -> None:
        """It is paused or has ended."""
        if not rollout.is_counted_active:
            return
        rollout.is_counted_active = False
        rollout.share.num_active -= 1
        if rollout.share.num_active == 0:
            self._forget_idle()

    def _active(self) -> Iterator[Share]:
        return (share for share in self._by_client.values() if share.num_active)

    def _forget_idle(self) -> None:
        """Drop the idle clients that would be lifted on their return anyway."""
        least = min((share.served_tokens for share in self._active()), default=None)
        for client in [
            share.client
            for share in self._by_client.values()
            if share.num_active == 0 and (least is None or share.served_tokens <= least)
        ]:
            del self._by_client[client]


class WaitingQueue:
    """Rollouts that want to be admitted, best first.

    Each line (one client at one priority) is a heap by arrival. Who leaves keeps its record there,
    invalid, until it comes back to it or the record reaches the front.
    """

    def __init__(self) -> None:
        self._levels: dict[int, dict[str, list[tuple[int, LiveRollout]]]] = {}
        self._num_waiting = 0
        self._num_stale = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, rollout: LiveRollout) -> None:
        assert not rollout.is_queued, f"{rollout.id} is in the queue already"
        rollout.is_queued = True
        self._num_waiting += 1
        if rollout.has_record:
            self._num_stale -= 1
            return
        rollout.has_record = True
        line = self._levels.setdefault(rollout.add.priority, {}).setdefault(rollout.add.client, [])
        heapq.heappush(line, (rollout.arrival, rollout))

    def remove(self, rollout: LiveRollout) -> None:
        assert rollout.is_queued, f"{rollout.id} is not in the queue"
        rollout.is_queued = False
        self._num_waiting -= 1
        self._num_stale += 1
        if self._num_stale > self._num_waiting + 64:
            self._compact()

    def best(self) -> LiveRollout | None:
        """Who is to be admitted next; it stays in the queue."""
        while self._levels:
            priority = max(self._levels)
            lines = self._levels[priority]
            for client, line in list(lines.items()):
                while line and not line[0][1].is_queued:
                    _, rollout = heapq.heappop(line)
                    rollout.has_record = False
                    self._num_stale -= 1
                if not line:
                    del lines[client]
            if lines:
                return min(lines.values(), key=_order)[0][1]
            del self._levels[priority]
        return None

    def _compact(self) -> None:
        for lines in self._levels.values():
            for line in lines.values():
                for _, rollout in line:
                    rollout.has_record = rollout.is_queued
                line[:] = [record for record in line if record[1].is_queued]
                heapq.heapify(line)
        self._num_stale = 0


def _order(line: list[tuple[int, LiveRollout]]) -> tuple[int, int]:
    arrival, rollout = line[0]
    return rollout.share.served_tokens, arrival
