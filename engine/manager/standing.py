"""How a front stands: whether its journal is read, whether it takes work, whether it has news."""

from collections.abc import Callable

from ..errors import (
    Draining,
    EngineDied,
    EngineUnavailable,
    EverstepError,
    JournalError,
    Overloaded,
)
from .holdings import Holdings
from .keeping import Keeper


class Standing:
    """What a manager asks itself before it takes, shows or promises anything.

    core_failure  why no core will be started any more, or None
    """

    def __init__(self, holdings: Holdings, keeper: Keeper | None, *, max_live: int) -> None:
        self.core_failure: Callable[[], str | None] = lambda: None
        self.is_recovered = False
        """What the journal holds is here."""
        self.is_draining = False
        self._holdings = holdings
        self._keeper = keeper
        self._max_live = max_live

    @property
    def kept(self) -> Keeper | None:
        """The keeper, once what its journal holds is here.

        Raises EngineUnavailable before: whoever read a live rollout then would wait for news of a
        copy, and a key that is in the journal would be taken for a new one.
        """
        if self._keeper is not None and not self.is_recovered:
            raise EngineUnavailable("the engine is loading, and the journal is not read yet")
        return self._keeper

    @property
    def journaled(self) -> Keeper:
        """As `kept`; raises JournalError where there is none."""
        keeper = self.kept
        if keeper is None:
            raise JournalError(
                "this server keeps no journal, so it takes no durable rollouts; "
                "start it with --journal PATH"
            )
        return keeper

    def check_room(self, count: int) -> None:
        """Raise Draining or Overloaded unless so many more rollouts are taken now."""
        if self.is_draining:
            raise Draining("the server is shutting down; send this elsewhere")
        num_live = self._holdings.num_live
        if num_live + count > self._max_live:
            raise Overloaded(
                f"{num_live} rollouts are waiting or running, the limit is {self._max_live}; "
                "try again later",
                retry_after_s=1.0,
            )

    def why_not_here(self) -> EverstepError | None:
        """Why durable rollouts, which live on, have no more news in this process."""
        if self.is_draining:
            return Draining(
                "the server is shutting down; the rollout is in its journal and goes on when it "
                "is started again"
            )
        if (failure := self.core_failure()) is not None:
            return EngineDied(f"{failure}; the rollout stays in the journal")
        if self._keeper is not None and self._keeper.failure is not None:
            return JournalError(self._keeper.failure)
        return None
