"""Over real sockets and a proxy that cuts: a reader that comes back misses nothing and sees
nothing twice."""

import asyncio
import random
from itertools import cycle

import httpx
import openai
import pytest

from everstep import AsyncClient, Client
from everstep.engine.errors import EngineUnavailable
from everstep.engine.journal.memory import MemoryJournal

from ..listening import listening
from ..proxy import Proxy, proxied
from .conftest import TOKENIZER, KeptJournal, serve

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """The pauses between two tries are tested without a network."""
    monkeypatch.setattr("everstep.clients.patience.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("everstep.clients.patience.LONGEST_PAUSE_S", 0.01)


async def collected(client: AsyncClient, rollout_id: str, after: int = 0) -> list:
    return [event async for event in client.stream(rollout_id, after=after)]


def ids_in(events: list) -> list[int]:
    return [token for event in events for token in event.output_ids]


@pytest.mark.parametrize("seed", range(6))
async def test_a_stream_cut_at_random_bytes_gives_every_token_once(anyio_backend, seed):
    drawn = random.Random(seed)
    async with serve(journal=MemoryJournal()) as server, listening(server.app) as port:
        server.reply("hello 😀 world because " * 4)
        server.backend.step_s = 0.002
        proxy = Proxy(port, cut_after=lambda: drawn.randint(0, 2000))
        async with proxied(proxy), AsyncClient(proxy.url) as client:
            client._has_answered = True
            [rollout_id] = await server.submit(prompt="Hi", sampling={"max_tokens": 200})
            events = await asyncio.wait_for(collected(client, rollout_id), 60)
        whole = await server.ended(rollout_id)
        assert ids_in(events) == whole["output_ids"]
        assert "".join(event.text for event in events) == whole["text"]
        assert [v for event in events for v in event.lp_sampled] == whole["lp_sampled"]
        assert events[-1].finish_reason is not None
        assert proxy.num_cuts > 0


async def test_a_long_silent_generation_behind_a_proxy_with_a_short_patience_completes_once(
    anyio_backend,
):
    """Streams live through it by their heartbeats, polls and keyed requests by coming back."""
    async with (
        serve(journal=MemoryJournal(), http={"heartbeat_s": 0.05}) as server,
        listening(server.app) as port,
    ):
        server.reply("hello world")
        server.backend.gate.clear()
        async with proxied(Proxy(port, idle_s=0.4)) as proxy, AsyncClient(proxy.url) as client:
            sent = await client.submit("Hi", idempotency_key="k")
            [rollout_id] = sent.rollout_ids
            stream = asyncio.create_task(collected(client, rollout_id))
            wait = asyncio.create_task(client.wait(rollout_id))
            chat = asyncio.create_task(keyed_chat(proxy.url))
            await asyncio.sleep(1.5)
            assert not stream.done()
            assert not wait.done()
            assert not chat.done()
            num_cuts = proxy.num_cuts
            server.backend.gate.set()
            events = await asyncio.wait_for(stream, 30)
            rollout = await asyncio.wait_for(wait, 30)
            text = await asyncio.wait_for(chat, 30)
        assert num_cuts > 0, "the proxy cut nothing: this proves nothing"
        assert ids_in(events) == rollout.output_ids
        assert rollout.text == text == "hello world"
        # one rollout for the submission and one for the chat, however often each was asked for
        assert len(server.backend.adds) == 2
        assert server.backend.cancelled == []


async def keyed_chat(url: str) -> str:
    """OpenAI's own client, which sends again what broke: the key makes it the same request."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=50)
    async with client:
        reply = await client.chat.completions.create(
            model="org/ring", messages=HI, extra_headers={"Idempotency-Key": "chat"}
        )
    return reply.choices[0].message.content or ""


async def test_a_stream_that_is_only_silent_is_not_cut(anyio_backend):
    async with (
        serve(journal=MemoryJournal(), http={"heartbeat_s": 0.05}) as server,
        listening(server.app) as port,
    ):
        server.backend.gate.clear()
        async with proxied(Proxy(port, idle_s=0.6)) as proxy, AsyncClient(proxy.url) as client:
            [rollout_id] = await server.submit(prompt="Hi")
            stream = asyncio.create_task(collected(client, rollout_id))
            await asyncio.sleep(1.5)
            server.backend.gate.set()
            await asyncio.wait_for(stream, 30)
            assert proxy.num_cuts == 0
            assert proxy.num_connections == 1


async def test_readers_outlive_a_restart_of_the_server(anyio_backend):
    """The front goes away in mid-stream and comes back on the same port with the same journal."""
    journal = KeptJournal()
    seen: list = []
    async with serve(journal=journal) as server, listening(server.app) as port:
        server.replies[:] = [TOKENIZER.encode("a")]
        server.backend.step_s = 0.002
        client = AsyncClient(f"http://127.0.0.1:{port}")
        sent = await client.submit("Hi", sampling={"max_tokens": 40}, idempotency_key="k")
        [rollout_id] = sent.rollout_ids
        stream = asyncio.create_task(follow(client, rollout_id, seen))
        wait = asyncio.create_task(client.wait(rollout_id))
        while not seen:
            await asyncio.sleep(0.001)
        await server.manager.close()
    # nothing listens there for a while
    async with client, serve(journal=journal) as server:
        server.replies[:] = [TOKENIZER.encode("a")]
        await asyncio.sleep(0.2)
        async with listening(server.app, port):
            await asyncio.wait_for(stream, 30)
            rollout = await asyncio.wait_for(wait, 30)
            again = await client.submit("Hi", sampling={"max_tokens": 40}, idempotency_key="k")
    assert again == sent
    assert 0 < len(seen[0].output_ids) < 40
    assert ids_in(seen) == rollout.output_ids
    assert len(rollout.output_ids) == 40


async def follow(client: AsyncClient, rollout_id: str, seen: list) -> None:
    async for event in client.stream(rollout_id):
        seen.append(event)  # noqa: PERF401 - others look at it as it grows


async def test_the_blocking_client_does_the_same_over_a_proxy_that_cuts(anyio_backend):
    def work(url: str) -> tuple:
        with Client(url) as client:
            client._has_answered = True
            sent = client.submit("Hi", samples=2, sampling={"max_tokens": 60}, metadata=["m"])
            events = list(client.stream(sent.rollout_ids[0]))
            rollouts = [client.wait(rollout_id) for rollout_id in sent.rollout_ids]
            listed = list(client.list(group=sent.group_id))
            acked = client.ack(group=sent.group_id)
            return sent, events, rollouts, listed, acked

    async with serve(journal=MemoryJournal()) as server, listening(server.app) as port:
        server.replies[:] = [TOKENIZER.encode("abc")]
        cuts = cycle([30, 200, 700, None])
        proxy = Proxy(port, cut_after=lambda: next(cuts))
        async with proxied(proxy):
            sent, events, rollouts, listed, acked = await asyncio.wait_for(
                asyncio.to_thread(work, proxy.url), 60
            )
        assert ids_in(events) == rollouts[0].output_ids
        assert [rollout.metadata for rollout in rollouts] == [["m"], ["m"]]
        assert [one.id for one in listed] == list(acked) == sent.rollout_ids
        assert len(server.backend.adds) == 2
        assert proxy.num_cuts > 0


async def test_an_address_where_nothing_listens_is_an_error_soon(monkeypatch):
    monkeypatch.setattr("everstep.clients.patience.FIRST_CONTACT_S", 0.1)
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(EngineUnavailable, match=r"no answer from http://127.0.0.1:9"):
            await client.get("ro-1")
        with pytest.raises(EngineUnavailable):
            await collected(client, "ro-1")


async def test_httpx_errors_of_the_user_pass_through(anyio_backend):
    """A wrong use of httpx is no trouble on the way, and is not tried again."""
    http = httpx.AsyncClient()
    await http.aclose()
    async with AsyncClient("http://127.0.0.1:9", http=http) as client:
        with pytest.raises(RuntimeError):
            await client.get("ro-1")
