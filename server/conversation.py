"""Messages as sent → the checkpoint's template → the prompt text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.errors import InvalidRequest
from ..engine.tokenizer import RESERVED_KWARGS, Tokenizer

_OWN_FIELDS = RESERVED_KWARGS | {"chat_template", "continue_final_message", "tokenize"}


def render(
    tokenizer: Tokenizer | None,
    messages: Sequence[dict[str, Any]],
    *,
    template: str | None,
    tools: Sequence[dict[str, Any]] | None,
    options: Mapping[str, Any],
    add_generation_prompt: bool | None,
    continue_final_message: bool,
) -> str:
    """Raises InvalidRequest where the template, or the lack of one, refuses.

    messages, tools        as they were sent: a template prints their JSON, key by key
    template               instead of the checkpoint's: text, or the name of one of its own
    options                `chat_template_kwargs`
    add_generation_prompt  None: unless the final message is to be continued
    """
    if tokenizer is None:
        raise InvalidRequest(
            "this server runs without a tokenizer (skip_tokenizer_init), so it cannot render "
            "messages: send token ids",
            field="messages",
        )
    taken = sorted(_OWN_FIELDS & options.keys())
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs may not set {', '.join(taken)}; send it as a field of its own",
            field="chat_template_kwargs",
        )
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: "
            "leave add_generation_prompt out, or set it to false",
            field="continue_final_message",
        )
    _check_contents(messages)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    return tokenizer.render_chat(
        [template_message(message) for message in messages],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template=template,
        **options,
    )


def _check_contents(messages: Sequence[Mapping[str, Any]]) -> None:
    """A message says something: only an assistant's may be nothing but calls or reasoning."""
    for index, message in enumerate(messages):
        says = ["content"]
        if message["role"] == "assistant":
            says += ["tool_calls", "reasoning_content", "reasoning"]
        if all(message.get(name) is None for name in says):
            place = f"messages[{index}].content"
            also = " without tool_calls" if len(says) > 1 else ""
            raise InvalidRequest(
                f"{place} is required of a message of the role {message['role']!r}{also}",
                field=place,
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
