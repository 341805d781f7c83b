"""What a run file holds of the run as a whole: its header, and the controller at rest.

The controller is written whole now and then, and its events since: whoever opens the file has the
machine that was left.
"""

import uuid

from msgspec import Struct
from msgspec.structs import replace

from ...engine.errors import ConfigError
from ..c3po import words
from ..c3po.c3po import C3po
from ..c3po.config import C3poConfig
from .file import RunFile
from .words import Header

ONLY = 0
"""The key of a record that is the only one of its kind."""
# events after which the controller is written whole, and they are forgotten
_EVENTS_PER_STATE = 512


class _Event(Struct):
    event: words.Event


class StoredHeader:
    """What the run is: fixed by the command that began it."""

    def __init__(self, file: RunFile, wanted: Header) -> None:
        """Raises ConfigError where the file holds a run of other seed or sampling. Prompts may have
        moved: whoever reads them compares what they are (`Position`)."""
        self._file = file
        known = file.read("header", ONLY, Header)
        if known is None:
            self.value = replace(wanted, id=wanted.id or uuid.uuid4().hex[:12])
            file.changes.put("header", ONLY, self.value)
        else:
            self.value = known
            self._compare(wanted)
            if known.source != wanted.source:
                self.value = replace(known, source=wanted.source)
                file.changes.put("header", ONLY, self.value)

    def serve(self, weights: str) -> None:
        """What the engines serve. Raises ConfigError where the run was begun with other weights."""
        self._compare(replace(self.value, weights=weights))
        if self.value.weights is None:
            self.value = replace(self.value, weights=weights)
            self._file.changes.put("header", ONLY, self.value)

    def _compare(self, wanted: Header) -> None:
        for name in ("epochs", "seed", "sampling", "weights"):
            old, new = getattr(self.value, name), getattr(wanted, name)
            if old != new and None not in (old, new):
                raise ConfigError(
                    f"{self._file.path}: the run was begun with {name} {_short(old)}, now it is "
                    f"{_short(new)}; repeat the first command, or name another output"
                )


class StoredC3po:
    """The controller; what it is told is in the next commit."""

    def __init__(self, file: RunFile, config: C3poConfig) -> None:
        """As it was left; under another config from here on. Raises ConfigError if that may not
        change so."""
        self._file = file
        self._num_events = 0
        state = file.read("state", ONLY, words.C3poState)
        self.machine = C3po(config) if state is None else C3po.restore(state)
        for _, record in file.records("event", _Event):
            self.machine.apply(record.event)
            self._num_events += 1
        if state is not None and self.machine.config != config:
            try:
                self.machine = C3po.restore(self.machine.snapshot(), config)
            except ConfigError as error:
                raise ConfigError(f"{file.path}: {error}") from None
        if state is None or self.machine.config != state.config:
            self.write()

    def apply(self, event: words.Event) -> list[words.Command]:
        commands = self.machine.apply(event)
        self._num_events += 1
        self._file.changes.put("event", self._num_events, _Event(event))
        return commands

    def tidy(self) -> None:
        """Write it whole where there are many events; never between an event and what follows of
        it."""
        if self._num_events >= _EVENTS_PER_STATE:
            self.write()

    def write(self) -> None:
        """Whole."""
        self._file.changes.put("state", ONLY, self.machine.snapshot())
        self._file.changes.drop_all("event")
        self._num_events = 0


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
