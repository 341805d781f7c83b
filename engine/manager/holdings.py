"""The rollouts that this process holds: the live ones, and ended ones that somebody may read."""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Sequence

from ..metrics import Registry
from ..rollout import LIVE, Rollout, RolloutState
from .growth import Growth


class Holdings:
    """Growths by id, in the order of acceptance, and which of them were paused.

    A rollout that is not durable stays until it is dropped. A durable one is the journal's once it
    has ended: it goes when nobody reads it any more.
    """

    def __init__(self, metrics: Registry) -> None:
        self._growths: dict[str, Growth] = {}
        self.num_live = 0
        """Not ended, those included whose acceptance is being journaled."""
        self.paused: set[str] = set()
        """By name, or because all were; they survive a core."""
        self.is_all_paused = False
        self._states = metrics.gauge("everstep:rollouts", "rollouts that have not ended", ["state"])
        self._ended = metrics.counter(
            "everstep:rollouts_ended_total", "rollouts by how they ended", ["reason"]
        )
        self._ttft = metrics.histogram(
            "everstep:time_to_first_token_seconds", "submission to first token"
        )
        self._e2e = metrics.histogram(
            "everstep:e2e_request_latency_seconds", "submission to ending"
        )
        self._itl = metrics.histogram(
            "everstep:inter_token_latency_seconds", "time per output token after the first"
        )

    def get(self, rollout_id: str) -> Growth | None:
        return self._growths.get(rollout_id)

    def live(self, rollout_ids: Iterable[str] | None = None) -> list[Growth]:
        """Those of these ids whose ending is not decided; None: all."""
        found = (
            self._growths.values()
            if rollout_ids is None
            else (self._growths.get(rollout_id) for rollout_id in rollout_ids)
        )
        return [growth for growth in found if growth is not None and growth.is_open]

    def of_group(self, group_id: str) -> list[Growth]:
        return [g for g in self._growths.values() if g.rollout.group_id == group_id]

    def __iter__(self) -> Iterator[Growth]:
        return iter(list(self._growths.values()))

    def add(self, growth: Growth) -> None:
        """Take it in; `num_live` was counted when it was admitted."""
        rollout = growth.rollout
        self._growths[rollout.id] = growth
        if self.is_all_paused or rollout.state is RolloutState.PAUSED:
            self.paused.add(rollout.id)

    def pause(self, growths: Iterable[Growth], *, is_all: bool) -> None:
        self.is_all_paused |= is_all
        self.paused.update(growth.rollout.id for growth in growths)

    def resume(self, growths: Iterable[Growth], *, is_all: bool) -> None:
        self.is_all_paused &= not is_all
        self.paused.difference_update(growth.rollout.id for growth in growths)

    @contextlib.contextmanager
    def reading(self, growth: Growth) -> Iterator[None]:
        """While somebody reads it, it is told of news, and stays."""
        growth.num_readers += 1
        try:
            yield
        finally:
            growth.num_readers -= 1
            self._let_go(growth)

    @contextlib.contextmanager
    def following(self, growths: Sequence[Growth]) -> Iterator[asyncio.Event]:
        """A bell that rings with the news of any of them; they stay meanwhile."""
        bell = asyncio.Event()
        for growth in growths:
            growth.bells.append(bell)
        try:
            yield bell
        finally:
            for growth in growths:
                growth.bells.remove(bell)
                self._let_go(growth)

    def forget(self, rollout_id: str) -> None:
        """Drop it if it has ended."""
        growth = self._growths.get(rollout_id)
        if growth is not None and not growth.is_live:
            del self._growths[rollout_id]

    def note_first_token(self, rollout: Rollout) -> None:
        if rollout.first_token_s is not None:
            self._ttft.observe(rollout.first_token_s - rollout.created_s)

    def end(self, growth: Growth, final: Rollout) -> None:
        """Show its one ending, and count it."""
        growth.end(final)
        self.num_live -= 1
        self.paused.discard(final.id)
        assert final.ended_s is not None
        assert final.finish_reason is not None
        self._ended.add(1, final.finish_reason.type)
        self._e2e.observe(final.ended_s - final.created_s)
        num = len(final.output_ids)
        if final.first_token_s is not None and num > 1:
            self._itl.observe((final.ended_s - final.first_token_s) / (num - 1))
        self._let_go(growth)

    def count_states(self) -> None:
        """Bring the gauge of states up to date; it is asked for now and then."""
        counts = dict.fromkeys(LIVE, 0)
        for growth in self._growths.values():
            if growth.is_live:
                counts[growth.rollout.state] += 1
        for state, count in counts.items():
            self._states.set(count, state.value)

    def _let_go(self, growth: Growth) -> None:
        rollout = growth.rollout
        has_readers = growth.num_readers > 0 or bool(growth.bells)
        is_read = growth.is_live or has_readers or not rollout.is_durable
        if not is_read and self._growths.get(rollout.id) is growth:
            del self._growths[rollout.id]
