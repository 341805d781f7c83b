"""Idempotency-Key: the same request again is the same rollouts and the same answer."""

import asyncio
import json

import openai
import pytest

from everstep.engine.journal.memory import MemoryJournal

from .conftest import KeptJournal, call, serve

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


async def test_the_same_key_gives_the_same_rollouts(durable):
    first = await durable.keyed("/rollouts", "k", prompt="Hi", samples=2)
    again = await durable.keyed("/rollouts", "k", samples=2, prompt="Hi")
    assert first.status_code == again.status_code == 202
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(durable.backend.adds) == 2
    other = await durable.keyed("/rollouts", "l", prompt="Hi", samples=2)
    assert not set(other.json()["rollout_ids"]) & set(first.json()["rollout_ids"])


@pytest.mark.parametrize("path", ["/rollouts", CHAT, TEXT])
async def test_another_body_is_409_and_makes_nothing(durable, path):
    body = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    assert (await durable.keyed(path, "k", **body)).status_code in (200, 202)
    response = await durable.keyed(path, "k", **body, priority=1)
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "idempotency_key_reused"
    assert len(durable.backend.adds) == 1


async def test_a_key_is_of_one_route(durable):
    a = (await durable.keyed("/rollouts", "k", prompt="Hi")).json()["rollout_ids"]
    await durable.keyed(TEXT, "k", prompt="Hi")
    await durable.keyed(CHAT, "k", messages=HI)
    await durable.ended(a[0])
    b = (await durable.keyed(f"/rollouts/{a[0]}/fork", "k", at=1)).json()["rollout_ids"]
    assert a != b
    assert len(durable.backend.adds) == 4
    # and the fork of another rollout is another request
    response = await durable.keyed(f"/rollouts/{b[0]}/fork", "k", at=1)
    assert response.status_code == 409


async def test_a_key_is_of_one_holder(durable):
    headers = {"Idempotency-Key": "k"}
    ids = set()
    for token in ("one", "two", "one"):
        response = await durable.http.post(
            "/rollouts",
            json={"prompt": "Hi"},
            headers={**headers, "Authorization": f"Bearer {token}"},
        )
        ids |= set(response.json()["rollout_ids"])
    assert len(ids) == 2


async def test_many_at_once_with_one_key_are_one(durable):
    answers = await asyncio.gather(
        *(durable.keyed("/rollouts", "k", prompt="Hi", samples=3) for _ in range(20))
    )
    assert len({response.text for response in answers}) == 1
    assert sum("idempotent-replayed" in response.headers for response in answers) == 19
    chats = await asyncio.gather(*(durable.keyed(CHAT, "k", messages=HI, n=2) for _ in range(20)))
    assert len({response.text for response in chats}) == 1
    assert len(durable.backend.adds) == 5


async def test_a_refused_request_leaves_its_key_free(durable):
    assert (await durable.keyed("/rollouts", "k", prompt="")).status_code == 400
    assert (await durable.keyed("/rollouts", "k", prompt="Hi")).status_code == 202


async def test_fork_and_import_take_keys(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    await durable.ended(rollout_id)
    path = f"/rollouts/{rollout_id}/fork"
    forks = [await durable.keyed(path, "k", at=1, samples=2) for _ in range(2)]
    assert forks[0].json() == forks[1].json()
    data = (await durable.http.get(f"/rollouts/{rollout_id}/export")).content
    async with serve(journal=MemoryJournal()) as other:
        headers = {"idempotency-key": "k", "content-type": "application/octet-stream"}
        for replayed in (None, "true"):
            response = await other.http.post("/rollouts/import", content=data, headers=headers)
            assert response.status_code == 202
            assert response.headers.get("idempotent-replayed") == replayed
        response = await other.http.post("/rollouts/import", content=data[:-1], headers=headers)
        assert response.status_code == 400


# --- /v1


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_same_answer_comes_again_to_the_byte(durable, path):
    durable.reply("hello", f"because {CALL}")
    body = {"messages": HI, "tools": TOOLS} if path == CHAT else {"prompt": ["Hi", "Ho"]}
    body |= {"n": 2, "logprobs": True if path == CHAT else 1, "return_token_ids": True}
    body |= {"metadata": {"k": "v"}, "return_meta_info": True}
    first = await durable.keyed(path, "k", **body)
    num_adds = len(durable.backend.adds)
    again = await durable.keyed(path, "k", **body)
    assert first.status_code == 200, first.text
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert len(durable.backend.adds) == num_adds
    unkeyed = await durable.post(path, **body)
    assert unkeyed.json()["id"] != first.json()["id"]


def content_of(stream: str) -> str:
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line[6:7] == "{"]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


