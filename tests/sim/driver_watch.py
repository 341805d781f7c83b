"""What is looked at of a driver while it runs: its commits, from outside, and in which moments it is
killed. A doom kills it at the next commit of a kind, or in the middle of a write.
"""

from collections.abc import Callable

import msgspec

from everstep.trainer_bridge.run.file import Changes
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.run.words import OutputMark, Place, key_of

from .history import History

KINDS = ("any", "purge", "purge", "lease", "output", "over")


class Doom:
    """When it dies: at the `left`-th commit of this kind from here, or write to the output."""

    def __init__(self) -> None:
        self.kind = ""
        self.left = 0
        self.is_power = False

    def strikes(self, kinds: set[str]) -> bool:
        """Whether now, at something of these kinds."""
        if self.left and self.kind in kinds:
            self.left -= 1
            return not self.left
        return False

    def lift(self) -> None:
        self.left = 0


class DriverWatch:
    """most_begun, most  samples in the pool: that have tokens, and in all
    is_away           whether an engine cannot be reached just now
    """

    def __init__(
        self, history: History, most_begun: int, most: int, is_away: Callable[[str], bool]
    ) -> None:
        self._history = history
        self._most_begun, self._most, self._is_away = most_begun, most, is_away
        self.iteration = 0
        """How many were committed."""
        self.size = 0
        """Of the output, by what was committed."""
        self.away: set[str] = set()
        """Engines that it has given up."""
        self._pool: dict[str, bool] = {}
        """Samples in the pool, by what was committed; True: it has begun."""
        self._leaving: dict[str, str] = {}
        """Those that were purged and are not gone → engine."""

    def begin(self, state: RunState) -> None:
        """It is started, with what was committed."""
        self.size = state.output.size
        self.away.clear()
        places = state.places.values()
        self._pool = {key_of(p.sample): p.length > 0 for p in places if not p.is_leaving}
        self._leaving = {key_of(p.sample): p.engine for p in places if p.is_leaving}
        sometimes, phase = self._history.sometimes, state.machine.phase
        sometimes("driver goes on in mid-iteration", phase in ("open", "stopping"))
        sometimes("driver goes on with groups to deliver", phase == "training")
        sometimes("driver goes on with a purge to do", bool(self._leaving))
        asked = any(lease.budget_id is None for lease in state.active_leases())
        sometimes("driver goes on with a lease that was not answered", asked)
        sometimes("driver goes on with nothing but its farewell", phase == "done")

    def commit(self, changes: Changes) -> set[str]:
        """A commit is done: look whether the pool is as small as it has to be. Returns what it was
        about."""
        kinds = {"any", *(kind for kind, _ in changes.records)}
        for (kind, key), body in changes.records.items():
            if kind == "output" and body is not None:
                self.size = msgspec.msgpack.decode(body, type=OutputMark).size
                self.iteration += 1
            if kind == "place":
                place = None if body is None else msgspec.msgpack.decode(body, type=Place)
                if self._note_place(str(key), place):
                    kinds.add("purge")
        begun = sum(self._pool.values())
        if begun > self._most_begun or len(self._pool) > self._most:
            what = f"Ω: {begun} of {len(self._pool)} in the pool have begun"
            self._history.note("driver", "fault", what=what)
        return kinds

    def _note_place(self, key: str, place: Place | None) -> bool:
        """Whether it is purged by this."""
        self._pool.pop(key, None)
        was_leaving = self._leaving.pop(key, None) is not None
        if place is None:
            return False
        if not place.is_leaving:
            self._pool[key] = place.length > 0
            return False
        self._leaving[key] = place.engine
        if not was_leaving:
            self._history.sometimes("a purge of the driver")
            is_away = self._is_away(place.engine)
            self._history.sometimes("a purge while its engine is away", is_away)
        return not was_leaving

    def note(self, text: str) -> None:
        """What it says to its user."""
        sometimes, name = self._history.sometimes, text.split()[0]
        if " stays away " in text:
            self.away.add(name)
            sometimes("an engine stays away")
            sometimes("an engine stays away with budget", " 0 tokens of the budget" not in text)
            is_leaving = name in self._leaving.values()
            sometimes("an engine stays away with a purge under way", is_leaving)
        elif text.endswith(" is back"):
            self.away.discard(name)
            sometimes("an engine comes back")

    def note_death(
        self, state: RunState | None, written: int, *, is_power: bool, in_commit: bool
    ) -> None:
        """In which interesting moment it dies. written: the size of its output."""
        sometimes = self._history.sometimes
        sometimes("driver killed")
        sometimes("driver's machine lost power", is_power)
        sometimes("driver killed in the middle of a commit", in_commit)
        if state is None:
            return
        unsent = any(p.rollout_id is None for p in state.places.values()) and not state.has_news
        sometimes("driver killed between a commit and the submission that follows", unsent)
        sometimes("driver killed between the output and its commit", written > self.size)
        sometimes("driver killed with a lease that is out", bool(state.active_leases()))
        sometimes("driver killed with a purge under way", bool(self._leaving))
        sometimes("driver killed with groups to deliver", state.machine.phase == "training")
        sometimes("driver killed while an engine is away", bool(self.away))
