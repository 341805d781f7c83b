"""What happened in one history: for the checker, for readers, and as a hash.

An event is a time, who notes it, its kind, and plain values. The checker sees nothing else.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from msgspec import Struct


class Event(Struct, frozen=True):
    time_s: float
    who: str
    kind: str
    fields: dict[str, Any]

    def line(self) -> str:
        shown = " ".join(f"{name}={_short(value)}" for name, value in self.fields.items())
        return f"{self.time_s:9.4f}  {self.who:<9} {self.kind:<14} {shown}"


def _short(value: Any) -> str:
    text = str(value) if not isinstance(value, dict) else "{" + ", ".join(map(str, value)) + "}"
    return text if len(text) <= 90 else f"{text[:86]} ..."


class History:
    """Events in order, and how often interesting states were reached (`sometimes`)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.events: list[Event] = []
        self.reached: Counter[str] = Counter()
        self.is_printing = False

    def note(self, who: str, kind: str, **fields: Any) -> None:
        event = Event(self._clock(), who, kind, fields)
        self.events.append(event)
        if self.is_printing:
            print(event.line(), flush=True)

    def sometimes(self, name: str, is_so: bool = True) -> None:
        """The state `name` was reached."""
        if is_so:
            self.reached[name] += 1
            if self.is_printing:
                print(f"{self._clock():9.4f}  {'':<9} {'* ' + name}", flush=True)

    def look(self, found: dict[str, Any]) -> None:
        """At a rollout that has ended: what it went through."""
        versions = found["versions"]
        jumps = [late - early for early, late in pairwise(versions)]
        self.sometimes("a rollout over several versions", len(set(versions)) > 1)
        self.sometimes("a rollout resumed two versions later, or more", max(jumps, default=0) > 1)

    def digest(self) -> str:
        """Equal for equal histories."""
        found = hashlib.blake2b(digest_size=8)
        for event in self.events:
            found.update(repr((event.time_s, event.who, event.kind, event.fields)).encode())
        found.update(repr(sorted(self.reached.items())).encode())
        return found.hexdigest()
