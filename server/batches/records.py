"""Ended rollouts → one line of a batch's output, in OpenAI's form.

Nothing in a record depends on the clock, on chance or on what else ran: the same line under the
same model and settings gives the same bytes, in one run or in ten.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from ...engine.errors import EverstepError, InvalidRequest
from ...engine.rollout import Rollout
from ...engine.tokenizer import Tokenizer
from ..config import OpenAIConfig
from ..openai import chat_request
from ..openai.generation import stop_reason_of
from ..openai.logprobs import LogprobsWriter, TextPositions, TokenNames, mode_of
from ..openai.wire import ChatLogprobs, ChatMessage, ChatRequest, CompletionLogprobs
from .lines import Job


class Choice(Struct, kw_only=True, omit_defaults=False):
    index: int
    text: str | UnsetType = UNSET
    message: ChatMessage | UnsetType = UNSET
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
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
    openai: OpenAIConfig
    eos_ids: tuple[int, ...]

    def answer(self, job: Job, rollouts: Sequence[Rollout]) -> bytes:
        """The record of a job whose rollouts have ended well."""
        name = id_of(job.custom_id)
        chat = isinstance(job.request, ChatRequest)
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
        reason, request = rollout.finish_reason, job.request
        assert reason is not None
        choice = Choice(
            index=index,
            finish_reason=reason.type,
            stop_reason=stop_reason_of(reason, self.eos_ids),
            logprobs=self._logprobs(job, rollout),
            seed=rollout.seed,
        )
        if isinstance(request, ChatRequest):
            parser = chat_request.parser_of(request, self.openai, is_open=job.starts_open)
            source = f"{job.custom_id}/{index}"
            choice.message = chat_request.message_of(rollout.text, parser, source)
            choice.finish_reason = chat_request.finish_reason_of(reason.type, parser)
        else:
            choice.text = rollout.text
        if job.return_token_ids:
            choice.token_ids = rollout.output_ids
        return choice

    def _logprobs(self, job: Job, rollout: Rollout) -> ChatLogprobs | CompletionLogprobs | None:
        request = job.request
        names = TokenNames(self.tokenizer, request.return_tokens_as_token_ids)
        mode, end = mode_of(request, self.openai), len(rollout.output_ids)
        if isinstance(request, ChatRequest):
            num_top = chat_request.num_top_of(request)
            return (
                None
                if num_top is None
                else LogprobsWriter(names, mode, num_top).chat(rollout, 0, end)
            )
        if request.logprobs is None:
            return None
        positions = TextPositions(self.tokenizer, skip_special_tokens=request.skip_special_tokens)
        writer = LogprobsWriter(names, mode, request.logprobs)
        return writer.completion(rollout, 0, end, positions)


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
