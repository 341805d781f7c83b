"""Where every live rollout of a core is, and the moves between those places.

state       where it is            its KV
queued      queue, or a follower   none; kept or parked after a pause
running     running                in its table
preempted   queue, or a follower   kept (its slot was taken), parked or dropped (its blocks were)
paused      nowhere                kept until memory is short, then parked or dropped

Paused is who the user paused, and who is held because its pool's limit has no room for it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from ..rollout import KVState
from .admission import LiveRollout, Move, Shares, WaitingQueue
from .decoding import Decoding
from .kv_cache import KVCacheManager
from .metering import Meters
from .prefix_watch import PrefixWatch


class Roster:
    """Live rollouts by place. A rollout that leaves `running` frees those that follow it."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self.live: dict[str, LiveRollout] = {}
        self.running: dict[LiveRollout, None] = {}
        """In the order of admission. Each of them decodes or catches up."""
        self.decoding = Decoding(kv.block_size)
        self.catching_up: dict[LiveRollout, None] = {}
        """Running, and nothing was drawn from its newest row yet."""
        self.holders: dict[LiveRollout, None] = {}
        """Not running, yet with blocks."""
        self.waiting = WaitingQueue()
        self.watch = PrefixWatch(kv)
        self.meters = Meters()
        self.unpark_drops: list[str] = []
        """Keys of parked KV whose rollouts have ended; for the next plan."""
        self._shares = Shares()
        self._priorities: Counter[int] = Counter()
        self._moves: list[tuple[str, Move]] = []
        self._kv_moves: list[tuple[str, KVState]] = []

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.watch.num_followers

    @property
    def num_paused(self) -> int:
        return len(self.live) - len(self.running) - self.num_waiting

    def named(self, rollout_ids: Iterable[str] | None) -> Sequence[LiveRollout]:
        """Those of these ids that are live; None: all."""
        if rollout_ids is None:
            return list(self.live.values())
        return [self.live[name] for name in rollout_ids if name in self.live]

    def outranks_somebody(self, priority: int) -> bool:
        """Whether somebody who runs has less than this priority."""
        return bool(self._priorities) and min(self._priorities) < priority

    def least_important_running(self) -> LiveRollout:
        return min(self.running, key=importance)

    # moves

    def enqueue(self, rollout: LiveRollout) -> None:
        """A new rollout, or a resumed one, wants to run; it stands at its arrival's place."""
        self._shares.activate(rollout)
        self.waiting.push(rollout)
        if rollout.meter is not None:
            rollout.meter.enter(rollout)

    def requeue(self, followers: Iterable[LiveRollout]) -> None:
        """Those need not wait for their leader any more."""
        for rollout in followers:
            self.waiting.push(rollout)

    def start(self, rollout: LiveRollout) -> None:
        self.waiting.remove(rollout)
        self.holders.pop(rollout, None)
        self.running[rollout] = self.catching_up[rollout] = None
        self._priorities[rollout.add.priority] += 1
        self._move(rollout, "running")

    def settle(self, rollout: LiveRollout) -> None:
        """A token was drawn from the newest row of one that was catching up: it decodes now."""
        del self.catching_up[rollout]
        self.decoding.join(rollout)

    def preempt(self, rollout: LiveRollout) -> None:
        """Back to the queue, for the moment with its blocks."""
        self._withdraw(rollout)
        self._move(rollout, "preempted")
        self.waiting.push(rollout)
        self._note_holder(rollout)

    def pause(self, rollout: LiveRollout) -> None:
        """The user wants it to stand still, whatever its pool may do."""
        meter = rollout.meter
        if meter is not None:
            meter.members.pop(rollout, None)
            meter.held.pop(rollout, None)
        self._stop(rollout)

    def resume(self, rollout: LiveRollout) -> None:
        """The user does not mind any more."""
        meter = rollout.meter
        if rollout.state == "paused" and (meter is None or rollout not in meter.held):
            self._go_on(rollout)

    def apply_limits(self) -> None:
        """Hold those for whom their pool's limit has no room, let go on those for whom it has."""
        for meter in list(self.meters.limited):
            for rollout in meter.surplus():
                meter.held[rollout] = None
                self._stop(rollout)
            for rollout in meter.released():
                del meter.held[rollout]
                self._go_on(rollout)
            # those let go on were looked at just now
            meter.is_due = False
            self.meters.forget_lifted(meter)

    def _stop(self, rollout: LiveRollout) -> None:
        if rollout.state != "paused":
            self._withdraw(rollout)
            self._shares.deactivate(rollout)
            self._move(rollout, "paused")
            self._note_holder(rollout)

    def _go_on(self, rollout: LiveRollout) -> None:
        self._move(rollout, "queued")
        self.enqueue(rollout)

    def end(self, rollout: LiveRollout, *, is_poisoned: bool = False) -> None:
        """Free all that it holds; poisoned: nobody will share what it computed."""
        self._withdraw(rollout)
        self._shares.deactivate(rollout)
        self.holders.pop(rollout, None)
        parking_key = self._kv.close(rollout.kv, is_poisoned=is_poisoned)
        if parking_key is not None:
            self.unpark_drops.append(parking_key)
        rollout.state = "ended"
        del self.live[rollout.id]
        if rollout.meter is not None:
            rollout.meter.members.pop(rollout, None)
            rollout.meter.held.pop(rollout, None)
            self.meters.leave(rollout)

    def restart(self, rollout: LiveRollout) -> None:
        """Give up its KV, wherever it is: all its tokens are to be computed again, in its turn."""
        if rollout.state == "running":
            self._withdraw(rollout)
            self._move(rollout, "queued")
            self.waiting.push(rollout)
        self.holders.pop(rollout, None)
        parking_key = self._kv.drop_all(rollout.kv)
        if parking_key is not None:
            self.unpark_drops.append(parking_key)

    def note_kv(self, rollout: LiveRollout, state: KVState) -> None:
        """From here on it draws over other KV than the front knows of."""
        if rollout.kv_state != state:
            rollout.kv_state = state
            self._kv_moves.append((rollout.id, state))

    def take_kv_moves(self) -> list[tuple[str, KVState]]:
        moves, self._kv_moves = self._kv_moves, []
        return moves

    def take_moves(self) -> list[tuple[str, Move]]:
        moves, self._moves = self._moves, []
        return moves

    def forget_moves(self, rollout_ids: set[str]) -> None:
        """The front has ended these itself: it is not told of where they went before."""
        self._moves = [move for move in self._moves if move[0] not in rollout_ids]
        self._kv_moves = [move for move in self._kv_moves if move[0] not in rollout_ids]

    def _move(self, rollout: LiveRollout, state: Move) -> None:
        rollout.state = state
        self._moves.append((rollout.id, state))

    def _note_holder(self, rollout: LiveRollout) -> None:
        if rollout.kv.blocks:
            self.holders[rollout] = None

    def _withdraw(self, rollout: LiveRollout) -> None:
        """Take a rollout from where it runs or waits."""
        if rollout in self.running:
            del self.running[rollout]
            if rollout in self.decoding:
                self.decoding.leave(rollout)
            else:
                del self.catching_up[rollout]
            priority = rollout.add.priority
            self._priorities[priority] -= 1
            if self._priorities[priority] == 0:
                del self._priorities[priority]
            self.requeue(self.watch.end(rollout))
        elif rollout.follows is not None:
            self.watch.unfollow(rollout)
        elif rollout.is_queued:
            self.waiting.remove(rollout)

    def check_invariants(self) -> None:
        """Raise AssertionError unless each rollout is at one place, the one its state names."""
        self.watch.check_invariants()
        self.decoding.check_invariants()
        self.meters.check_invariants(self.live)
        for rollout in self.live.values():
            is_running = rollout in self.running
            places = [is_running, rollout.follows is not None, rollout.is_queued]
            assert sum(places) == (rollout.state != "paused"), f"{rollout.id}: {rollout.state}"
            assert is_running == (rollout.state == "running")
            assert is_running == (rollout in self.decoding) + (rollout in self.catching_up)
            assert (rollout in self.holders) == (bool(rollout.kv.blocks) and not is_running)
            assert rollout.is_counted_active == (rollout.state != "paused")
            assert rollout.kv.num_computed_tokens < len(rollout.ids)
        assert set(self.running) | set(self.holders) <= set(self.live.values())
        assert Counter(r.add.priority for r in self.running) == self._priorities


def importance(rollout: LiveRollout) -> tuple[int, int]:
    """Priority, then who was admitted first."""
    return rollout.add.priority, -rollout.admission
