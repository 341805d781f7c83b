"""What a run of C3PO++ asks of an engine.

`ManagerEngine` (trainer_bridge/run/manager_engine.py) is the engine of this process, `HttpEngine`
(everstep/rollout/http_engine.py) a server. Whatever a run asks for carries a key or is idempotent by
itself: after a kill it is asked again, and nothing is made twice.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from ...engine.rollout import Record, Rollout, SamplingParams

# what a trajectory has beside what every rollout has: the third logprob
RECORD: tuple[Record, ...] = ("lp_raw",)


class Prompt(Struct, frozen=True, kw_only=True):
    """A line that can be run. Exactly one of prompt_ids, prompt and messages.

    options  what else POST /rollouts takes beside them (tools, chat_template_kwargs, …)
    """

    id: str
    prompt_ids: list[int] | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    options: dict[str, Any] = {}
    sampling: SamplingParams = SamplingParams()
    metadata: Any = None


class Work(Struct, frozen=True, kw_only=True):
    """A rollout to be made; the same key gives the same one.

    seed  of this sample and attempt alone
    """

    key: str
    prompt: Prompt
    group_id: str
    attempt: int
    seed: int
    pool: str

    @property
    def sampling(self) -> SamplingParams:
        """The line's, with what is this sample's own."""
        sampling = self.prompt.sampling
        record = tuple(dict.fromkeys((*RECORD, *sampling.record)))
        return msgspec.structs.replace(sampling, seed=self.seed, record=record)


class Facts(Struct, frozen=True):
    """What tokens depend on beside their prompt, sampling and seed."""

    version: int
    digest: str
    numerics: str

    @property
    def weights(self) -> str:
        return f"{self.digest[:12]} {self.numerics}"


class Budget(Struct, frozen=True):
    """A slice of the run's budget at an engine. used: exact, and final once it is not open."""

    id: str
    used: int
    is_open: bool


class Seen(Struct, frozen=True):
    """A rollout of a pool, in a list."""

    id: str
    is_ended: bool
    is_aborted: bool
    is_acked: bool


class Engine(Protocol):
    """Generates the rollouts of pools, durably.

    Every call may raise EngineUnavailable: it stays away, beyond the patience that it was made
    with. What it has no room for at the moment it refuses with Overloaded or JournalFull, at once:
    waiting is the caller's (`PatientEngine`).
    """

    name: str

    async def start(self) -> Facts:
        """Be there, or raise why it cannot be. May be called again after EngineUnavailable."""
        ...

    async def prepare(self, prompt: Prompt) -> Prompt:
        """As it will be submitted. Raises InvalidRequest where it cannot run, as far as is known
        before it is submitted."""
        ...

    async def submit(self, work: Work) -> str:
        """The rollout's id. Raises InvalidRequest where it can never run."""
        ...

    async def ended(self, rollout_id: str) -> Rollout:
        """The rollout, once it has ended. Raises UnknownRollout."""
        ...

    async def read(self, rollout_id: str) -> Rollout:
        """The rollout as it is now, journaled tokens only. Raises UnknownRollout."""
        ...

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        """End those that are live. Raises UnknownRollout where one was never there."""
        ...

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        """The run has these ended ones. Raises UnknownRollout where one was never there."""
        ...

    async def known(self, pool: str) -> list[Seen]:
        """All that it knows of a pool."""
        ...

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        """So many tokens for the pool (None: until it is closed); the same key is the same one.

        places  how many of its rollouts run at once, the first that were submitted; the others
                stand by, and a place that becomes free is taken without a word from here
        """
        ...

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        """It as it is once it is not open any more, or after wait_s seconds."""
        ...

    async def budgets(self, pool: str) -> list[Budget]:
        """Those of a pool."""
        ...

    async def close_budget(self, budget_id: str) -> None:
        """End it early; what was in flight is still counted. Idempotent."""
        ...

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        """Output tokens of live rollouts of a pool, for a look; it may be a little old."""
        ...

    async def close(self) -> None:
        """Let go of it; its rollouts stay. Idempotent."""
        ...
