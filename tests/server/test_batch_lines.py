"""A body means the same in a line of a batch as when it is sent to its url."""

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.server.batches.lines import Defaults
from everstep.server.batches.output import BatchOutput
from everstep.server.batches.run import BatchRun
from everstep.server.config import OpenAIConfig

from .conftest import Server, serve

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add"}}]
PARTS = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
SAID = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}}

ANSWERED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"messages": [{"role": "developer", "content": PARTS}, *HI]}),
    (CHAT, {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [SAID]}]}),
    (
        CHAT,
        {"messages": [*HI, {"role": "assistant", "content": "So"}], "continue_final_message": True},
    ),
    (CHAT, {"tools": TOOLS}),
    (CHAT, {"tools": TOOLS, "tool_choice": "none"}),
    (CHAT, {"tools": TOOLS, "parallel_tool_calls": False}),
    (CHAT, {"chat_template_kwargs": {"think": True}}),
    (CHAT, {"chat_template_kwargs": {"think": True}, "separate_reasoning": False}),
    (CHAT, {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3, "max_tokens": 9}),
    (CHAT, {"logprobs": True, "return_tokens_as_token_ids": True, "logprobs_mode": "sampled"}),
    (CHAT, {"truncate_prompt_tokens": 2, "return_token_ids": True, "unknown": 1, "user": None}),
    (CHAT, {"n": 2, "logit_bias": {"5": -100}, "temperature": 0.5, "top_k": 7, "min_p": 0.1}),
    (CHAT, {"stop": ["wor"], "no_stop_trim": True, "skip_special_tokens": False}),
    (TEXT, {}),
    (TEXT, {"logprobs": 2, "max_tokens": 4}),
    (TEXT, {"prompt": ["a", "b"], "stop": "wor", "ignore_eos": True, "max_tokens": 9}),
    (TEXT, {"prompt": [5, 6], "add_special_tokens": False, "max_completion_tokens": 3}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(
        (CHAT, {name: value})
        for name, value in [
            ("messages", [{"role": "robot", "content": "a"}]),
            ("messages", [{"role": "user"}]),
            ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
            ("tool_choice", "required"),
            ("tools", [{"type": "function"}]),
            ("max_tokens", 0),
            ("max_tokens", -5),
            ("n", "x"),
            ("stop", [1]),
            ("seed", 1.5),
            ("logit_bias", {"a": 1}),
            ("logit_bias", {"9999": 1}),
            ("top_logprobs", 3),
            ("guided_json", {"a": 1}),
            ("response_format", {"type": "json_object"}),
            ("chat_template_kwargs", {"tokenize": False}),
            ("chat_template", "x"),
            ("reasoning_effort", 5),
            ("metadata", 5),
        ]
    ),
    (TEXT, {"prompt": ["a", 1]}),
    (TEXT, {"prompt": "long " * 600}),
    (TEXT, {"max_tokens": 0}),
    (TEXT, {"logprobs": True}),
    (TEXT, {"best_of": 3}),
    (TEXT, {"suffix": "x"}),
]


async def record_of(
    server: Server, folder: Path, line: dict[str, Any], defaults: Defaults
) -> dict[str, Any]:
    source = folder / "in.jsonl"
    source.write_text(json.dumps(line) + "\n")
    output = BatchOutput(folder / "out.jsonl")
    await BatchRun(server.manager, server.tokenizer, source, output, defaults=defaults).run()
    output.close()
    [record] = (folder / "out.jsonl").read_text().splitlines()
    return json.loads(record)


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    base = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    return {**base, "seed": 7, **fields}


def told(server: Server) -> list[tuple[Any, ...]]:
    """What the core was asked for; the seeds of several prompts are each face's own."""
    found = [(a.prompt_ids, a.sampling, a.max_tokens, a.stop_ids) for a in server.backend.adds]
    server.backend.adds.clear()
    return found


@pytest.mark.parametrize(("path", "fields"), ANSWERED)
async def test_a_line_is_answered_as_its_url_answers(anyio_backend, tmp_path, path, fields):
    async with serve(logprobs_mode="temp") as server:
        server.reply(f"because</think>hello world{CALL}{CALL}")
        body = body_of(path, fields)
        live = (await server.post(path, **body)).json()
        asked = told(server)
        line = {"custom_id": "x", "method": "POST", "url": path, "body": body}
        defaults = Defaults(openai=OpenAIConfig(logprobs_mode="temp"))
        record = await record_of(server, tmp_path, line, defaults)
        assert record["error"] is None
        if len(asked) == 1:
            assert told(server) == asked
        else:
            assert [one[0] for one in told(server)] == [one[0] for one in asked]
        answer = record["response"]["body"]
        for ours, theirs in zip(answer["choices"], live["choices"], strict=True):
            ours.pop("seed")
            ours.pop("token_ids", None)
            theirs.pop("token_ids", None)
            theirs.pop("prompt_token_ids", None)
            for choice in (ours, theirs):
                for call in choice.get("message", {}).get("tool_calls", []):
                    assert call.pop("id").startswith("call_")
            assert ours == theirs
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert answer["usage"] == {name: live["usage"][name] for name in names}


@pytest.mark.parametrize(("path", "fields"), REFUSED)
async def test_a_line_is_refused_as_its_url_refuses(anyio_backend, tmp_path, path, fields):
    async with serve() as server:
        body = body_of(path, fields)
        live = (await server.post(path, **body)).json()["error"]
        line = {"custom_id": "x", "method": "POST", "url": path, "body": body}
        record = await record_of(server, tmp_path, line, Defaults())
        assert record["response"] is None
        found = {name: record["error"][name] for name in ("code", "message", "param")}
        assert found == {name: live[name] for name in found}
        assert server.backend.adds == []


@pytest.mark.parametrize("name", ["echo", "stream", "return_meta_info"])
async def test_what_a_record_would_not_show_is_refused(server, tmp_path, name):
    line = {"custom_id": "x", "url": TEXT, "body": {"prompt": "Hi", name: True}}
    record = await record_of(server, tmp_path, line, Defaults())
    assert record["error"]["param"] == name


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e9])
async def test_logprobs_of_a_record_are_numbers(server, tmp_path, value):
    server.backend.lp = lambda token_id: value
    line = {"custom_id": "x", "messages": HI, "logprobs": True}
    record = await record_of(server, tmp_path, line, Defaults())
    content = record["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert {one["logprob"] for one in content} == {-9999.0}
