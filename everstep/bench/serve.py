"""`everstep bench serve`: any server with OpenAI's completions, ours and others', over HTTP.

Streams are read as they come; token counts are the server's own (`usage`), or the number of
pieces where it reports none.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec
from msgspec import UNSET, Struct, UnsetType

from ..engine.errors import ConfigError
from .report import Measured, Run
from .workload import Ask

Count = Callable[[int, int], None]
CONNECT_S = 5.0


class Target(Struct, frozen=True, kw_only=True):
    """Where requests go, and what each says beside its prompt.

    base_url  as given, with or without /v1
    """

    base_url: str
    model: str | None = None
    api_key: str | None = None
    temperature: float = 1.0
    ignore_eos: bool = True

    @property
    def root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1") + "/v1"


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Choice(Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Event(Struct):
    """What is read of a chunk; an error may come in the middle of a stream."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any | UnsetType = UNSET


class _Models(Struct):
    data: list["_Model"]


class _Model(Struct):
    id: str


def run_serve(
    target: Target,
    asks: Sequence[Ask],
    *,
    concurrency: int | None,
    request_rate: float | None,
    seed: int,
    warmups: Sequence[Ask],
    on_count: Count = lambda *_: None,
) -> Run:
    """Send all; raises ConfigError where nobody answers, or the first request is refused.

    request_rate  requests per second, their gaps drawn from the exponential distribution
    warmups       requests sent beforehand, one by one, that are not counted
    """
    return asyncio.run(_run(target, asks, concurrency, request_rate, seed, warmups, on_count))


async def _run(
    target: Target,
    asks: Sequence[Ask],
    concurrency: int | None,
    request_rate: float | None,
    seed: int,
    warmups: Sequence[Ask],
    on_count: Count,
) -> Run:
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    client = httpx.AsyncClient(
        base_url=target.root + "/",
        headers=headers,
        # an answer may take its time; a server that is not there may not
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None),
        # load goes where the flag says, whatever proxy the environment names
        trust_env=False,
    )
    async with client:
        model = await _find_model(client, target)
        for ask in warmups:
            first = await _measure(client, _body(target, model, ask), ask)
            if first.error is not None:
                raise ConfigError(f"{target.base_url} refuses the first request: {first.error}")
        room = asyncio.Semaphore(concurrency or len(asks))
        num_ended = 0

        async def one(ask: Ask) -> Measured:
            nonlocal num_ended
            async with room:
                measured = await _measure(client, _body(target, model, ask), ask)
            num_ended += 1
            on_count(num_ended, len(asks))
            return measured

        on_count(0, len(asks))
        started = time.perf_counter()
        tasks = []
        for ask, at_s in zip(asks, _send_times(len(asks), request_rate, seed), strict=True):
            await asyncio.sleep(max(0.0, started + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(one(ask)))
        requests = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return Run(
        model=model,
        requests=requests,
        duration_s=seconds,
        concurrency=concurrency,
        request_rate=request_rate,
    )


def _send_times(count: int, rate: float | None, seed: int) -> list[float]:
    """Seconds after the start: a Poisson process of `rate`, or all at once."""
    if rate is None or math.isinf(rate):
        return [0.0] * count
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += draw.expovariate(rate)
    return times


async def _find_model(client: httpx.AsyncClient, target: Target) -> str:
    """The model to name: the given one, or the first that the server lists."""
    try:
        answer = await client.get("models")
    except httpx.UnsupportedProtocol:
        raise ConfigError(
            f"--base-url must start with http:// or https://, got {target.base_url!r}"
        ) from None
    except httpx.InvalidURL as error:
        raise ConfigError(f"--base-url {target.base_url}: {error}") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"no server answers at {target.base_url} (--base-url): {reason}"
        ) from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ConfigError(f"{target.base_url} asks for a key: give --api-key or OPENAI_API_KEY")
    if target.model is not None:
        return target.model
    try:
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=_Models).data[0].id
    except (httpx.HTTPStatusError, msgspec.DecodeError, IndexError):
        raise ConfigError(
            f"{target.root}/models names no model ({_refusal(answer)}): give --model"
        ) from None


def _body(target: Target, model: str, ask: Ask) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.output_tokens,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # no field of OpenAI's: left out unless it is wanted, since some servers refuse what they
    # do not know
    if target.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


async def _measure(client: httpx.AsyncClient, body: bytes, ask: Ask) -> Measured:
    measured = Measured(len(ask.prompt) if isinstance(ask.prompt, list) else 0, time.perf_counter())
    try:
        request = client.stream(
            "POST", "completions", content=body, headers={"content-type": "application/json"}
        )
        async with request as answer:
            if answer.status_code == httpx.codes.OK:
                await _read(answer, measured)
            else:
                await answer.aread()
                measured.error = _refusal(answer)
    except httpx.HTTPError as error:
        measured.error = str(error) or type(error).__name__
    except msgspec.DecodeError as error:
        measured.error = f"an event that is not OpenAI's: {error}"
    measured.ended_s = time.perf_counter()
    return measured


async def _read(answer: httpx.Response, measured: Measured) -> None:
    usage = _Usage()
    num_pieces = 0
    has_ended = False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            has_ended = True
            break
        event = msgspec.json.decode(data, type=_Event)
        if event.error is not UNSET and event.error:
            measured.error = _words(event.error)
            return
        # a token may have no text yet; a last word that only says why it ended is none
        if any(choice.text or choice.finish_reason is None for choice in event.choices):
            measured.arrivals.append(time.perf_counter())
            num_pieces += 1
        has_ended |= any(choice.finish_reason for choice in event.choices)
        usage = event.usage or usage
    if not has_ended:
        measured.error = "the stream broke off"
    if usage.prompt_tokens is not None:
        measured.input_tokens = usage.prompt_tokens
    counted = usage.completion_tokens
    measured.output_tokens = num_pieces if counted is None else counted


def _refusal(answer: httpx.Response) -> str:
    """`400: message`, from OpenAI's form or another."""
    try:
        said = msgspec.json.decode(answer.content)
    except msgspec.DecodeError:
        said = answer.text
    found = said.get("error", said) if isinstance(said, dict) else said
    return f"{answer.status_code}: {_words(found)}"


def _words(error: Any) -> str:
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
