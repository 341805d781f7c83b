"""RolloutManager: the only writer of rollouts (interface; the body follows)."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec import Struct

from .backend import Backend
from .messages import Ready, Stats
from .metrics import Registry
from .rollout import Rollout, SamplingParams
from .tokenizer import Tokenizer


class Submission(Struct, kw_only=True):
    """What a face asks for: `samples` rollouts of one prompt."""

    prompt_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    samples: int = 1
    group_id: str | None = None
    priority: int = 0
    client: str = ""
    metadata: Any = None


class Delta(Struct):
    """News of one rollout: its tokens [start, end) and the text that became final with them.

    The per-token values are read from the rollout itself: `rollout.output_ids[start:end]` ….
    Text may lag behind tokens (half a UTF-8 character, the beginning of a stop string).
    """

    rollout: Rollout
    start: int
    end: int
    text: str
    is_last: bool


class RolloutManager:
    """Owns every rollout: checks, submits, collects tokens, finds stop strings, ends."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None, *, run_seed: int = 0) -> None:
        self.metrics = Registry()
        self.stats: Stats | None = None
        """The core's latest."""

    @property
    def info(self) -> Ready:
        """What the core said when it was ready; raises EngineUnavailable before."""
        raise NotImplementedError

    @property
    def is_healthy(self) -> bool:
        """False once the core has died for good."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the backend and the task that collects from it."""
        raise NotImplementedError

    async def close(self) -> None:
        """Abort what is live, then end the backend."""
        raise NotImplementedError

    def submit(self, submission: Submission) -> list[Rollout]:
        """Check and queue; returns the rollouts, in sample order, before any token exists.

        Raises InvalidRequest (ContextTooLong), Overloaded, EngineUnavailable, Draining.
        """
        raise NotImplementedError

    def get(self, rollout_id: str) -> Rollout:
        """The rollout; raises UnknownRollout."""
        raise NotImplementedError

    def stream(self, rollout_id: str) -> AsyncIterator[Delta]:
        """Deltas from token 0 on until the last; any number of readers, each sees all of it."""
        raise NotImplementedError

    async def wait(self, rollout_id: str) -> Rollout:
        """The rollout once it has ended."""
        raise NotImplementedError

    def cancel(self, rollout_ids: Sequence[str]) -> None:
        """End them now (state aborted). Ended ones are left as they are."""
        raise NotImplementedError

    def pause(self, rollout_ids: Sequence[str] | None = None) -> None:
        """Stop them where they are (None: all, and whatever is submitted until resume)."""
        raise NotImplementedError

    def resume(self, rollout_ids: Sequence[str] | None = None) -> None:
        """Go on exactly where they stopped."""
        raise NotImplementedError

    def forget(self, rollout_id: str) -> None:
        """Drop an ended rollout from memory (a face calls it when its answer is out)."""
        raise NotImplementedError
