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
from typing import Any

from msgspec import Struct

from . import log
from .backend import Backend
from .detokenizer import Detokenizer
from .errors import (
    ContextTooLong,
    Draining,
    EngineUnavailable,
    EverstepError,
    InvalidRequest,
    Overloaded,
    UnknownRollout,
)
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
from .rollout import (
    MAX_SAMPLES,
    FinishReason,
    Rollout,
    RolloutState,
    SamplingParams,
    Segment,
    check_prompt,
    derive_seed,
)
from .tokenizer import Tokenizer

MAX_RESTARTS = 3


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


class _Entry:
    """A rollout with what only the manager needs: its detokeniser and who waits for news."""

    __slots__ = ("detokenizer", "news", "rollout")

    def __init__(self, rollout: Rollout, detokenizer: Detokenizer | None) -> None:
        self.rollout = rollout
        self.detokenizer = detokenizer
        self.news = asyncio.Event()

    def publish(self) -> None:
        """Wake every reader; each looks at the rollout itself."""
        self.news.set()
        self.news = asyncio.Event()


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
        self._entries: dict[str, _Entry] = {}
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
        self.cancel([i for i, e in self._entries.items() if not e.rollout.state.is_ended])
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
        max_tokens = self._check(submission)
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
                seed=self._seed(submission, index),
                max_tokens=max_tokens,
                priority=submission.priority,
                client=submission.client,
                metadata=submission.metadata,
                created_s=time.time(),
            )
            self._entries[rollout.id] = _Entry(rollout, self._detokenizer(rollout))
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

    # --- checks ------------------------------------------------------------------------

    def _check(self, submission: Submission) -> int:
        """The resolved max_tokens, or the error that says what is wrong."""
        if self._is_draining:
            raise Draining("the server is shutting down; send this elsewhere")
        info = self.info
        if not 1 <= submission.samples <= MAX_SAMPLES:
            raise InvalidRequest(
                f"n must be from 1 to {MAX_SAMPLES}, got {submission.samples}", field="n"
            )
        sampling = submission.sampling.check(vocab_size=info.vocab_size)
        check_prompt(
            submission.prompt_ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len
        )
        if sampling.stop and self._tokenizer is None:
            raise InvalidRequest(
                "stop: strings need a tokenizer, and this engine runs without one; "
                "use stop_token_ids",
                field="stop",
            )
        room = info.max_model_len - len(submission.prompt_ids)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextTooLong(
                f"max_tokens: {len(submission.prompt_ids)} prompt tokens leave room for {room} of "
                f"the context's {info.max_model_len}, got {sampling.max_tokens}",
                field="max_tokens",
            )
        max_tokens = sampling.max_tokens or room
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens: at most {max_tokens} tokens fit, got {sampling.min_tokens}",
                field="min_tokens",
            )
        if self._num_live + submission.samples > self._max_live:
            raise Overloaded(
                f"{self._num_live} rollouts are waiting or running, the limit is "
                f"{self._max_live}; try again later",
                retry_after_s=1.0,
            )
        return max_tokens

    def _seed(self, submission: Submission, index: int) -> int:
        """The rollout's own seed: two rollouts never share one by accident."""
        seed = submission.sampling.seed
        if seed is None:
            return derive_seed("rollout", self._run_seed, self._num_submitted, index)
        return seed if submission.samples == 1 else derive_seed("sample", seed, index)

    def _detokenizer(self, rollout: Rollout) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        sampling = rollout.sampling
        return Detokenizer(
            self._tokenizer,
            stop=sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
        )

    def _add(self, rollout: Rollout) -> Add:
        sampling = rollout.sampling
        eos = (
            list(self._tokenizer.eos_ids)
            if self._tokenizer is not None
            else list(self.info.eos_ids)
        )
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

    def _entry(self, rollout_id: str) -> _Entry:
        entry = self._entries.get(rollout_id)
        if entry is None:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        return entry

    def _live(self, rollout_ids: Iterable[str]) -> list[_Entry]:
        found = (self._entries.get(rollout_id) for rollout_id in rollout_ids)
        return [e for e in found if e is not None and not e.rollout.state.is_ended]

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
                for tokens in message.rollouts:
                    self._take_tokens(message, tokens)
            case StateChanged():
                for rollout_id, state in message.moves:
                    entry = self._entries.get(rollout_id)
                    if entry is not None and not entry.rollout.state.is_ended:
                        self._move(entry.rollout, RolloutState(state))
            case Rejected():
                for entry in self._live([message.rollout_id]):
                    self._end(
                        entry, RolloutState.FAILED, FinishReason("error", detail=message.message)
                    )
            case Stats():
                self.stats = message
            case _:
                log.event("core.unexpected_message", level="warning", kind=type(message).__name__)

    def _move(self, rollout: Rollout, state: RolloutState) -> None:
        if rollout.state == state:
            return
        rollout.num_preemptions += state == RolloutState.PREEMPTED
        rollout.move(state)

    def _take_tokens(self, message: Tokens, tokens: RolloutTokens) -> None:
        entry = self._entries.get(tokens.rollout_id)
        if entry is None or entry.rollout.state.is_ended:
            return  # cancelled, or ended at a stop string, while the core went on
        rollout = entry.rollout
        self._append_prompt(rollout, tokens)
        matched = self._append_output(entry, message, tokens)
        if matched is not None:
            self._end(entry, RolloutState.FINISHED, FinishReason("stop", matched))
            self._backend.send([Cancel([rollout.id])])
        elif tokens.finish is not None:
            failed = tokens.finish.type == "error"
            state = RolloutState.FAILED if failed else RolloutState.FINISHED
            self._end(entry, state, tokens.finish)
        else:
            entry.publish()

    def _append_prompt(self, rollout: Rollout, tokens: RolloutTokens) -> None:
        """Prompt logprobs and routing by position; what is there already is not taken twice."""
        if tokens.prompt_lp:
            if not rollout.prompt_lp:
                rollout.prompt_lp.append(None)
                rollout.prompt_top.append([])
            skip = len(rollout.prompt_lp) - tokens.prompt_start
            rollout.prompt_lp += tokens.prompt_lp[skip:]
            rollout.prompt_top += tokens.prompt_top[skip:]
        if tokens.routing_ids:
            info = self.info
            choices = info.num_moe_layers * info.num_experts_per_tok
            width = 1 if info.num_experts <= 256 else 2
            skip = len(rollout.routing_ids) // (choices * width) - tokens.routing_start
            rollout.routing_ids += tokens.routing_ids[skip * choices * width :]
            rollout.routing_weights += tokens.routing_weights[skip * choices * 4 :]
        if tokens.num_cached_tokens is not None and not rollout.output_ids:
            rollout.num_cached_tokens = tokens.num_cached_tokens

    def _append_output(self, entry: _Entry, message: Tokens, tokens: RolloutTokens) -> str | None:
        """Append what is new; the stop string if one was completed. Tokens after the one that
        completes it count as never sampled."""
        rollout, detokenizer = entry.rollout, entry.detokenizer
        skip = len(rollout.output_ids) - tokens.start
        count = len(tokens.ids)
        matched = None
        silent = self._silent_token(rollout, tokens)
        for index in range(max(skip, 0), len(tokens.ids)):
            if detokenizer is not None and index != silent:
                rollout.text += detokenizer.push(tokens.ids[index])
                rollout.text_offset = detokenizer.offset
                matched = detokenizer.matched
            if matched is not None:
                count = index + 1
                break
        part = slice(max(skip, 0), count)
        if not tokens.ids[part]:
            return None
        if rollout.first_token_s is None:
            rollout.first_token_s = time.time()
            self._ttft.observe(rollout.first_token_s - rollout.created_s)
        self._open_segment(rollout, message)
        rollout.output_ids += tokens.ids[part]
        rollout.lp_sampled += tokens.lp_sampled[part]
        rollout.lp_temp += tokens.lp_temp[part]
        rollout.kept_mass += tokens.kept_mass[part]
        rollout.flags += tokens.flags[part]
        rollout.versions += [message.version] * len(tokens.ids[part])
        rollout.lp_raw += tokens.lp_raw[part]
        rollout.entropy += tokens.entropy[part]
        rollout.kept_ids += tokens.kept_ids[part]
        rollout.top += tokens.top[part]
        return matched

    def _silent_token(self, rollout: Rollout, tokens: RolloutTokens) -> int | None:
        """Index of a stop token whose text is not shown (as vLLM does); None: all are."""
        finish = tokens.finish
        if finish is None or not isinstance(finish.matched, int):
            return None
        return None if rollout.sampling.include_stop_str_in_output else len(tokens.ids) - 1

    def _open_segment(self, rollout: Rollout, message: Tokens) -> None:
        last = rollout.segments[-1] if rollout.segments else None
        info = self.info
        if last is None or (last.version, last.digest, last.core) != (
            message.version,
            message.digest,
            info.core_id,
        ):
            rollout.segments.append(
                Segment(
                    start=len(rollout.output_ids),
                    version=message.version,
                    digest=message.digest,
                    numerics=info.numerics,
                    core=info.core_id,
                )
            )

    def _end(self, entry: _Entry, state: RolloutState, reason: FinishReason) -> None:
        rollout = entry.rollout
        self._flush_text(entry, reason)
        rollout.move(state)
        rollout.finish_reason = reason
        rollout.ended_s = time.time()
        self._num_live -= 1
        self._paused.discard(rollout.id)
        self._ended.add(1, reason.type)
        self._e2e.observe(rollout.ended_s - rollout.created_s)
        if rollout.first_token_s is not None and len(rollout.output_ids) > 1:
            rest = rollout.ended_s - rollout.first_token_s
            self._itl.observe(rest / (len(rollout.output_ids) - 1))
        if reason.type == "error":
            log.event("rollout.failed", level="error", rollout=rollout.id, detail=reason.detail)
        entry.publish()

    def _flush_text(self, entry: _Entry, reason: FinishReason) -> None:
        """Give what was held back. Before a silent stop token half a character may be open,
        which that token would have completed: then it is not text of this rollout."""
        rollout, detokenizer = entry.rollout, entry.detokenizer
        if detokenizer is None or self._tokenizer is None:
            return
        tail = detokenizer.finish()
        if tail and isinstance(reason.matched, int):
            skip = rollout.sampling.skip_special_tokens
            whole = self._tokenizer.decode(rollout.output_ids, skip_special_tokens=skip)
            if not whole.startswith(rollout.text + tail):
                tail = ""
        rollout.text += tail
        rollout.text_offset = len(rollout.text)

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
            if entry.rollout.state != RolloutState.QUEUED:
                self._move(entry.rollout, RolloutState.QUEUED)
        self._backend.send([self._add(entry.rollout) for entry in entries])
