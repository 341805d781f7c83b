"""What a driver works with: prompts, an output, and a learner of complete groups."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from ...engine.rollout import Rollout
from ..c3po.words import Sample
from .engine import Prompt
from .words import Fallen, KeptPrompt, Position, Spell


class Delivered(Struct, frozen=True, kw_only=True):
    """A trajectory of a complete group, and what the run knows of it.

    prompt  its line; iteration: in which its group was complete; earlier: attempts that fell
    reward  None: none is configured, or it could not be scored
    """

    sample: Sample
    prompt: KeptPrompt
    prompt_id: str
    iteration: int
    engine: str
    spells: list[Spell]
    earlier: list[Fallen]
    rollout: Rollout
    reward: float | None = None


class Source(Protocol):
    """The prompts."""

    def read(self, count: int) -> tuple[list[KeptPrompt], dict[int, str], Position]:
        """Up to `count` more that can be run, bad lines on the way by number, and where it stands
        then."""
        ...

    def prompt(self, kept: KeptPrompt) -> Prompt:
        """Raises InvalidRequest."""
        ...


class Sink(Protocol):
    """The output."""

    def cut(self, size: int) -> None:
        """Take away what is behind it: of an iteration that was not committed."""
        ...

    def write(self, groups: Sequence[Sequence[Delivered]]) -> int:
        """Append, durably; returns the new size."""
        ...


Groups = Sequence[Sequence[Delivered]]


class Taught(Struct, frozen=True):
    """What came of an iteration.

    version    that engines serve from now on
    away       engine → why it could not be given it
    is_turned  it is of another lineage than the one before, so it may be of a lower number
    """

    version: int
    away: Mapping[str, str] = {}
    is_turned: bool = False


class Learner(Protocol):
    """What complete groups are for, beside being written. Engines are named that can be reached."""

    async def start(self, engines: Collection[str], served: str) -> Mapping[str, str]:
        """Before the first iteration of this process; returns who stays away, and why.

        served  digest of the weights that they serve; "" where they have been given others
        """
        ...

    async def score(self, iteration: int, groups: Groups) -> Groups:
        """With rewards; the same ones when it is asked twice for an iteration that was trained."""
        ...

    async def train(self, iteration: int, groups: Groups, engines: Collection[str]) -> Taught:
        """Have it trained, and the engines serve what came of it. May be asked twice for an
        iteration."""
        ...

    def is_behind(self, engine: str) -> bool:
        """Whether others serve a version that it was not given."""
        ...

    async def catch_up(self, engine: str) -> None:
        """Have one that is back serve what the others do. Raises EngineUnavailable."""
        ...

    async def turned(self) -> None:
        """Return once there is something to go back to. Raises ConfigError for a trainer that
        begins with other weights than are served."""
        ...

    @property
    def back(self) -> int | None:
        """The version that the trainer went back to, until the engines serve it."""
        ...

    async def go_back(self, engines: Collection[str]) -> Mapping[str, str]:
        """Have them serve it; returns who stays away, and why."""
        ...

    async def finish(self, reason: str, *, is_over: bool) -> None:
        """No more iterations come from this process; is_over: nor from another."""
        ...

    async def close(self) -> None: ...
