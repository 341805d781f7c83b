"""Ended rollouts → one line of a batch's output, in OpenAI's form.

Nothing in a record depends on the clock, on chance or on what else ran: the same line under the
same model and settings gives the same bytes, in one run or in ten.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from ...engine.errors import EverstepError, InvalidRequest
from ...engine.rollout import Rollout
from ...engine.tokenizer import Tokenizer
from ..parsers import OutputParser, ReasoningParser, ToolParser, parse_output, starts_in_reasoning
from .lines import Job


class Message(Struct, kw_only=True):
    """An answer in chat form."""

    role: str = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


ReadAnswer = Callable[[str, str, bool], Message]
"""(prompt text, output text, are there tools) → message."""


class Choice(Struct, kw_only=True, omit_defaults=False):
    index: int
    text: str | UnsetType = UNSET
    message: Message | UnsetType = UNSET
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | UnsetType = UNSET
    seed: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Body(Struct, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    metadata: Any | UnsetType = UNSET


class Response(Struct):
    status_code: int
    request_id: str
    body: Body


class ErrorOf(Struct, kw_only=True):
    code: str
    message: str
    param: str | None = None
    line: int


class Record(Struct, kw_only=True):
    id: str
    custom_id: str
    response: Response | None
    error: ErrorOf | None


_encode = msgspec.json.Encoder().encode


class Recorder(Struct, frozen=True, kw_only=True):
    """Writes records.

    created      unix time in every record: when the input was last changed
    fingerprint  what the answers depend on outside their line: weights, numerics, seed, defaults
    """

    model: str
    created: int
    fingerprint: str
    tokenizer: Tokenizer | None
    read_answer: ReadAnswer

    def answer(self, job: Job, rollouts: Sequence[Rollout]) -> bytes:
        """The record of a job whose rollouts have ended well."""
        name = id_of(job.custom_id)
        chat = job.kind == "chat"
        prompt_tokens = sum(len(prompt) for prompt in job.prompts)
        output_tokens = sum(len(rollout.output_ids) for rollout in rollouts)
        body = Body(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            object="chat.completion" if chat else "text_completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(job, index, rollout) for index, rollout in enumerate(rollouts)],
            usage=Usage(prompt_tokens, output_tokens, prompt_tokens + output_tokens),
            metadata=UNSET if job.metadata is None else job.metadata,
        )
        response = Response(200, f"req_{name}", body)
        return _encode(
            Record(id=f"batch_req_{name}", custom_id=job.custom_id, response=response, error=None)
        )

    def _choice(self, job: Job, index: int, rollout: Rollout) -> Choice:
        reason = rollout.finish_reason
        assert reason is not None
        choice = Choice(
            index=index,
            finish_reason=reason.type,
            stop_reason=reason.matched,
            logprobs=self._logprobs(job, rollout),
            seed=rollout.seed,
        )
        if job.kind == "chat":
            choice.message = self.read_answer(job.prompt_text, rollout.text, bool(job.tools))
            if choice.message.tool_calls and reason.type == "stop":
                choice.finish_reason = "tool_calls"
        else:
            choice.text = rollout.text
        if job.return_token_ids:
            choice.token_ids = rollout.output_ids
        return choice

    def _logprobs(self, job: Job, rollout: Rollout) -> dict[str, Any] | None:
        if job.num_top is None:
            return None
        mode = rollout.sampling.logprobs_mode
        own = {"raw": rollout.lp_raw, "temp": rollout.lp_temp, "sampled": rollout.lp_sampled}[mode]
        tops = rollout.top or [[] for _ in own]
        if job.kind == "chat":
            return {
                "content": [
                    self._token(token, lp) | {"top_logprobs": [self._token(*t) for t in top]}
                    for token, lp, top in zip(rollout.output_ids, own, tops, strict=True)
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._text(token) for token in rollout.output_ids],
            "token_logprobs": own,
            "top_logprobs": [{self._text(token): lp for token, lp in top} for top in tops],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = list(self.tokenizer.token_bytes(token_id)) if self.tokenizer else None
        return {"token": self._text(token_id), "logprob": logprob, "bytes": data}

    def _text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer else f"token_id:{token_id}"


def refusal(custom_id: str, error: EverstepError, line: int) -> bytes:
    """The record of a line that could not be run."""
    return _encode(
        Record(
            id=f"batch_req_{id_of(custom_id)}",
            custom_id=custom_id,
            response=None,
            error=ErrorOf(
                code=error.code,
                message=str(error),
                param=error.field if isinstance(error, InvalidRequest) else None,
                line=line,
            ),
        )
    )


def id_of(custom_id: str) -> str:
    """24 hex digits, the same each time."""
    data = custom_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def plain_answer(_prompt: str, text: str, _has_tools: bool) -> Message:
    """The whole output as content."""
    return Message(content=text)


def parsed_answer(prompt: str, text: str, has_tools: bool) -> Message:
    """As the server reads an output: reasoning apart, tool calls parsed."""
    reasoning = ReasoningParser(is_open=starts_in_reasoning(prompt))
    parsed = parse_output(text, OutputParser(reasoning, ToolParser() if has_tools else None))
    calls = [
        {
            "id": f"call_{id_of(f'{prompt}{text}{call.index}')}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in parsed.calls
    ]
    return Message(
        content=parsed.content if parsed.content or not calls else None,
        reasoning_content=parsed.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )
