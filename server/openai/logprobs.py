"""Per-token values of a rollout in the shapes of /v1 (PROTOCOLS.md 11.2, 9.2).

Never null, NaN or -inf for a token that was sampled: the floor is -9999.0.
"""

import base64
from collections.abc import Iterable, Sequence
from itertools import groupby

from msgspec import UNSET, Struct, to_builtins

from ...engine.detokenizer import Detokenizer
from ...engine.messages import Ready
from ...engine.rollout import LogprobsMode, Rollout
from ...engine.tokenizer import Tokenizer
from ..config import OpenAIConfig
from .wire import (
    ChatLogprobs,
    CompletionLogprobs,
    Extension,
    PromptLogprob,
    PromptLogprobs,
    Routing,
    SamplingFields,
    TokenLogprob,
    TopLogprob,
)

FLOOR = -9999.0


def finite(logprob: float) -> float:
    """The value, or the floor where it is lower or not a number."""
    return logprob if logprob > FLOOR else FLOOR


class TokenNames(Struct, frozen=True):
    """How tokens are spelled. Without a tokenizer, or on request, as `token_id:N`."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def text(self, token_id: int) -> str:
        if self.tokenizer is None or self.as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id)

    def key(self, token_id: int) -> str:
        """For legacy completions, where the string is all there is: half characters by bytes."""
        if self.tokenizer is None or self.as_ids:
            return f"token_id:{token_id}"
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token_id: int) -> list[int] | None:
        return None if self.tokenizer is None else list(self.tokenizer.token_bytes(token_id))


class TextPositions:
    """Where tokens begin in the text, in order of arrival."""

    def __init__(
        self, tokenizer: Tokenizer | None, *, skip_special_tokens: bool, offset: int = 0
    ) -> None:
        self._offset = offset
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        )

    def take(self, token_ids: Iterable[int]) -> list[int]:
        if self._detokenizer is None:
            return [self._offset for _ in token_ids]
        positions = []
        for token_id in token_ids:
            positions.append(self._offset + self._detokenizer.position)
            self._detokenizer.push(token_id)
        return positions


def mode_of(request: SamplingFields, config: OpenAIConfig) -> LogprobsMode:
    """Which distribution the answer's logprobs are of."""
    return request.logprobs_mode or config.logprobs_mode


def prompt_values(rollout: Rollout) -> list[float | None]:
    """Of the prompt's tokens; nothing precedes the first, so of one token there is no news."""
    return rollout.prompt_lp or [None]


def chosen(rollout: Rollout, mode: LogprobsMode) -> list[float]:
    """The logprobs of the sampled tokens in the distribution that was asked for."""
    match mode:
        case "raw":
            return rollout.lp_raw
        case "temp":
            return rollout.lp_temp
        case "sampled":
            return rollout.lp_sampled


class LogprobsWriter(Struct, frozen=True):
    """mode: which distribution; num_top: alternatives per token."""

    names: TokenNames
    mode: LogprobsMode
    num_top: int

    def completion(
        self, rollout: Rollout, start: int, end: int, positions: TextPositions
    ) -> CompletionLogprobs:
        ids = rollout.output_ids[start:end]
        values = chosen(rollout, self.mode)[start:end]
        return self._legacy(ids, values, rollout.top[start:end], positions)

    def prompt(self, rollout: Rollout, positions: TextPositions) -> CompletionLogprobs:
        """Of an echoed prompt; the first token has none."""
        # an aborted rollout may not have come to the end of its prompt
        values = prompt_values(rollout)
        ids = rollout.prompt_ids[: len(values)]
        return self._legacy(ids, values, rollout.prompt_top, positions)

    def _legacy(
        self,
        ids: Sequence[int],
        values: Sequence[float | None],
        tops: Sequence[list[tuple[int, float]]],
        positions: TextPositions,
    ) -> CompletionLogprobs:
        logprobs = CompletionLogprobs(
            text_offset=positions.take(ids),
            token_logprobs=[None if value is None else finite(value) for value in values],
            tokens=[self.names.key(token_id) for token_id in ids],
        )
        for index, (token_id, value) in enumerate(zip(ids, values, strict=True)):
            top = tops[index] if index < len(tops) else []
            if value is None:
                logprobs.top_logprobs.append(None)
                continue
            entry = {self.names.key(other): finite(lp) for other, lp in top[: self.num_top]}
            entry.setdefault(self.names.key(token_id), finite(value))
            logprobs.top_logprobs.append(entry)
        return logprobs

    def chat(self, rollout: Rollout, start: int, end: int) -> ChatLogprobs:
        values = chosen(rollout, self.mode)
        content = []
        for index in range(start, end):
            token_id = rollout.output_ids[index]
            top = rollout.top[index][: self.num_top] if self.num_top else []
            content.append(
                TokenLogprob(
                    self.names.text(token_id),
                    finite(values[index]),
                    self.names.data(token_id),
                    [
                        TopLogprob(self.names.text(other), finite(lp), self.names.data(other))
                        for other, lp in top
                    ],
                )
            )
        return ChatLogprobs(content)


def prompt_logprobs(rollout: Rollout, names: TokenNames) -> PromptLogprobs:
    """vLLM's form: per prompt token the alternatives and itself, by id; null for the first.

    `rank` is null for a token that is not among the alternatives.
    """
    listed: PromptLogprobs = []
    for index, value in enumerate(prompt_values(rollout)):
        if value is None:
            listed.append(None)
            continue
        entry = {}
        top = rollout.prompt_top[index] if index < len(rollout.prompt_top) else []
        for rank, (other, lp) in enumerate(top, 1):
            entry[str(other)] = PromptLogprob(finite(lp), rank, names.text(other))
        token_id = rollout.prompt_ids[index]
        if str(token_id) not in entry:
            entry[str(token_id)] = PromptLogprob(finite(value), None, names.text(token_id))
        listed.append(entry)
    return listed


def extension(rollout: Rollout, info: Ready, num_tokens: int) -> Extension:
    """Everything that a trainer needs of the first `num_tokens` output tokens."""

    def cut(values: list[float]) -> list[float]:
        return [finite(value) for value in values[:num_tokens]]

    record = rollout.sampling.record
    versions = rollout.versions[:num_tokens]
    return Extension(
        id=rollout.id,
        seed=rollout.seed,
        finish_reason=to_builtins(rollout.finish_reason),
        versions=[(version, len(list(run))) for version, run in groupby(versions)],
        flags=rollout.flags[:num_tokens],
        lp_sampled=cut(rollout.lp_sampled),
        lp_temp=cut(rollout.lp_temp),
        kept_mass=rollout.kept_mass[:num_tokens],
        lp_raw=cut(rollout.lp_raw) if "lp_raw" in record else UNSET,
        entropy=rollout.entropy[:num_tokens] if "entropy" in record else UNSET,
        kept_ids=rollout.kept_ids[:num_tokens] if "kept_ids" in record else UNSET,
        routing=routing_of(rollout, info) if "routing" in record else UNSET,
    )


def routing_of(rollout: Rollout, info: Ready) -> Routing:
    """Raw arrays as base64, with their shape."""
    width, _ = info.routing_widths
    positions = len(rollout.routing_ids) // width if width else 0
    return Routing(
        shape=[positions, info.num_moe_layers, info.num_experts_per_tok],
        ids=base64.b64encode(rollout.routing_ids).decode(),
        ids_dtype="uint8" if info.routing_id_bytes == 1 else "uint16",
        weights=base64.b64encode(rollout.routing_weights).decode(),
    )
