"""A rollout as it grows: its lists, its text, its segments, its ending, and who waits for news.

The one place where a `Rollout` is written; `RolloutManager` owns the growths. What a step brings
is first *prepared* (detokenised, searched for stop strings, cut), then *applied*, which is when
readers see it. Between the two a durable rollout's tokens go into the journal.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from msgspec import Struct

from ..detokenizer import Detokenizer
from ..errors import InvalidTrajectory
from ..journal.ops import Extra, Grown, Origin, grow
from ..messages import PlainToken, Ready, RolloutTokens
from ..rollout import FinishReason, KVState, Rollout, RolloutState
from ..tokenizer import Tokenizer

T = TypeVar("T")


class News(Struct):
    """What one step brought to one rollout, before anybody sees it.

    text    what became final with it
    finish  why the rollout is over with it, or None
    """

    grown: Grown
    origin: Origin
    time_s: float
    text: str
    text_offset: int
    finish: FinishReason | None


class Growth:
    """One rollout with what only the manager needs: its detokeniser and who waits for news.

    is_open      whether it takes news: its ending is not decided yet
    num_readers  who stream it or wait for it
    bells        of those who wait for one of several
    """

    __slots__ = (
        "_ahead",
        "_detokenizer",
        "_moves",
        "_num_ids",
        "_num_prompt_lp",
        "_num_routed_bytes",
        "_origin",
        "_tokenizer",
        "bells",
        "is_open",
        "kv",
        "news",
        "num_readers",
        "rollout",
    )

    def __init__(self, rollout: Rollout, tokenizer: Tokenizer | None) -> None:
        self.rollout = rollout
        self.news = asyncio.Event()
        self.is_open = not rollout.state.is_ended
        self.num_readers = 0
        self.bells: list[asyncio.Event] = []
        self.kv: KVState = "computed"
        """What the core that has it draws its tokens over."""
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer_of(rollout, tokenizer)
        self._ahead: deque[News] = deque()
        self._moves: list[RolloutState] = []
        """States that follow on the news ahead."""
        self._origin: Origin | None = None
        """Of the segment that is open, where this process opened it."""
        # of the rollout and of what is prepared
        self._num_ids = len(rollout.output_ids)
        self._num_prompt_lp = len(rollout.prompt_lp)
        self._num_routed_bytes = len(rollout.routing_ids)

    @property
    def is_live(self) -> bool:
        return not self.rollout.state.is_ended

    @property
    def output_ids(self) -> list[int]:
        """What readers see and what is prepared: where a core is to go on."""
        if not self._ahead:
            return self.rollout.output_ids
        ahead = (news.grown.ids for news in self._ahead)
        return [*self.rollout.output_ids, *(token for ids in ahead for token in ids)]

    def publish(self) -> None:
        """Wake every reader; each looks at the rollout itself."""
        if self.num_readers:
            self.news.set()
            self.news = asyncio.Event()
        for bell in self.bells:
            bell.set()

    def move(self, state: RolloutState) -> None:
        """The scheduler, or a new core, has it in another state.

        Readers see it once they see what was sampled before: a paused rollout does not grow.
        """
        if self._ahead:
            self._moves.append(state)
        elif self.rollout.state != state:
            self.rollout.num_preemptions += state == RolloutState.PREEMPTED
            self.rollout.move(state)

    # --- news -----------------------------------------------------------------------------

    def prepare(self, tokens: RolloutTokens, origin: Origin, info: Ready) -> News | None:
        """What is new in a step's outcome; None: nothing. `apply` it, in the same order.

        A stop string ends the rollout at the token that completes it (`matched` is a string
        then); tokens after that one count as never sampled.
        """
        rollout = self.rollout
        start = self._num_ids
        skip = start - tokens.start
        assert skip >= 0, f"{rollout.id}: tokens from {tokens.start} on, {start} are known"
        text, end, finish = self._read(tokens, skip)
        part = None if not skip and end == len(tokens.ids) else slice(skip, end)
        grown = Grown(
            rollout_id=rollout.id,
            start=start,
            ids=_cut(tokens.ids, part),
            lp_sampled=_cut(tokens.lp_sampled, part),
            lp_temp=_cut(tokens.lp_temp, part),
            kept_mass=_cut(tokens.kept_mass, part),
            flags=_cut(tokens.flags, part),
            extra=self._extra(tokens, part, info),
        )
        if tokens.num_cached_tokens is not None and not start:
            grown.num_cached_tokens = tokens.num_cached_tokens
        if not (grown.ids or grown.extra or finish) and grown.num_cached_tokens is None:
            return None
        self._num_ids = start + len(grown.ids)
        offset = self._detokenizer.offset if self._detokenizer is not None else 0
        news = News(grown, origin, time.time(), text, offset, finish)
        self._ahead.append(news)
        return news

    def apply(self) -> int:
        """Show the oldest news that were prepared; how many tokens. (`publish` is the caller's:
        several may come.)"""
        news = self._ahead.popleft()
        _write(self.rollout, news)
        if news.grown.ids:
            self._origin = news.origin
        if not self._ahead:
            moves, self._moves = self._moves, []
            for state in moves:
                self.move(state)
        return len(news.grown.ids)

    def take_plain(self, row: PlainToken, origin: Origin) -> bool:
        """Prepare, apply and publish at once one token, the common case; False, and nothing done,
        where it takes more: a durable rollout, a pool, a stop string that may end it, a new
        segment."""
        rollout, detokenizer = self.rollout, self._detokenizer
        _, start, token_id, lp_sampled, lp_temp, kept_mass, flags = row
        if self._origin is not origin or start != self._num_ids or self._ahead:
            return False
        if rollout.is_durable or rollout.pool or rollout.sampling.stop:
            return False
        if detokenizer is not None:
            text = detokenizer.push(token_id)
            if text:
                rollout.text += text
                rollout.text_offset = detokenizer.offset
        rollout.output_ids.append(token_id)
        rollout.lp_sampled.append(lp_sampled)
        rollout.lp_temp.append(lp_temp)
        rollout.kept_mass.append(kept_mass)
        rollout.flags.append(flags)
        rollout.versions.append(origin.version)
        self._num_ids = start + 1
        self.publish()
        return True

    def conclude(self, state: RolloutState, reason: FinishReason) -> Rollout:
        """The rollout with its one ending, all that was prepared included; takes no more news.

        For a durable one a copy, that readers do not see before `end`; else the rollout itself.
        """
        final = self.rollout
        if final.is_durable:
            final = msgspec.structs.replace(final, **_copied_lists(final))
        for news in self._ahead:
            _write(final, news)
        if not self.rollout.is_durable:
            self._ahead.clear()
        self._flush_text(final, reason)
        final.move(state)
        final.finish_reason = reason
        final.ended_s = time.time()
        self.is_open = False
        return final

    def end(self, final: Rollout) -> None:
        """Show the ending that `conclude` gave."""
        if final is not self.rollout:
            for name in final.__struct_fields__:
                setattr(self.rollout, name, getattr(final, name))
            self._ahead.clear()
        self._moves.clear()
        self.publish()

    def rebuild(self, stop_ids: Iterable[int]) -> FinishReason | None:
        """Text and stop search of a rollout that comes with tokens; why it is over, or None.

        Raises InvalidTrajectory where tokens follow the one at which it should have ended.
        """
        rollout, detokenizer = self.rollout, self._detokenizer
        ids, stop_ids = rollout.output_ids, frozenset(stop_ids)
        ended_at = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        matched: int | str | None = None if ended_at is None else ids[ended_at]
        if detokenizer is not None:
            is_silent = matched is not None and not rollout.sampling.include_stop_str_in_output
            spoken = ids[:ended_at] if is_silent else ids
            rollout.text, num_used = detokenizer.extend(spoken)
            rollout.text_offset = detokenizer.offset
            if detokenizer.matched is not None and (ended_at is None or num_used <= ended_at + 1):
                ended_at, matched = num_used - 1, detokenizer.matched
        if ended_at is not None and ended_at != len(ids) - 1:
            raise InvalidTrajectory(
                f"output_ids: {len(ids)} tokens, yet number {ended_at + 1} completes "
                f"{matched!r}, which ends it",
                field="output_ids",
            )
        if matched is not None:
            return FinishReason("stop", matched)
        return FinishReason("length") if len(ids) >= rollout.max_tokens else None

    # --- parts of these -------------------------------------------------------------------

    def _read(self, tokens: RolloutTokens, skip: int) -> tuple[str, int, FinishReason | None]:
        """Detokenise `tokens.ids[skip:]`: text, end of what counts, and why it is over."""
        ids, finish, detokenizer = tokens.ids, tokens.finish, self._detokenizer
        if detokenizer is None:
            return "", len(ids), finish
        text = ""
        spoken = len(ids)
        if finish is not None and isinstance(finish.matched, int):
            # the text of a stop token is not shown (as vLLM does), unless asked for
            spoken -= not self.rollout.sampling.include_stop_str_in_output
        for index in range(skip, spoken):
            text += detokenizer.push(ids[index])
            if detokenizer.matched is not None:
                return text, index + 1, FinishReason("stop", detokenizer.matched)
        return text, len(ids), finish

    def _extra(self, tokens: RolloutTokens, part: slice | None, info: Ready) -> Extra | None:
        """Records that only some ask for. Prompt logprobs and routing go by position: what is
        there already (a new core computes all of it again) is not taken twice."""
        sampling = self.rollout.sampling
        if not sampling.record and not sampling.top_logprobs and sampling.prompt_logprobs is None:
            return None
        extra = Extra(
            lp_raw=_cut(tokens.lp_raw, part),
            entropy=_cut(tokens.entropy, part),
            kept_ids=_cut(tokens.kept_ids, part),
            top=_cut(tokens.top, part),
        )
        if tokens.prompt_lp:
            start = extra.prompt_start = self._num_prompt_lp
            skip = max(start, 1) - tokens.prompt_start
            extra.prompt_lp = tokens.prompt_lp[skip:]
            extra.prompt_top = tokens.prompt_top[skip:]
            if not start:
                # nothing speaks of the first token
                extra.prompt_lp.insert(0, None)
                extra.prompt_top.insert(0, [])
            self._num_prompt_lp += len(extra.prompt_lp)
        if tokens.routing_ids:
            width, _ = info.routing_widths
            skip = self._num_routed_bytes - tokens.routing_start * width
            size = len(tokens.routing_weights) // len(tokens.routing_ids)
            extra.routing_ids = tokens.routing_ids[skip:]
            extra.routing_weights = tokens.routing_weights[skip * size :]
            self._num_routed_bytes += len(extra.routing_ids)
        return extra if _has_any(extra) else None

    def _flush_text(self, final: Rollout, reason: FinishReason) -> None:
        """Give what was held back. Before a silent stop token half a character may be open,
        which that token would have completed: then it is not text of this rollout."""
        detokenizer = self._detokenizer
        if detokenizer is None or self._tokenizer is None:
            return
        tail = detokenizer.finish()
        if tail and isinstance(reason.matched, int):
            skip = final.sampling.skip_special_tokens
            whole = self._tokenizer.decode(final.output_ids, skip_special_tokens=skip)
            while not whole.startswith(final.text + tail):
                tail = tail[:-1]
        final.text += tail
        final.text_offset = len(final.text)


def detokenizer_of(rollout: Rollout, tokenizer: Tokenizer | None) -> Detokenizer | None:
    """A fresh one, as its sampling parameters ask."""
    if tokenizer is None:
        return None
    sampling = rollout.sampling
    return Detokenizer(
        tokenizer,
        stop=sampling.stop,
        include_stop=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        min_tokens=sampling.min_tokens,
    )


def durable_growth(
    rollout: Rollout, tokenizer: Tokenizer | None, stop_ids: Iterable[int]
) -> Growth:
    """A durable one that stands where its tokens end; it has ended if they complete it."""
    rollout.is_durable = True
    growth = Growth(rollout, tokenizer)
    if growth.is_open and rollout.output_ids:
        reason = growth.rebuild(stop_ids)
        if reason is not None:
            growth.end(growth.conclude(RolloutState.FINISHED, reason))
    return growth


def text_at(rollout: Rollout, num_tokens: int, tokenizer: Tokenizer | None) -> int:
    """Characters of its text that a reader had after the first `num_tokens` tokens."""
    detokenizer = detokenizer_of(rollout, tokenizer)
    if detokenizer is None:
        return 0
    reason = rollout.finish_reason
    is_whole = num_tokens >= len(rollout.output_ids)
    if is_whole and reason is not None and reason.type in ("stop", "length"):
        # the last token ended it: nobody has had that token without the last of the text
        return len(rollout.text)
    detokenizer.extend(rollout.output_ids[:num_tokens])
    return min(detokenizer.offset, len(rollout.text))


def _write(rollout: Rollout, news: News) -> None:
    grow(rollout, news.origin, news.grown, news.time_s)
    rollout.text += news.text
    rollout.text_offset = news.text_offset


def _copied_lists(rollout: Rollout) -> dict[str, object]:
    """Copies of what `grow` appends to."""
    copies: dict[str, object] = {}
    for name in rollout.__struct_fields__:
        value = getattr(rollout, name)
        if isinstance(value, list | bytearray) and name != "prompt_ids":
            copies[name] = value[:]
    return copies


def _cut(values: list[T], part: slice | None) -> list[T]:
    return values if part is None else values[part]


def _has_any(extra: Extra) -> bool:
    return bool(
        extra.lp_raw
        or extra.entropy
        or extra.kept_ids
        or extra.top
        or extra.prompt_lp
        or extra.routing_ids
    )
