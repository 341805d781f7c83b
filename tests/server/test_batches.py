"""/v1/files and /v1/batches, as OpenAI's client uses them, through restarts."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import Query
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.manager import RolloutManager
from everstep.server.app import create_app
from everstep.server.batches.batch_queue import BatchQueue
from everstep.server.batches.file_store import FileStore
from everstep.server.config import ServeConfig

from .batch_backend import FakeBackend, token_of
from .conftest import KeptJournal

pytestmark = pytest.mark.anyio

URL = "/v1/completions"


def line(custom_id: str, url: str = URL, **body: Any) -> dict[str, Any]:
    body = {"prompt": [1, 2], "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(
        (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines
    )


class Slow(FakeBackend):
    """Stands still while the gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def receive(self):
        await self.gate.wait()
        return await super().receive()


@asynccontextmanager
async def serve(folder: Path, journal: MemoryJournal, backend: FakeBackend | None = None):
    """(OpenAI's client, the queue, the backend)."""
    backend = backend or Slow()
    manager = RolloutManager(backend, None, journal=JournalThread(journal))
    queue = BatchQueue(manager, None, folder, model_names=("default",))
    queue.open()
    app = create_app(manager, None, ServeConfig(), queue)
    await manager.start()
    queue.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", max_retries=0, http_client=http
        )
        yield client, queue, backend
    await queue.close()
    await manager.close()


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    for _ in range(2000):
        batch = await client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled"):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(f"still {batch.status}")


async def start(client: openai.AsyncOpenAI, data: bytes, **options: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=URL, completion_window="24h", **options
    )


async def records(client: openai.AsyncOpenAI, file_id: str) -> dict[str, Any]:
    text = (await client.files.content(file_id)).text
    found = [json.loads(one) for one in text.splitlines()]
    by_id = {one["custom_id"]: one for one in found}
    assert len(by_id) == len(found)
    return by_id


async def test_a_batch_from_upload_to_download(tmp_path: Path) -> None:
    async with serve(tmp_path, MemoryJournal()) as (client, _, _):
        data = jsonl(line("a", seed=3), line("b", temperature=-1), line("c", n=2))
        batch = await start(client, data, metadata={"run": "7"})
        assert (batch.status, batch.endpoint, batch.metadata) == ("validating", URL, {"run": "7"})
        batch = await ended(client, batch.id)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        good = await records(client, batch.output_file_id)
        bad = await records(client, batch.error_file_id)
        assert (sorted(good), sorted(bad)) == (["a", "c"], ["b"])
        choice = good["a"]["response"]["body"]["choices"][0]
        assert choice["token_ids"] == [token_of(3, t) for t in range(6)]
        assert "temperature" in bad["b"]["error"]["message"]
        files = sorted([f.purpose async for f in await client.files.list()], reverse=True)
        assert files == ["batch_output", "batch_output", "batch"]
        assert not list(tmp_path.glob("*.records"))
        assert not list(tmp_path.glob("*.part"))
        found = await client.files.delete(batch.input_file_id)
        assert found.deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(batch.input_file_id)
        assert [b.id async for b in await client.batches.list()] == [batch.id]


@pytest.mark.parametrize("steps", [0, 1, 5, 10])
async def test_a_restart_goes_on_and_no_line_is_answered_twice(tmp_path: Path, steps: int) -> None:
    data = jsonl(*(line(f"p{i}", prompt=[1 + i, 2], max_tokens=4 + i) for i in range(8)))
    async with serve(tmp_path / "whole", MemoryJournal()) as (client, _, _):
        whole = await ended(client, (await start(client, data)).id)
        expected = await records(client, whole.output_file_id)
    journal, folder = KeptJournal(), tmp_path / "cut"
    async with serve(folder, journal) as (client, _, backend):
        batch = await start(client, data)
        while backend.num_steps < steps:
            await asyncio.sleep(0.001)
        backend.gate.clear()
    async with serve(folder, journal) as (client, _, backend):
        batch = await ended(client, batch.id)
        assert batch.status == "completed"
        found = await records(client, batch.output_file_id)
    assert sorted(found) == sorted(expected)
    for custom_id, record in found.items():
        # seeds are those of the batch, so lines agree in all but what its id gives
        assert len(record["response"]["body"]["choices"][0]["token_ids"]) == 4 + int(custom_id[1:])
        choice = record["response"]["body"]["choices"][0]
        assert choice["token_ids"] == [
            token_of(choice["seed"], t) for t in range(len(choice["token_ids"]))
        ]
    assert all(summary.is_acked for summary in journal.list(Query(limit=1000)))


