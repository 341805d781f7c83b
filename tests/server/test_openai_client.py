"""The official client sees what it expects of OpenAI."""

import openai
import pytest

from .conftest import serve

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


async def test_models_are_listed_and_found(server):
    client = server.client()
    page = await client.models.list()
    assert [model.id for model in page.data] == ["org/ring"]
    assert (await client.models.retrieve("org/ring")).id == "org/ring"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_a_chat_answer_with_usage(server):
    reply = await server.client().chat.completions.create(model="org/ring", messages=HI)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert choice.finish_reason == "stop"
    prompt_ids = server.backend.adds[0].prompt_ids
    text = "<role>USER</role>Hi<role>ASSISTANT</role>"
    assert server.tokenizer.decode(prompt_ids) == text
    usage = reply.usage
    assert usage.prompt_tokens == len(prompt_ids)
    assert usage.prompt_tokens_details.cached_tokens == len(prompt_ids) // 2
    assert usage.completion_tokens == len(server.replies[0])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0


async def test_a_chat_stream_in_the_published_order(server):
    stream = await server.client().chat.completions.create(
        model="org/ring", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(texts) == "hello world"
    assert len(texts) > 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.model_dump(exclude_none=True) == {}
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(server.replies[0])
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_reasoning_is_split_off_and_counted(server):
    server.reply("because</think>\n\nhello")
    client = server.client()
    options = {"extra_body": {"chat_template_kwargs": {"think": True}}}
    reply = await client.chat.completions.create(model="org/ring", messages=HI, **options)
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("because", "hello")
    count = len(server.tokenizer.encode("because</think>"))
    assert reply.usage.completion_tokens_details.reasoning_tokens == count

    stream = await client.chat.completions.create(
        model="org/ring",
        messages=HI,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "because"
    assert "".join(d.content or "" for d in deltas) == "hello"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == count

    raw = {"extra_body": {"separate_reasoning": False, "chat_template_kwargs": {"think": True}}}
    reply = await client.chat.completions.create(model="org/ring", messages=HI, **raw)
    assert reply.choices[0].message.content == "because</think>\n\nhello"


async def test_tool_calls_whole_and_streamed(server):
    server.reply(f"Ok.\n{CALL}{CALL}")
    client = server.client()
    reply = await client.chat.completions.create(model="org/ring", messages=HI, tools=TOOLS)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Ok."
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("add", '{"x": 1}')] * 2
    assert '"name": "add"' in server.tokenizer.decode(server.backend.adds[0].prompt_ids)

    stream = await client.chat.completions.create(
        model="org/ring", messages=HI, tools=TOOLS, stream=True
    )
    names, arguments, ids, reason = {}, {}, {}, None
    async for chunk in stream:
        reason = chunk.choices[0].finish_reason or reason
        for call in chunk.choices[0].delta.tool_calls or []:
            names.setdefault(call.index, call.function.name)
            ids.setdefault(call.index, call.id)
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert names == {0: "add", 1: "add"}
    assert arguments == {0: '{"x": 1}', 1: '{"x": 1}'}
    assert len(set(ids.values())) == 2
    assert reason == "tool_calls"


async def test_a_client_that_takes_one_call_at_a_time_gets_the_first(server):
    server.reply(f"Ok.\n{CALL}{CALL.replace('add', 'sub')}")
    asked = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False}
    reply = await server.client().chat.completions.create(model="org/ring", **asked)
    [choice] = reply.choices
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]
    assert (choice.message.content, choice.finish_reason) == ("Ok.", "tool_calls")
    deltas = [chunk["choices"][0]["delta"] for chunk in await server.events(CHAT, **asked)]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"].get("name") for call in calls] == ["add", None]


async def test_every_chunk_says_which_weights_made_it(server):
    for path, body in ((CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "Hi"})):
        usage = {"stream_options": {"include_usage": True}}
        prints = {e.get("system_fingerprint") for e in await server.events(path, **body, **usage)}
        assert prints == {"fake@0123456789ab"}


