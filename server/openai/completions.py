"""POST /v1/completions: prompts → rollouts → text completions, whole or streamed."""

import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request

from ...engine.journal.ops import RequestKey
from ...engine.manager.manager import Delta
from ...engine.rollout import LogprobsMode, Rollout
from ..http import encode_json
from ..service import Service
from ..stream import DONE, event
from . import completion_request
from .generation import Generation
from .logprobs import LogprobsWriter, TextPositions, mode_of
from .wire import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse


class Completions:
    """One completion request, submitted."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        generation: Generation,
        mode: LogprobsMode,
    ) -> None:
        self.request = request
        self.generation = generation
        self.id = generation.id_as("cmpl")
        self._tokenizer = service.tokenizer
        self._writer = generation.writer(request.logprobs, mode)

    @classmethod
    async def submit(
        cls, service: Service, request: CompletionRequest, key: RequestKey | None
    ) -> "Completions":
        """Raises InvalidRequest and whatever the manager refuses with."""
        completion_request.check(request)
        config = service.config.openai
        generation = await Generation.submit(
            service,
            request,
            await completion_request.prompts_of(service, request),
            completion_request.sampling_in(request, config),
            key=key,
            hides_output=request.max_tokens == 0,
        )
        return cls(service, request, generation, mode_of(request, config))

    async def whole(self, http: Request) -> CompletionResponse:
        generation = self.generation
        await generation.finish(http)
        choices = []
        for index, rollout in enumerate(generation.rollouts):
            part = _Choice(self, index, rollout)
            choices.append(part.piece(0, len(rollout.output_ids), rollout.text, is_last=True))
        return self._response(choices)

    async def stream(self) -> AsyncGenerator[bytes]:
        """Whole events. The caller closes the generation, even if this never ran."""
        options = self.request.stream_options
        with_usage = options is not None and options.include_usage
        continuous = with_usage and options is not None and options.continuous_usage_stats
        generation = self.generation
        parts = [_Choice(self, i, rollout) for i, rollout in enumerate(generation.rollouts)]
        num_output = 0
        async with contextlib.aclosing(generation.deltas()) as news:
            async for index, delta in news:
                choice = parts[index].take(delta)
                num_output += 0 if generation.hides_output else delta.end - delta.start
                if choice is None:
                    continue
                chunk = self._chunk([choice])
                if with_usage:
                    chunk.usage = None
                if continuous:
                    chunk.usage = generation.usage(num_output=num_output)
                yield event(encode_json(chunk))
        if with_usage:
            chunk = self._chunk([])
            chunk.usage = generation.usage()
            yield event(encode_json(chunk))
        yield DONE

    def _chunk(self, choices: list[CompletionChoice]) -> CompletionResponse:
        generation = self.generation
        return CompletionResponse(
            id=self.id,
            created=generation.created,
            model=generation.model,
            choices=choices,
            system_fingerprint=generation.fingerprint,
        )

    def _response(self, choices: list[CompletionChoice]) -> CompletionResponse:
        response = self._chunk(choices)
        response.usage = self.generation.usage()
        return response

    def echoed(self, rollout: Rollout) -> str:
        if not self.request.echo or self._tokenizer is None:
            return ""
        return self._tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False)

    def positions(self, *, offset: int, skip_special_tokens: bool) -> TextPositions:
        return TextPositions(
            self._tokenizer, skip_special_tokens=skip_special_tokens, offset=offset
        )

    @property
    def writer(self) -> LogprobsWriter | None:
        return self._writer


class _Choice:
    """One choice as its rollout grows: what was echoed, where in the text we are."""

    def __init__(self, owner: Completions, index: int, rollout: Rollout) -> None:
        self._owner = owner
        self._index = index
        self._rollout = rollout
        self._echo = owner.echoed(rollout)
        self._is_first = True
        self._positions = owner.positions(
            offset=len(self._echo), skip_special_tokens=owner.request.skip_special_tokens
        )

    def take(self, delta: Delta) -> CompletionChoice | None:
        """The chunk for a delta; None where nothing of it is to be shown yet."""
        self._rollout = delta.rollout
        wants_tokens = self._owner.writer is not None or self._owner.request.return_token_ids
        has_tokens = delta.end > delta.start and (
            wants_tokens or self._owner.generation.service.tokenizer is None
        )
        if not delta.text and not has_tokens and not delta.is_last:
            return None
        return self.piece(delta.start, delta.end, delta.text, is_last=delta.is_last)

    def piece(self, start: int, end: int, text: str, *, is_last: bool) -> CompletionChoice:
        """The choice over output tokens [start, end): all of it, or one chunk."""
        generation, rollout = self._owner.generation, self._rollout
        if generation.hides_output:
            start, end, text = 0, 0, ""
        choice = CompletionChoice(
            index=self._index,
            text=text,
            logprobs=self._logprobs(start, end),
            token_ids=generation.ids_of(rollout, start, end),
        )
        if self._is_first:
            choice.text = self._echo + text
            choice.prompt_token_ids = generation.prompt_ids_of(rollout)
            choice.prompt_logprobs = generation.prompt_logprobs_of(rollout)
        if is_last:
            generation.common(choice, rollout)
        self._is_first = False
        return choice

    def _logprobs(self, start: int, end: int) -> CompletionLogprobs | None:
        writer = self._owner.writer
        if writer is None:
            return None
        logprobs = writer.completion(self._rollout, start, end, self._positions)
        if not (self._is_first and self._owner.request.echo):
            return logprobs
        prompt = writer.prompt(
            self._rollout, self._owner.positions(offset=0, skip_special_tokens=False)
        )
        return CompletionLogprobs(
            text_offset=prompt.text_offset + logprobs.text_offset,
            token_logprobs=prompt.token_logprobs + logprobs.token_logprobs,
            tokens=prompt.tokens + logprobs.tokens,
            top_logprobs=prompt.top_logprobs + logprobs.top_logprobs,
        )
