"""Streams: heartbeats, readers that leave, readers that are slow, failures half way."""

import asyncio
import json

import pytest

from everstep.engine.errors import EngineDied

from .conftest import call, serve

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
KEEP_ALIVE = b": keep-alive\n\n"


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_silent_stream_sends_comments_and_then_goes_on(anyio_backend):
    async with serve(http={"heartbeat_s": 0.01}) as server:
        server.backend.gate.clear()
        request = call(server.app, TEXT, {"prompt": "Hi", "stream": True})
        head = await request.sent.get()
        assert head["status"] == 200
        assert await request.body() == KEEP_ALIVE
        assert await request.body() == KEEP_ALIVE
        server.backend.gate.set()
        await request.task
        rest = b"".join([request.sent.get_nowait()["body"] for _ in range(request.sent.qsize())])
        assert rest.endswith(b"data: [DONE]\n\n")
        texts = [
            json.loads(line[6:])["choices"][0]["text"]
            for line in rest.decode().split("\n\n")
            if line.startswith("data: {")
        ]
        assert "".join(texts) == "hello world"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_reader_that_leaves_ends_its_rollouts(server, stream, n):
    server.replies[:] = [server.tokenizer.encode("a")]
    server.backend.gate.clear()
    body = {"messages": HI, "stream": stream, "n": n}
    request = call(server.app, CHAT, body)
    await settle()
    assert server.manager.num_live == n
    request.leave()
    await asyncio.wait_for(request.task, 5)
    assert server.manager.num_live == 0
    assert len(server.backend.cancelled) == n
    assert list(server.manager._holdings) == []


async def test_a_reader_that_leaves_in_the_middle_ends_its_rollout(server):
    server.replies[:] = [server.tokenizer.encode("a")]
    request = call(server.app, CHAT, {"messages": HI, "stream": True}, window=1)
    await settle()
    assert server.manager.num_live == 1
    request.leave()
    await asyncio.wait_for(request.task, 5)
    assert server.manager.num_live == 0


async def test_a_slow_reader_holds_up_nothing_and_misses_nothing(server):
    server.reply("hello world " * 30)
    request = call(server.app, TEXT, {"prompt": "Hi", "max_tokens": 200, "stream": True}, window=1)
    await settle()
    # the core finishes although nobody reads; what is unread stays in the rollout, once
    for _ in range(100):
        await settle()
    assert server.manager.num_live == 0
    assert request.sent.qsize() <= 1
    chunks = []
    while not chunks or chunks[-1]["type"] != "http.response.body" or chunks[-1]["more_body"]:
        chunks.append(await asyncio.wait_for(request.sent.get(), 5))
    await request.task
    lines = b"".join(chunk.get("body", b"") for chunk in chunks).decode().split("\n\n")
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line[6:7] == "{"]
    assert "".join(texts) == "hello world " * 30
    # and it came in a few large pieces
    assert len(texts) < 10


async def test_all_choices_of_a_slow_reader_come_whole(server):
    server.reply("hello world " * 9, "because " * 9, "the answer " * 9)
    body = {"messages": HI, "stream": True, "n": 3}
    request = call(server.app, CHAT, body, window=1)
    texts = {}
    while True:
        await settle()
        message = await asyncio.wait_for(request.sent.get(), 5)
        for line in message.get("body", b"").decode().split("\n\n"):
            if line[6:7] == "{":
                choice = json.loads(line[6:])["choices"][0]
                index = choice["index"]
                texts[index] = texts.get(index, "") + choice["delta"].get("content", "")
        if message["type"] == "http.response.body" and not message["more_body"]:
            break
    assert texts == {0: "hello world " * 9, 1: "because " * 9, 2: "the answer " * 9}


async def test_a_failure_half_way_is_an_error_event_then_done(server):
    server.reply("hello world because")
    server.backend.fail_at = (2, "nonfinite: step 12, layer 3")
    request = call(server.app, TEXT, {"prompt": "Hi", "stream": True}, window=1)
    body = b""
    while True:
        await settle()
        message = await asyncio.wait_for(request.sent.get(), 5)
        body += message.get("body", b"")
        if message["type"] == "http.response.body" and not message["more_body"]:
            break
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3][6:])["error"]
    assert error["code"] == "nonfinite"
    assert error["type"] == "server_error"
    assert list(server.manager._holdings) == []


async def test_a_failure_before_the_first_token_still_has_a_status(server):
    server.backend.fail_at = (0, "nonfinite: step 1, layer 0")
    response = await server.post(CHAT, messages=HI, stream=True, n=2)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "nonfinite"
    assert list(server.manager._holdings) == []


async def test_cancelling_elsewhere_ends_the_stream_with_abort(server):
    server.replies[:] = [server.tokenizer.encode("a")]
    request = call(server.app, TEXT, {"prompt": "Hi", "max_tokens": 400, "stream": True}, window=1)
    await settle()
    await server.manager.cancel([server.backend.adds[0].rollout_id])
    reasons = []
    while True:
        message = await asyncio.wait_for(request.sent.get(), 5)
        lines = message.get("body", b"").decode().split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line[6:7] == "{"]
        reasons += [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        if message["type"] == "http.response.body" and not message["more_body"]:
            break
    assert reasons[-1] == "abort"


async def test_halves_of_a_character_are_never_sent(server):
    server.reply("a😀é</think>你")
    chunks = await server.events(CHAT, messages=HI)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "a😀é</think>你"
    assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_is_gone_for_good_is_503(server, stream):
    server.backend.gate.clear()
    request = call(server.app, TEXT, {"prompt": "Hi", "stream": stream})
    await settle()

    async def refuse():
        raise EngineDied("no memory")

    server.backend.start = refuse
    server.backend.die()
    head = await asyncio.wait_for(request.sent.get(), 10)
    assert head["status"] == 503
    assert b"the engine died" in await request.body()
    assert (await server.http.get("/health")).status_code == 503
    await request.task