async def test_cancel_keeps_what_is_answered_and_ends_the_rest(tmp_path: Path) -> None:
    journal = MemoryJournal()
    async with serve(tmp_path, journal) as (client, _, backend):
        short = [line(f"s{i}", max_tokens=1) for i in range(3)]
        # long enough to be running when the others have their records
        batch = await start(client, jsonl(*short, line("long", max_tokens=60)))
        while backend.num_steps < 20:
            await asyncio.sleep(0.001)
        backend.gate.clear()
        file = tmp_path / f"{batch.id}.records"
        while file.read_bytes().count(b"\n") < len(short):
            await asyncio.sleep(0.001)
        first = await client.batches.cancel(batch.id)
        assert first.status == "cancelling"
        batch = await ended(client, batch.id)
        assert batch.status == "cancelled"
        assert sorted(await records(client, batch.output_file_id)) == ["s0", "s1", "s2"]
        assert (await client.batches.cancel(batch.id)).status == "cancelled"
        assert all(summary.is_acked for summary in journal.list(Query(limit=1000)))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b"", "no lines"),
        (b"{nonsense", "not JSON"),
        ({"custom_id": "x", "prompt": [1]}, "must have custom_id"),
        (line("x") | {"method": "GET"}, "method must be POST"),
        (line("x", url="/v1/embeddings"), "url must be"),
        (line("ok"), "earlier line"),
    ],
)
async def test_a_file_that_is_no_batch_fails_before_it_runs(
    tmp_path: Path, bad: Any, word: str
) -> None:
    async with serve(tmp_path, MemoryJournal()) as (client, _, backend):
        lines = [bad] if bad == b"" else [line("ok"), bad]
        batch = await ended(client, (await start(client, jsonl(*lines))).id)
        assert batch.status == "failed"
        [error] = batch.errors.data
        assert word in error.message
        assert error.line == (None if bad == b"" else 2)
        assert backend.num_steps == 0


async def test_bad_requests_change_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path, MemoryJournal()) as (client, queue, backend):
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("x", b"{}"), purpose="fine-tune")
        with pytest.raises(openai.NotFoundError, match="no file has the id"):
            await client.batches.create(
                input_file_id="file-nix", endpoint=URL, completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            await client.batches.create(
                input_file_id="file-nix", endpoint="/v1/embeddings", completion_window="24h"
            )
        for path in ("../../etc/passwd", "file-" + "0" * 32):
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(path)
        with pytest.raises(openai.NotFoundError, match="no batch"):
            await client.batches.retrieve("batch_nix")
        with pytest.raises(openai.BadRequestError, match="limit"):
            await client.files.list(extra_query={"limit": "0"})
        with pytest.raises(openai.BadRequestError, match="after"):
            await client.batches.list(after="batch_nix")
        assert (queue.files.list(), queue.list()) == ([], [])
        backend.gate.clear()
        batch = await start(client, jsonl(line("a")))
        with pytest.raises(openai.ConflictError, match="which runs"):
            await client.files.delete(batch.input_file_id)


async def test_an_idempotency_key_makes_one_batch(tmp_path: Path) -> None:
    journal = KeptJournal()
    headers = {"Idempotency-Key": "k1"}
    async with serve(tmp_path, journal) as (client, _, _):
        file = await client.files.create(file=("in", jsonl(line("a"))), purpose="batch")
        options = {"input_file_id": file.id, "endpoint": URL, "completion_window": "24h"}
        first = await client.batches.create(**options, extra_headers=headers)
    async with serve(tmp_path, journal) as (client, _, _):
        again = await client.batches.create(**options, extra_headers=headers)
        assert again.id == first.id
        with pytest.raises(openai.ConflictError, match="another body"):
            await client.batches.create(**options, metadata={"a": "b"}, extra_headers=headers)
        other = await client.batches.create(**options, extra_headers={"Idempotency-Key": "k2"})
        assert other.id != first.id
        await ended(client, first.id)
        await ended(client, other.id)


async def test_without_a_journal_it_says_so(tmp_path: Path) -> None:
    manager = RolloutManager(FakeBackend(), None)
    app = create_app(manager, None, ServeConfig())
    await manager.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for response in (
            await http.get("/v1/files"),
            await http.post("/v1/batches", json={}),
            await http.post("/v1/files", files={"file": b"x"}),
        ):
            assert response.status_code == 503
            assert "--journal" in response.json()["error"]["message"]
    await manager.close()


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.open()

    def torn():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(torn(), "x", "batch")
    assert list(tmp_path.iterdir()) == []
    kept = store.add([b"one", b"two"], "y", "batch")
    # what a kill leaves between the content and its description
    (tmp_path / ("file-" + "a" * 32)).write_bytes(b"half")
    (tmp_path / ("file-" + "b" * 32 + ".c.part")).write_bytes(b"half")
    store = FileStore(tmp_path)
    store.open()
    assert store.list() == [kept]
    assert store.path(kept.id).read_bytes() == b"onetwo"
    assert len(list(tmp_path.iterdir())) == 2
