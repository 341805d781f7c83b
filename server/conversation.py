"""Messages as sent → the checkpoint's template → the prompt text."""

import json
from typing import Any

from ..engine.errors import InvalidRequest
from ..engine.tokenizer import RESERVED_KWARGS
from .generation import Service
from .openai_types import ChatRequest

_OWN_FIELDS = RESERVED_KWARGS | {"chat_template", "continue_final_message", "tokenize"}


def render(service: Service, request: ChatRequest, raw: dict[str, Any]) -> str:
    """Raises InvalidRequest where the template, or the lack of one, refuses."""
    if service.tokenizer is None:
        raise InvalidRequest(
            "this server runs without a tokenizer (skip_tokenizer_init), so it cannot render "
            "messages: send token ids to /v1/completions",
            field="messages",
        )
    taken = sorted(_OWN_FIELDS & request.chat_template_kwargs.keys())
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs may not set {', '.join(taken)}; send it as a field of its own",
            field="chat_template_kwargs",
        )
    options = dict(request.chat_template_kwargs)
    if request.documents is not None:
        options.setdefault("documents", request.documents)
    if request.reasoning_effort is not None:
        options.setdefault("reasoning_effort", request.reasoning_effort)
    generates = request.add_generation_prompt
    if generates is None:
        generates = not request.continue_final_message
    # tools as they were sent: a template prints their JSON, key by key
    tools = raw.get("tools") if request.tool_choice != "none" else None
    return service.tokenizer.render_chat(
        [template_message(message) for message in raw["messages"]],
        tools=tools,
        add_generation_prompt=generates,
        continue_final_message=request.continue_final_message,
        chat_template=service.config.openai.chat_template,
        **options,
    )


def template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A checked message as templates expect it: text content, arguments as objects.

    `developer` is OpenAI's newer word for `system`, which templates know.
    """
    result = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    result["content"] = content or ""
    if result["role"] == "developer":
        result["role"] = "system"
    if "reasoning" in result:
        result.setdefault("reasoning_content", result["reasoning"])
    if "tool_calls" in result:
        result["tool_calls"] = [_template_call(call) for call in result["tool_calls"]]
    return result


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            parsed = None
        # what is no object is printed as it is
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}
