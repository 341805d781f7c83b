"""Reasoning and tool calls: whole examples, and independence of how the text arrives."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.server.parsers import (
    Content,
    OutputParser,
    Parsed,
    Reasoning,
    ReasoningParser,
    ToolCallFound,
    ToolParser,
    parse_output,
    starts_in_reasoning,
)

CALL = '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>'


def parser(*, is_open=False, reasoning=True, tools=True) -> OutputParser:
    return OutputParser(
        ReasoningParser(is_open=is_open) if reasoning else None, ToolParser() if tools else None
    )


def calls(*pairs) -> list[ToolCallFound]:
    return [ToolCallFound(i, name, arguments) for i, (name, arguments) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("because</think>\n\nOk.", True, "because", "Ok."),
        ("<think>\nbecause\n</think>\n\nOk.", False, "\nbecause\n", "Ok."),
        ("\n<think>because</think>Ok.", False, "because", "Ok."),
        ("<think>again</think>Ok.", True, "again", "Ok."),
        ("no end", True, "no end", ""),
        ("<think>no end </thi", False, "no end </thi", ""),
        ("Ok. <think>late</think>", False, "", "Ok. <think>late</think>"),
        ("<thin", False, "", "<thin"),
        ("\n <thinner", False, "", "\n <thinner"),
        ("</think>\n", True, "", ""),
        ("", True, "", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_reasoning_ends_at_the_tag(text, is_open, reasoning, content):
    parsed = parse_output(text, parser(is_open=is_open, tools=False))
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        (CALL, "", calls(("a", '{"x": 1}'))),
        (f"Ok.\n{CALL}", "Ok.", calls(("a", '{"x": 1}'))),
        (f"{CALL}\n{CALL}\n", "", calls(("a", '{"x": 1}'), ("a", '{"x": 1}'))),
        ('<tool_call>{"name":"a"}</tool_call>', "", calls(("a", "{}"))),
        ('<tool_call>{"name":"é","arguments":"{\\"y\\":2}"}', "", calls(("é", '{"y":2}'))),
        ('<tool_call>{"name": "a", "argu', '<tool_call>{"name": "a", "argu', []),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
        (
            f"<tool_call>[1]</tool_call>{CALL}",
            "<tool_call>[1]</tool_call>",
            calls(("a", '{"x": 1}')),
        ),
        (
            '<tool_call>{"name": "w", "arguments": {"s": "</tool_call>"}}</tool_call>',
            "",
            calls(("w", '{"s": "</tool_call>"}')),
        ),
        (
            f'<tool_call>{{"name": "open</tool_call>\n{CALL}',
            '<tool_call>{"name": "open</tool_call>',
            calls(("a", '{"x": 1}')),
        ),
        ("plain  \n", "plain  \n", []),
        ("a <tool_ca", "a <tool_ca", []),
        ('<tool_call>{"name":"a","arguments":3}</tool_call>', None, []),
        ('<tool_call>{"name":"a","arguments":{"x":NaN}}</tool_call>', None, []),
        ('<tool_call>{"name":"\\ud800"}</tool_call>', None, []),
        (
            '<tool_call>{"name":"a","arguments":{"x":"\\ud800"}}</tool_call>',
            "",
            calls(("a", '{"x": "\\ud800"}')),
        ),
        ('<tool_call>{"name":"a","arguments":"{"}</tool_call>', None, []),
    ],
)
def test_tool_calls_are_blocks_of_json_and_else_content(text, content, expected):
    parsed = parse_output(text, parser(reasoning=False))
    assert parsed.content == (text if content is None else content)
    assert parsed.calls == expected
    assert all(json.loads(call.arguments) is not None for call in parsed.calls)


def test_a_call_inside_the_reasoning_is_not_one():
    parsed = parse_output(f"{CALL}</think>\nOk. {CALL}", parser(is_open=True))
    assert parsed.reasoning == CALL
    assert parsed.content == "Ok."
    assert len(parsed.calls) == 1


def test_the_end_of_the_reasoning_is_an_offset_into_the_text():
    machine = ReasoningParser(is_open=True)
    for char in "why</think>\nOk.":
        machine.feed(char)
    assert machine.end_offset == len("why</think>")


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [("…<think>\n", True), ("<think>", True), ("<think> a", False), ("", False)],
)
def test_the_prompt_may_open_the_reasoning(prompt, is_open):
    assert starts_in_reasoning(prompt) is is_open


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        CALL,
        "\n",
        " ",
        "a",
        '"',
        "{",
        "}",
        "<",
        "é",
    ]
)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_the_result_does_not_depend_on_the_pieces(data):
    text = "".join(data.draw(st.lists(PIECES, max_size=12)))
    options = {
        name: data.draw(st.booleans(), label=name) for name in ("is_open", "reasoning", "tools")
    }
    whole = parse_output(text, parser(**options))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    machine, events = parser(**options), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += machine.feed(text[start:end])
    events += machine.finish()
    parsed = Parsed()
    for event in events:
        if isinstance(event, Reasoning):
            assert event.text
            parsed.reasoning += event.text
        elif isinstance(event, Content):
            assert event.text
            parsed.content += event.text
        else:
            parsed.calls.append(event)
    assert parsed == whole
    if not options["reasoning"] and not options["tools"]:
        assert parsed.content == text