async def test_tool_results_go_back_into_the_template(server):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}}
    await server.client().chat.completions.create(
        model="org/ring",
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}],
            },
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
        ],
        tools=TOOLS,
        tool_choice="none",
    )
    assert server.tokenizer.decode(server.backend.adds[0].prompt_ids) == (
        "<role>SYSTEM</role>Be\nbrief<role>USER</role>Hi<role>ASSISTANT</role>"
        '<tool_call>{"x": 1}</tool_call><role>TOOL</role>2<role>ASSISTANT</role>'
    )


async def test_chat_logprobs_carry_true_bytes(server):
    server.reply("é")
    reply = await server.client().chat.completions.create(
        model="org/ring", messages=HI, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes)[:2] == "é".encode()
    ids = server.replies[0]
    assert [token.logprob for token in content] == [server.backend.lp(i) for i in ids]
    assert all(len(token.top_logprobs) == 2 for token in content)
    stream = await server.client().chat.completions.create(
        model="org/ring", messages=HI, logprobs=True, stream=True
    )
    streamed = []
    async for chunk in stream:
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.logprob for token in streamed] == [token.logprob for token in content]
    assert streamed[0].top_logprobs == []


async def test_completions_are_prompt_major_and_stream_the_same(server):
    server.reply("a", "b", "c", "d")
    client = server.client()
    reply = await client.completions.create(model="org/ring", prompt=["x", "y"], n=2)
    assert [(c.index, c.text) for c in reply.choices] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    prompts = [server.tokenizer.decode(add.prompt_ids) for add in server.backend.adds]
    assert prompts == ["x", "x", "y", "y"]
    assert reply.usage.prompt_tokens == 2

    texts = {}
    stream = await client.completions.create(model="org/ring", prompt=["x", "y"], n=2, stream=True)
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "a", 1: "b", 2: "c", 3: "d"}


async def test_completion_logprobs_with_echo_are_aligned(server):
    server.reply("é!")
    reply = await server.client().completions.create(
        model="org/ring", prompt="hé", echo=True, logprobs=1, max_tokens=5
    )
    choice = reply.choices[0]
    logprobs = choice.logprobs
    assert choice.text == "hé" + "é!"
    prompt_ids = server.backend.adds[0].prompt_ids
    assert len(logprobs.tokens) == len(prompt_ids) + len(server.replies[0])
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert None not in logprobs.token_logprobs[1:]
    assert logprobs.text_offset[:3] == [0, 1, 1]
    bang = logprobs.tokens.index("!")
    assert choice.text[logprobs.text_offset[bang]] == "!"
    # halves of a character stay apart
    assert "bytes:\\xc3" in logprobs.tokens
    chosen = list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True))[1:]
    for (token, value), top in zip(chosen, logprobs.top_logprobs[1:], strict=True):
        assert top[token] == value


async def test_errors_reach_the_client_as_its_own_exceptions(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="org/ring", messages=HI, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model="org/ring", prompt=[5] * 600)
    assert long.value.code == "context_length_exceeded"
    server.backend.fail_at = (2, "nonfinite: step 12, layer 3")
    with pytest.raises(openai.InternalServerError) as failed:
        await client.chat.completions.create(model="org/ring", messages=HI)
    assert failed.value.code == "nonfinite"
    stream = await client.chat.completions.create(model="org/ring", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="layer 3"):
        async for _ in stream:
            pass


async def test_a_key_is_asked_for_on_v1_only(anyio_backend):
    async with serve(http={"api_key": "secret"}) as server:
        with pytest.raises(openai.AuthenticationError):
            await server.client(api_key="wrong").models.list()
        assert (await server.client(api_key="secret").models.list()).data
        assert (await server.http.get("/health")).status_code == 200
        denied = await server.http.get("/v1/models")
        assert denied.status_code == 401
        assert denied.json()["error"]["code"] == "invalid_api_key"
        assert denied.headers["x-request-id"]
