"""What a completion request asks for: its prompts and its sampling.

The same for POST /v1/completions and for a line of a batch.
"""

from ...engine.errors import InvalidRequest
from ...engine.rollout import SamplingParams
from ..config import OpenAIConfig
from ..service import Service
from .generation import sampling_of
from .logprobs import mode_of
from .wire import CompletionRequest


def check(request: CompletionRequest) -> None:
    if request.best_of is not None and request.best_of != request.n:
        raise InvalidRequest(
            f"best_of must be absent or equal to n ({request.n}), got {request.best_of}; "
            "ask for n samples and choose among them",
            field="best_of",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    scores = request.prompt_logprobs is not None or request.echo
    if request.max_tokens == 0 and not scores:
        raise InvalidRequest(
            "max_tokens must be at least 1, or 0 together with echo or prompt_logprobs",
            field="max_tokens",
        )


async def prompts_of(service: Service, request: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt, in order."""
    prompt = request.prompt
    if isinstance(prompt, str):
        prompt = [prompt]
    kinds = {type(part) for part in prompt}
    if not prompt or len(kinds) > 1:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids or a list of "
            f"such lists; got {'a mixed' if kinds else 'an empty'} list",
            field="prompt",
        )
    service.check_choices(1 if kinds == {int} else len(prompt), request.n)
    if kinds == {int}:
        return [[part for part in prompt if isinstance(part, int)]]
    texts = [part for part in prompt if isinstance(part, str)]
    if texts:
        return await service.encode(
            texts,
            add_special_tokens=request.add_special_tokens,
            is_cut=request.truncate_prompt_tokens is not None,
        )
    return [part for part in prompt if isinstance(part, list)]


def sampling_in(request: CompletionRequest, config: OpenAIConfig) -> SamplingParams:
    echo_top = request.logprobs if request.echo else None
    wanted = [k for k in (request.prompt_logprobs, echo_top) if k is not None]
    return sampling_of(
        request,
        max_tokens=max(1, request.max_tokens),
        num_top=request.logprobs,
        mode=mode_of(request, config),
        num_prompt_top=max(wanted, default=None),
        record=request.record,
    )