async def test_a_stream_and_a_whole_answer_are_one_request(durable):
    whole = await durable.keyed(CHAT, "k", messages=HI)
    stream = await durable.keyed(CHAT, "k", messages=HI, stream=True)
    again = await durable.keyed(
        CHAT, "k", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    assert content_of(stream.text) == whole.json()["choices"][0]["message"]["content"]
    ids = {json.loads(line[6:])["id"] for line in again.text.split("\n\n") if line[6:7] == "{"}
    assert ids == {whole.json()["id"]}
    usage = json.loads(again.text.split("\n\n")[-3][6:])["usage"]
    assert usage == whole.json()["usage"]
    assert len(durable.backend.adds) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reader_that_leaves_finds_its_answer_later(durable, stream):
    durable.reply("hello world")
    durable.backend.gate.clear()
    body = {"messages": HI, "stream": stream}
    request = call(durable.app, CHAT, body, headers={"idempotency-key": "k"})
    await settle()
    request.leave()
    await asyncio.wait_for(request.task, 10)
    assert durable.manager.num_live == 1
    assert durable.backend.cancelled == []
    durable.backend.gate.set()
    response = await durable.keyed(CHAT, "k", messages=HI)
    assert response.json()["choices"][0]["message"]["content"] == "hello world"
    assert len(durable.backend.adds) == 1


async def test_without_a_key_a_reader_that_leaves_ends_its_rollouts(durable):
    durable.backend.gate.clear()
    request = call(durable.app, CHAT, {"messages": HI})
    await settle()
    assert durable.manager.num_live == 1
    request.leave()
    await asyncio.wait_for(request.task, 10)
    assert durable.manager.num_live == 0
    assert (await durable.http.get("/rollouts")).json()["data"] == []


async def test_a_failure_comes_again_too(durable):
    durable.backend.fail_at = (1, "nonfinite: step 12, layer 3")
    first = await durable.keyed(CHAT, "k", messages=HI)
    durable.backend.fail_at = None
    again = await durable.keyed(CHAT, "k", messages=HI)
    assert first.status_code == again.status_code == 500
    assert again.json() == first.json()


async def test_metadata_that_would_not_come_back_is_refused_with_a_key_only(durable):
    body = {"messages": HI, "metadata": {"n": 2**64}}
    assert (await durable.post(CHAT, **body)).status_code == 200
    response = await durable.keyed(CHAT, "k", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "metadata"


@pytest.mark.parametrize("key", ["a b", "", "x" * 256])
async def test_a_key_that_is_none_is_400(durable, key):
    for path in ("/rollouts", CHAT, TEXT):
        body = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
        response = await durable.keyed(path, key, **body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "Idempotency-Key"


async def test_without_a_journal_a_key_is_503(server):
    response = await server.keyed(CHAT, "k", messages=HI)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "journal_error"


async def test_openais_client_finds_the_same_answer(durable):
    durable.reply("hello world")
    client = durable.client()
    options = {"extra_headers": {"Idempotency-Key": "k"}}
    first = await client.chat.completions.create(model="org/ring", messages=HI, **options)
    again = await client.chat.completions.create(model="org/ring", messages=HI, **options)
    assert first == again
    stream = await client.chat.completions.create(
        model="org/ring", messages=HI, stream=True, **options
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == first.choices[0].message.content
    with pytest.raises(openai.ConflictError) as caught:
        await client.chat.completions.create(model="org/ring", messages=HI, top_p=0.5, **options)
    assert caught.value.code == "idempotency_key_reused"
    assert len(durable.backend.adds) == 1


async def test_a_core_that_is_started_again_is_a_delay(durable):
    """Neither a new keyed request nor one that comes back sees an error."""
    durable.backend.gate.clear()
    first = asyncio.create_task(durable.keyed(CHAT, "a", messages=HI))
    await settle()
    may_start = asyncio.Event()
    start = durable.backend.start

    async def slowly():
        await may_start.wait()
        return await start()

    durable.backend.start = slowly
    durable.backend.die()
    await settle()
    again = asyncio.create_task(durable.keyed(CHAT, "a", messages=HI))
    other = asyncio.create_task(durable.keyed(CHAT, "b", messages=HI))
    await settle()
    assert not any(task.done() for task in (first, again, other))
    durable.backend.gate.set()
    may_start.set()
    answers = await asyncio.wait_for(asyncio.gather(first, again, other), 30)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].content == answers[1].content


async def test_a_restarted_front_knows_its_keys_and_its_answers(anyio_backend):
    journal = KeptJournal()
    async with serve(journal=journal) as server:
        chat = await server.keyed(CHAT, "k", messages=HI, seed=3)
        ids = (await server.keyed("/rollouts", "k", prompt="Hi")).json()["rollout_ids"]
        rollout = await server.ended(ids[0])
    async with serve(journal=journal) as server:
        again = await server.keyed(CHAT, "k", messages=HI, seed=3)
        assert again.content == chat.content
        assert (await server.keyed("/rollouts", "k", prompt="Hi")).json()["rollout_ids"] == ids
        assert await server.ended(ids[0]) == rollout
        assert server.backend.adds == []
        assert (await server.keyed(CHAT, "k", messages=HI, seed=4)).status_code == 409
