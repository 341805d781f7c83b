"""What a chat request asks for: its prompt, its sampling, and how its answers are read.

The same for POST /v1/chat/completions and for a line of a batch.
"""

import hashlib
from typing import Any

from msgspec import UNSET, UnsetType

from ...engine.errors import InvalidRequest
from ...engine.rollout import SamplingParams
from ..config import OpenAIConfig
from ..conversation import render
from ..parsers import (
    OutputParser,
    ReasoningParser,
    ToolCallFound,
    ToolParser,
    parse_output,
    starts_in_reasoning,
)
from ..service import Service
from .generation import sampling_of
from .logprobs import mode_of
from .wire import ChatMessage, ChatRequest, FunctionCallOut, ToolCall


def prompt_of(service: Service, request: ChatRequest, raw: dict[str, Any]) -> str:
    options = dict(request.chat_template_kwargs)
    if request.documents is not None:
        options.setdefault("documents", request.documents)
    if request.reasoning_effort is not None:
        options.setdefault("reasoning_effort", request.reasoning_effort)
    return render(
        service.tokenizer,
        raw["messages"],
        template=service.config.openai.chat_template,
        tools=raw.get("tools") if request.tool_choice != "none" else None,
        options=options,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )


def starts_open(service: Service, request: ChatRequest, prompt: str) -> bool:
    if service.config.openai.reasoning == "always":
        return True
    if request.continue_final_message:
        # the message to go on with may have been cut inside its reasoning
        return prompt.rfind("<think>") > prompt.rfind("</think>")
    return starts_in_reasoning(prompt)


def renamed(error: InvalidRequest, request: ChatRequest) -> InvalidRequest:
    """The same error in the names of this endpoint."""
    text = str(error)
    if error.field == "prompt":
        return type(error)(f"messages: {text}", field="messages")
    if error.field == "max_tokens" and request.max_completion_tokens is not None:
        name = "max_completion_tokens"
        return type(error)(text.replace("max_tokens", name, 1), field=name)
    return error


def check(request: ChatRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    if request.tool_choice not in (None, "auto", "none"):
        raise InvalidRequest(
            "tool_choice: forcing a call is not supported yet; accepted are 'auto' and 'none'",
            field="tool_choice",
        )


async def prompt_ids_of(service: Service, request: ChatRequest, prompt: str) -> list[list[int]]:
    return await service.encode(
        [prompt],
        add_special_tokens=request.add_special_tokens,
        is_cut=request.truncate_prompt_tokens is not None,
    )


def num_top_of(request: ChatRequest) -> int | None:
    """Alternatives per token that the answer shows; None: no logprobs."""
    return (request.top_logprobs or 0) if request.logprobs else None


def sampling_in(request: ChatRequest, config: OpenAIConfig) -> SamplingParams:
    return sampling_of(
        request,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        num_top=num_top_of(request),
        mode=mode_of(request, config),
        num_prompt_top=request.prompt_logprobs,
        record=request.record,
    )


def parser_of(request: ChatRequest, config: OpenAIConfig, *, is_open: bool) -> OutputParser:
    """A fresh one, for one answer. is_open: it begins inside its reasoning."""
    splits = request.include_reasoning and request.separate_reasoning
    reads_tools = bool(request.tools) and request.tool_choice != "none"
    return OutputParser(
        ReasoningParser(is_open=is_open) if splits and config.reasoning != "off" else None,
        ToolParser() if reads_tools else None,
        max_calls=None if request.parallel_tool_calls else 1,
    )


def message_of(text: str, parser: OutputParser, source: str) -> ChatMessage:
    """A whole answer. source: what names its calls, the same whenever it is asked for."""
    parsed = parse_output(text, parser)
    calls = [tool_call(call, source, UNSET) for call in parsed.calls]
    return ChatMessage(
        content=None if calls and not parsed.content else parsed.content,
        reasoning_content=parsed.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def finish_reason_of(reason: str, parser: OutputParser) -> str:
    """`tool_calls` where it ended by itself and called something."""
    return "tool_calls" if parser.num_calls and reason == "stop" else reason


def tool_call(call: ToolCallFound, source: str, index: int | UnsetType) -> ToolCall:
    # the same answer, asked for again, names its calls the same
    name = hashlib.blake2b(f"{source}/{call.index}".encode(), digest_size=12).hexdigest()
    return ToolCall(
        index=index,
        id=f"call_{name}",
        type="function",
        function=FunctionCallOut(name=call.name, arguments=call.arguments),
    )
