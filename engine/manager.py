"""RolloutManager: the only writer of rollouts.

It checks and submits, collects tokens, finds stop strings (a core knows no text), and gives
every rollout exactly one ending. Whatever a core knows it could be told again from here, so a
core that dies costs time: its rollouts are submitted to the next one with the tokens they have.
"""

import asyncio
import contextlib
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence

from msgspec import Struct

from . import log
from .backend import Backend
from .errors import (
    Draining,
    EngineUnavailable,
    EverstepError,
    Overloaded,
    UnknownRollout,
)
from .growth import Growth
from .intake import Submission
from .messages import (
    Add,
    Cancel,
    Died,
    FromCore,
    Pause,
    Ready,
    Rejected,
    Resume,
    RolloutTokens,
    StateChanged,
    Stats,
    Tokens,
)
from .metrics import Registry
from .rollout import FinishReason, Rollout, RolloutState
from .tokenizer import Tokenizer

MAX_RESTARTS = 3


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

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        run_seed: int = 0,
        max_live: int = 65536,
    ) -> None:
        self.metrics = Registry()
        self.stats: Stats | None = None
        """The core's latest."""
        self._backend = backend
        self._tokenizer = tokenizer
        self._run_seed = run_seed
        self._max_live = max_live
        self._entries: dict[str, Growth] = {}
        self._num_live = 0
        self._num_submitted = 0
        self._info: Ready | None = None
        self._failure: str | None = None
        self._is_draining = False
        self._collector: asyncio.Task[None] | None = None
        self._paused: set[str] = set()
        self._is_paused = False
        self._declare_metrics()

    def _declare_metrics(self) -> None:
        m = self.metrics
        self._ended = m.counter(
            "everstep:rollouts_ended_total", "rollouts by how they ended", ["reason"]
        )
        self._ttft = m.histogram(
            "everstep:time_to_first_token_seconds", "submission to first token"
        )
        self._e2e = m.histogram("everstep:e2e_request_latency_seconds", "submission to ending")
        self._itl = m.histogram(
            "everstep:inter_token_latency_seconds", "time per output token after the first"
        )
        self._restarts = m.counter("everstep:core_restarts_total", "cores started again")

    @property
    def info(self) -> Ready:
        """What the core said when it was ready; raises EngineUnavailable before."""
        if self._info is None:
            raise EngineUnavailable(self._failure or "the engine is loading")
        return self._info

    @property
    def is_healthy(self) -> bool:
        """False once the core has died for good."""
        return self._failure is None

    @property
    def num_live(self) -> int:
        """Rollouts that have not ended."""
        return self._num_live

    async def start(self) -> None:
        """Start the backend and the task that collects from it."""
        self._info = await self._backend.start()
        self._collector = asyncio.create_task(self._collect())

    async def close(self) -> None:
        """Abort what is live, then end the backend."""
        self._is_draining = True
        self.cancel(list(self._entries))
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector
        await self._backend.close()

    # --- what faces call ---------------------------------------------------------------

    def submit(self, submission: Submission) -> list[Rollout]:
        """Check and queue; returns the rollouts, in sample order, before any token exists.

        Raises InvalidRequest (ContextTooLong), Overloaded, EngineUnavailable, Draining.
        """
        max_tokens = self._admit(submission)
        group_id = submission.group_id or f"grp-{uuid.uuid4().hex}"
        self._num_submitted += 1
        rollouts = []
        for index in range(submission.samples):
            rollout = Rollout(
                id=f"ro-{uuid.uuid4().hex}",
                group_id=group_id,
                index=index,
                prompt_ids=submission.prompt_ids,
                sampling=submission.sampling,
                seed=submission.seed_of(index, run_seed=self._run_seed, number=self._num_submitted),
                max_tokens=max_tokens,
                priority=submission.priority,
                client=submission.client,
                metadata=submission.metadata,
                created_s=time.time(),
            )
            self._entries[rollout.id] = Growth(rollout, self._tokenizer)
            self._num_live += 1
            rollouts.append(rollout)
        self._backend.send([self._add(rollout) for rollout in rollouts])
        return rollouts

    def get(self, rollout_id: str) -> Rollout:
        """The rollout; raises UnknownRollout."""
        return self._entry(rollout_id).rollout

    async def stream(self, rollout_id: str) -> AsyncIterator[Delta]:
        """Deltas from token 0 on until the last; any number of readers, each sees all of it."""
        entry = self._entry(rollout_id)
        rollout = entry.rollout
        start, text = 0, 0
        while True:
            news = entry.news
            end, is_last = len(rollout.output_ids), rollout.state.is_ended
            new = rollout.text[text:]
            if end > start or new or is_last:
                yield Delta(rollout, start, end, new, is_last)
                # while the reader took its time the rollout went on: count what was given
                start, text = end, text + len(new)
            if is_last:
                return
            if entry.news is news:
                await news.wait()

    async def wait(self, rollout_id: str) -> Rollout:
        """The rollout once it has ended."""
        entry = self._entry(rollout_id)
        while not entry.rollout.state.is_ended:
            await entry.news.wait()
        return entry.rollout

    def cancel(self, rollout_ids: Sequence[str]) -> None:
        """End them now (state aborted). Ended ones are left as they are."""
        entries = self._live(rollout_ids)
        for entry in entries:
            self._end(entry, RolloutState.ABORTED, FinishReason("abort"))
        if entries:
            self._backend.send([Cancel([entry.rollout.id for entry in entries])])

    def pause(self, rollout_ids: Sequence[str] | None = None) -> None:
        """Stop them where they are (None: all, and whatever is submitted until resume)."""
        if rollout_ids is None:
            self._is_paused = True
            self._backend.send([Pause(None)])
            return
        ids = [entry.rollout.id for entry in self._live(rollout_ids)]
        self._paused.update(ids)
        self._backend.send([Pause(ids)])

    def resume(self, rollout_ids: Sequence[str] | None = None) -> None:
        """Go on exactly where they stopped."""
        if rollout_ids is None:
            self._is_paused = False
            self._paused.clear()
            self._backend.send([Resume(None)])
            return
        ids = [entry.rollout.id for entry in self._live(rollout_ids)]
        self._paused.difference_update(ids)
        self._backend.send([Resume(ids)])

    def forget(self, rollout_id: str) -> None:
        """Drop an ended rollout from memory (a face calls it when its answer is out)."""
        entry = self._entries.get(rollout_id)
        if entry is not None and entry.rollout.state.is_ended:
            del self._entries[rollout_id]

    # --- helpers of these --------------------------------------------------------------

    def _admit(self, submission: Submission) -> int:
        """The resolved max_tokens, or the error that says why it cannot run now."""
        if self._is_draining:
            raise Draining("the server is shutting down; send this elsewhere")
        max_tokens = submission.check(
            self.info, eos_ids=self._eos_ids, has_tokenizer=self._tokenizer is not None
        )
        if self._num_live + submission.samples > self._max_live:
            raise Overloaded(
                f"{self._num_live} rollouts are waiting or running, the limit is "
                f"{self._max_live}; try again later",
                retry_after_s=1.0,
            )
        return max_tokens

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        """The tokenizer knows more of them than the configs that a core has read."""
        return tuple(self.info.eos_ids if self._tokenizer is None else self._tokenizer.eos_ids)

    def _add(self, rollout: Rollout) -> Add:
        sampling = rollout.sampling
        eos = self._eos_ids
        stop_ids = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
        return Add(
            rollout_id=rollout.id,
            prompt_ids=rollout.prompt_ids,
            output_ids=rollout.output_ids,
            sampling=sampling,
            seed=rollout.seed,
            max_tokens=rollout.max_tokens,
            stop_ids=sorted(stop_ids),
            banned_ids=sorted(stop_ids | set(eos)),
            priority=rollout.priority,
            client=rollout.client,
            start_paused=rollout.id in self._paused,
        )

    def _entry(self, rollout_id: str) -> Growth:
        entry = self._entries.get(rollout_id)
        if entry is None:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        return entry

    def _live(self, rollout_ids: Iterable[str]) -> list[Growth]:
        found = (self._entries.get(rollout_id) for rollout_id in rollout_ids)
        return [entry for entry in found if entry is not None and entry.is_live]

    # --- what cores say ----------------------------------------------------------------

    async def _collect(self) -> None:
        """Take the core's messages until it is closed; start it again when it dies.

        A fault of our own is said to everybody who waits: nobody would ever end them otherwise.
        """
        try:
            await self._take_all()
        except Exception as error:
            log.event("manager.failed", level="error", traceback=traceback.format_exc())
            self._give_up(f"internal error: {type(error).__name__}: {error}")

    async def _take_all(self) -> None:
        deaths = 0
        while True:
            for message in await self._backend.receive():
                if isinstance(message, Died):
                    deaths += 1
                    if not await self._restart(message, deaths):
                        return
                    break
                if isinstance(message, Tokens):
                    deaths = 0
                self._take(message)

    def _take(self, message: FromCore) -> None:
        match message:
            case Tokens():
                for tokens in message.each():
                    self._take_tokens(message, tokens)
            case StateChanged():
                for rollout_id, state in message.moves:
                    for entry in self._live([rollout_id]):
                        entry.move(RolloutState(state))
            case Rejected():
                for entry in self._live([message.rollout_id]):
                    self._end(
                        entry, RolloutState.FAILED, FinishReason("error", detail=message.message)
                    )
            case Stats():
                self.stats = message
            case _:
                log.event("core.unexpected_message", level="warning", kind=type(message).__name__)

    def _take_tokens(self, message: Tokens, tokens: RolloutTokens) -> None:
        entry = self._entries.get(tokens.rollout_id)
        if entry is None or not entry.is_live:
            return  # cancelled, or ended at a stop string, while the core went on
        rollout = entry.rollout
        is_first = rollout.first_token_s is None
        finish = entry.take(message, tokens, self.info)
        if is_first and rollout.first_token_s is not None:
            self._ttft.observe(rollout.first_token_s - rollout.created_s)
        if finish is None:
            entry.publish()
            return
        failed = finish.type == "error"
        self._end(entry, RolloutState.FAILED if failed else RolloutState.FINISHED, finish)
        if finish is not tokens.finish:
            # a stop string, of which the core knows nothing
            self._backend.send([Cancel([rollout.id])])

    def _end(self, entry: Growth, state: RolloutState, reason: FinishReason) -> None:
        entry.end(state, reason)
        rollout = entry.rollout
        self._num_live -= 1
        self._paused.discard(rollout.id)
        self._ended.add(1, reason.type)
        assert rollout.ended_s is not None
        self._e2e.observe(rollout.ended_s - rollout.created_s)
        if rollout.first_token_s is not None and len(rollout.output_ids) > 1:
            rest = rollout.ended_s - rollout.first_token_s
            self._itl.observe(rest / (len(rollout.output_ids) - 1))
        if reason.type == "error":
            log.event("rollout.failed", level="error", rollout=rollout.id, detail=reason.detail)

    # --- a core that dies --------------------------------------------------------------

    async def _restart(self, died: Died, deaths: int) -> bool:
        """Start the core again and give it what was live; False once that is given up.

        deaths  in a row, without a token in between
        """
        if self._is_draining:
            return False
        self._info = None
        for attempt in range(deaths, MAX_RESTARTS + 1):
            log.event("core.died", level="error", reason=died.message, attempt=attempt)
            await asyncio.sleep(0.1 * 4 ** (attempt - 1))
            try:
                self._info = await self._backend.start()
            except EngineUnavailable as error:
                died = Died(str(error), error.code)
            except EverstepError as error:
                died = Died(str(error), error.code)
                break
            else:
                self._restarts.add()
                self._resubmit()
                return True
        self._give_up(f"the engine died: {died.message}")
        return False

    def _give_up(self, reason: str) -> None:
        self._info, self._failure = None, reason
        for entry in self._live(list(self._entries)):
            self._end(entry, RolloutState.FAILED, FinishReason("error", detail=reason))

    def _resubmit(self) -> None:
        entries = self._live(list(self._entries))
        log.event("core.restarted", rollouts=len(entries))
        if self._is_paused:
            self._backend.send([Pause(None)])
        for entry in entries:
            entry.move(RolloutState.QUEUED)
        self._backend.send([self._add(entry.rollout) for entry in entries])
