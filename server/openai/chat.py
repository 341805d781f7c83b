"""POST /v1/chat/completions: a conversation → rollouts → messages, whole or streamed.

A stream goes, per choice: role, then content / reasoning / tool calls, then the finish reason;
then usage where asked for, then [DONE] (PROTOCOLS.md 11.1).
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request

from ...engine.errors import InvalidRequest
from ...engine.journal.ops import RequestKey
from ...engine.manager.manager import Delta
from ...engine.rollout import Rollout
from ..http import encode_json
from ..parsers import (
    Content,
    Event,
    OutputParser,
    Reasoning,
    ToolCallFound,
)
from ..service import Service
from ..stream import DONE, event
from . import chat_request
from .generation import Generation
from .logprobs import LogprobsWriter, TextPositions, mode_of
from .wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatRequest,
    ChatResponse,
    FunctionCallOut,
    ToolCall,
    Usage,
)


class Chat:
    """One chat request, submitted."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        generation: Generation,
        writer: LogprobsWriter | None,
        *,
        is_reasoning_open: bool,
    ) -> None:
        self.request = request
        self.generation = generation
        self.id = generation.id_as("chatcmpl")
        self.writer = writer
        self._service = service
        self._is_open = is_reasoning_open

    @classmethod
    async def submit(
        cls,
        service: Service,
        request: ChatRequest,
        raw: dict[str, Any],
        key: RequestKey | None,
    ) -> "Chat":
        """`raw` is the request as sent. Raises InvalidRequest and what the manager refuses with."""
        chat_request.check(request)
        service.check_choices(1, request.n)
        config = service.config.openai
        prompt = chat_request.prompt_of(service, request, raw)
        sampling = chat_request.sampling_in(request, config)
        try:
            prompts = await chat_request.prompt_ids_of(service, request, prompt)
            generation = await Generation.submit(service, request, prompts, sampling, key=key)
        except InvalidRequest as error:
            raise chat_request.renamed(error, request) from None
        return cls(
            service,
            request,
            generation,
            generation.writer(chat_request.num_top_of(request), mode_of(request, config)),
            is_reasoning_open=chat_request.starts_open(service, request, prompt),
        )

    def parser(self) -> OutputParser:
        """A fresh one, for one choice."""
        config = self._service.config.openai
        return chat_request.parser_of(self.request, config, is_open=self._is_open)

    # --- whole

    async def whole(self, http: Request) -> ChatResponse:
        generation = self.generation
        await generation.finish(http)
        choices, num_reasoning = [], 0
        for index, rollout in enumerate(generation.rollouts):
            parser = self.parser()
            choices.append(self._choice(index, rollout, parser))
            num_reasoning += self.num_reasoning_tokens(rollout, parser)
        first = generation.rollouts[0]
        return ChatResponse(
            id=self.id,
            created=generation.created,
            model=generation.model,
            choices=choices,
            usage=generation.usage(num_reasoning=num_reasoning),
            system_fingerprint=generation.fingerprint,
            prompt_logprobs=generation.prompt_logprobs_of(first),
            prompt_token_ids=generation.prompt_ids_of(first),
        )

    def _choice(self, index: int, rollout: Rollout, parser: OutputParser) -> ChatChoice:
        message = chat_request.message_of(rollout.text, parser, rollout.id)
        choice = ChatChoice(index=index, message=message)
        choice.token_ids = self.generation.ids_of(rollout, 0, len(rollout.output_ids))
        choice.prompt_token_ids = self.generation.prompt_ids_of(rollout)
        if self.writer is not None:
            choice.logprobs = self.writer.chat(rollout, 0, len(rollout.output_ids))
        self.finish(choice, rollout, parser)
        return choice

    def finish(
        self, choice: ChatChoice | ChatChunkChoice, rollout: Rollout, parser: OutputParser
    ) -> None:
        """What it carries once it has ended."""
        self.generation.common(choice, rollout)
        assert choice.finish_reason is not None
        choice.finish_reason = chat_request.finish_reason_of(choice.finish_reason, parser)

    def num_reasoning_tokens(self, rollout: Rollout, parser: OutputParser) -> int:
        """Output tokens that begin before the end of the reasoning."""
        reasoning = parser.reasoning
        if reasoning is None or not (reasoning.is_reasoning or reasoning.end_offset):
            return 0
        if reasoning.end_offset is None:
            return len(rollout.output_ids)
        positions = TextPositions(
            self._service.tokenizer, skip_special_tokens=self.request.skip_special_tokens
        )
        end = reasoning.end_offset
        return sum(position < end for position in positions.take(rollout.output_ids))

    # --- streamed

    async def stream(self) -> AsyncGenerator[bytes]:
        """Whole events. The caller closes the generation, even if this never ran."""
        generation = self.generation
        options = self.request.stream_options
        with_usage = options is not None and options.include_usage
        continuous = with_usage and options is not None and options.continuous_usage_stats
        parts = [_Choice(self, i, rollout) for i, rollout in enumerate(generation.rollouts)]
        num_output = 0
        async with contextlib.aclosing(generation.deltas()) as news:
            async for index, delta in news:
                num_output += delta.end - delta.start
                usage: Usage | UnsetType | None = None if with_usage else UNSET
                if continuous:
                    usage = generation.usage(num_output=num_output)
                for chunk in parts[index].take(delta):
                    chunk.usage = usage
                    yield event(encode_json(chunk))
        if with_usage:
            num_reasoning = sum(
                self.num_reasoning_tokens(part.rollout, part.parser) for part in parts
            )
            chunk = self.chunk([])
            chunk.usage = generation.usage(num_reasoning=num_reasoning)
            yield event(encode_json(chunk))
        yield DONE

    def chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        generation = self.generation
        return ChatChunk(
            id=self.id,
            created=generation.created,
            model=generation.model,
            choices=choices,
            system_fingerprint=generation.fingerprint,
        )


