"""An app over the real manager, a scripted core and a small byte-level tokenizer."""

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from everstep.engine.config import EngineConfig, ModelConfig, RestartConfig
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Add
from everstep.engine.tokenizer import Tokenizer
from everstep.server.app import create_app
from everstep.server.config import HttpConfig, OpenAIConfig, ServeConfig

from .fake_backend import FakeBackend

TEMPLATE = (
    "{% if tools %}<role>SYSTEM</role>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<role>{{ m.role.upper() }}</role>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{{ '<think>\n' if think }}{% endif %}"
)
EOS, END_OF_TEXT = "<|role_end|>", "<|endoftext|>"


def build_tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, EOS],
        show_progress=False,
    )
    backend.train_from_iterator(["hello world because the answer"] * 3, trainer)
    backend.add_special_tokens([AddedToken(tag) for tag in ("<think>", "</think>", "<tool_call>")])
    eos_ids = [backend.token_to_id(EOS), backend.token_to_id(END_OF_TEXT)]
    return Tokenizer(backend, eos_ids=eos_ids, chat_template=TEMPLATE)


TOKENIZER = build_tokenizer()


@dataclass
class Server:
    """What a test drives. `replies`: one text, or one per sample; each ends with EOS."""

    app: Starlette
    manager: RolloutManager
    backend: FakeBackend
    http: httpx.AsyncClient
    tokenizer: Tokenizer | None
    replies: list[list[int]] = field(default_factory=list)

    def reply(self, *texts: str) -> None:
        eos = TOKENIZER.token_id(EOS)
        self.replies[:] = [[*TOKENIZER.encode(text), eos] for text in texts]

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        options = {"api_key": "none", "max_retries": 0, **options}
        return openai.AsyncOpenAI(base_url="http://test/v1", http_client=self.http, **options)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def keyed(self, path: str, key: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body, headers={"Idempotency-Key": key})

    async def submit(self, **body: Any) -> list[str]:
        """Ids of accepted rollouts."""
        response = await self.post("/rollouts", **body)
        assert response.status_code == 202, response.text
        return response.json()["rollout_ids"]

    async def ended(self, rollout_id: str) -> dict[str, Any]:
        """The rollout as JSON once it has ended."""
        response = await self.http.get(f"/rollouts/{rollout_id}", params={"wait": 20})
        assert response.status_code == 200, response.text
        assert response.json()["state"] in ("finished", "aborted", "failed")
        return response.json()

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The JSON of a stream's events; the last must be [DONE]."""
        response = await self.http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in response.text.split("\n\n") if line and line[0] != ":"]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serve(
    *,
    tokenizer: Tokenizer | None = TOKENIZER,
    http: dict | None = None,
    journal: MemoryJournal | None = None,
    digest: str | None = None,
    **options: Any,
):
    """options: those of OpenAIConfig. Without a journal nothing is durable."""
    replies: list[list[int]] = []

    def reply(add: Add, index: int) -> int:
        chosen = replies[(len(backend.adds) and order[add.rollout_id]) % len(replies)]
        return chosen[index % len(chosen)]

    order: dict[str, int] = {}
    backend = FakeBackend(reply)
    if digest is not None:
        backend.ready.digest = digest
    send = backend.send

    def numbered(messages):
        for message in messages:
            if isinstance(message, Add):
                order.setdefault(message.rollout_id, len(order))
        send(messages)

    backend.send = numbered
    thread = None if journal is None else JournalThread(journal)
    manager = RolloutManager(backend, tokenizer, restarts=RestartConfig(attempts=1), journal=thread)
    config = ServeConfig(
        engine=EngineConfig(model=ModelConfig(path="org/ring")),
        http=HttpConfig(**(http or {})),
        openai=OpenAIConfig(**options),
    )
    app = create_app(manager, tokenizer, config)
    await manager.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        server = Server(app, manager, backend, client, tokenizer, replies)
        server.reply("hello world")
        yield server
    await manager.close()


@pytest.fixture
async def server(anyio_backend):
    async with serve() as running:
        yield running


class KeptJournal(MemoryJournal):
    """Survives the server that had it, as a file does."""

    def close(self) -> None:
        pass


@pytest.fixture
async def durable(anyio_backend):
    """A server with a journal."""
    async with serve(journal=MemoryJournal()) as running:
        yield running


@dataclass
class Call:
    """One request through ASGI by hand, for what needs a client that reads slowly or leaves."""

    sent: asyncio.Queue
    task: asyncio.Task
    leave: Callable[[], None]

    async def body(self) -> bytes:
        message = await self.sent.get()
        assert message["type"] == "http.response.body"
        return message["body"]


def call(
    app: Starlette,
    path: str,
    body: dict,
    *,
    window: int = 0,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> Call:
    """window: messages that may lie unread before `send` waits; 0 = any number."""
    sent: asyncio.Queue = asyncio.Queue(maxsize=window)
    gone = asyncio.Event()
    requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
        "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }
    task = asyncio.create_task(app(scope, receive, sent.put))
    return Call(sent, task, gone.set)
