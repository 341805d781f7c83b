"""A rollout as it grows: its lists, its text, its segments, its ending, and who waits for news.

The one place where a `Rollout` is written; `RolloutManager` owns the growths.
"""

import asyncio
import time

from .detokenizer import Detokenizer
from .messages import Ready, RolloutTokens, Tokens
from .rollout import FinishReason, Rollout, RolloutState, Segment
from .tokenizer import Tokenizer


class Growth:
    """One rollout with what only the manager needs: its detokeniser and who waits for news."""

    __slots__ = ("_detokenizer", "_tokenizer", "news", "rollout")

    def __init__(self, rollout: Rollout, tokenizer: Tokenizer | None) -> None:
        self.rollout = rollout
        self.news = asyncio.Event()
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            sampling = rollout.sampling
            self._detokenizer = Detokenizer(
                tokenizer,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            )

    @property
    def is_live(self) -> bool:
        return not self.rollout.state.is_ended

    def publish(self) -> None:
        """Wake every reader; each looks at the rollout itself."""
        self.news.set()
        self.news = asyncio.Event()

    def move(self, state: RolloutState) -> None:
        """The scheduler, or a new core, has it in another state."""
        if self.rollout.state != state:
            self.rollout.num_preemptions += state == RolloutState.PREEMPTED
            self.rollout.move(state)

    def take(self, message: Tokens, tokens: RolloutTokens, info: Ready) -> FinishReason | None:
        """Append the news of a step; why it is over now, or None.

        A stop string ends it at the token that completes it (`matched` is a string then).
        """
        self._append_prompt(tokens, info)
        matched = self._append_output(message, tokens, info)
        return tokens.finish if matched is None else FinishReason("stop", matched)

    def end(self, state: RolloutState, reason: FinishReason) -> None:
        """Its one ending."""
        self._flush_text(reason)
        self.rollout.move(state)
        self.rollout.finish_reason = reason
        self.rollout.ended_s = time.time()
        self.publish()

    def _append_prompt(self, tokens: RolloutTokens, info: Ready) -> None:
        """Prompt logprobs and routing by position; what is there already is not taken twice."""
        rollout = self.rollout
        if tokens.prompt_lp:
            if not rollout.prompt_lp:
                rollout.prompt_lp.append(None)
                rollout.prompt_top.append([])
            skip = len(rollout.prompt_lp) - tokens.prompt_start
            rollout.prompt_lp += tokens.prompt_lp[skip:]
            rollout.prompt_top += tokens.prompt_top[skip:]
        if tokens.routing_ids:
            choices = info.num_moe_layers * info.num_experts_per_tok
            width = 1 if info.num_experts <= 256 else 2
            skip = len(rollout.routing_ids) // (choices * width) - tokens.routing_start
            rollout.routing_ids += tokens.routing_ids[skip * choices * width :]
            rollout.routing_weights += tokens.routing_weights[skip * choices * 4 :]
        if tokens.num_cached_tokens is not None and not rollout.output_ids:
            rollout.num_cached_tokens = tokens.num_cached_tokens

    def _append_output(self, message: Tokens, tokens: RolloutTokens, info: Ready) -> str | None:
        """Append what is new; the stop string if one was completed. Tokens after the one that
        completes it count as never sampled."""
        rollout, detokenizer = self.rollout, self._detokenizer
        skip = len(rollout.output_ids) - tokens.start
        count = len(tokens.ids)
        matched = None
        silent = self._silent_token(tokens)
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
        self._open_segment(message, info)
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

    def _silent_token(self, tokens: RolloutTokens) -> int | None:
        """Index of a stop token whose text is not shown (as vLLM does); None: all are."""
        finish = tokens.finish
        if finish is None or not isinstance(finish.matched, int):
            return None
        return None if self.rollout.sampling.include_stop_str_in_output else len(tokens.ids) - 1

    def _open_segment(self, message: Tokens, info: Ready) -> None:
        rollout = self.rollout
        last = rollout.segments[-1] if rollout.segments else None
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

    def _flush_text(self, reason: FinishReason) -> None:
        """Give what was held back. Before a silent stop token half a character may be open,
        which that token would have completed: then it is not text of this rollout."""
        rollout, detokenizer = self.rollout, self._detokenizer
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