class _Choice:
    """One streamed choice: its parser, and whether its role was sent."""

    def __init__(self, owner: Chat, index: int, rollout: Rollout) -> None:
        self._owner = owner
        self._index = index
        self.rollout = rollout
        self.parser = owner.parser()
        self._is_first = True

    def take(self, delta: Delta) -> list[ChatChunk]:
        """The chunks for a delta; token values go with the first that carries text."""
        self.rollout = delta.rollout
        events = self.parser.feed(delta.text)
        if delta.is_last:
            events += self.parser.finish()
        parts = [part for found in events for part in _deltas_of(found, self.rollout.id)]
        has_values = delta.end > delta.start and (
            self._owner.writer is not None or self._owner.request.return_token_ids
        )
        if has_values and not parts:
            parts.append(ChatDelta(content=""))
        chunks = [self._role()] if self._is_first else []
        self._is_first = False
        for number, part in enumerate(parts):
            choice = ChatChunkChoice(index=self._index, delta=part)
            if number == 0 and has_values:
                self._add_values(choice, delta.start, delta.end)
            chunks.append(self._owner.chunk([choice]))
        if delta.is_last:
            last = ChatChunkChoice(index=self._index, delta=ChatDelta())
            self._owner.finish(last, self.rollout, self.parser)
            chunks.append(self._owner.chunk([last]))
        return chunks

    def _role(self) -> ChatChunk:
        generation = self._owner.generation
        choice = ChatChunkChoice(index=self._index, delta=ChatDelta(role="assistant", content=""))
        choice.prompt_token_ids = generation.prompt_ids_of(self.rollout)
        chunk = self._owner.chunk([choice])
        if self._index == 0:
            chunk.prompt_token_ids = generation.prompt_ids_of(self.rollout)
            chunk.prompt_logprobs = generation.prompt_logprobs_of(self.rollout)
        return chunk

    def _add_values(self, choice: ChatChunkChoice, start: int, end: int) -> None:
        choice.token_ids = self._owner.generation.ids_of(self.rollout, start, end)
        if self._owner.writer is not None:
            choice.logprobs = self._owner.writer.chat(self.rollout, start, end)


def _deltas_of(found: Event, rollout_id: str) -> Sequence[ChatDelta]:
    match found:
        case Content(text=text):
            return [ChatDelta(content=text)]
        case Reasoning(text=text):
            return [ChatDelta(reasoning_content=text)]
        case ToolCallFound(index=index, arguments=arguments):
            head = chat_request.tool_call(found, rollout_id, index)
            head.function.arguments = ""
            tail = ToolCall(index=index, function=FunctionCallOut(arguments=arguments))
            return [ChatDelta(tool_calls=[head]), ChatDelta(tool_calls=[tail])]
