"""`everstep bench`: what is measured, what is printed, what is refused."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from everstep.bench.report import Measured, Run, as_json, percentile, result_block, spread, spreads
from everstep.bench.serve import Target
from everstep.bench.workload import random_asks, read_dataset, warm_up
from everstep.cli import run
from everstep.engine.errors import ConfigError
from tests.server.conftest import serve as serve_app

seconds = st.floats(0, 1e3)


@given(st.lists(seconds, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


@given(st.lists(seconds, min_size=1))
def test_a_spread_is_numpys_in_milliseconds(values: list[float]) -> None:
    found = spread(values)
    wanted = [np.mean(values), np.median(values), np.std(values), np.percentile(values, 99)]
    assert msgspec.structs.astuple(found) == pytest.approx([1e3 * w for w in wanted], abs=1e-6)


def test_latencies_are_as_vllm_defines_them() -> None:
    one = Measured(7, 10.0, [10.5, 11.0, 13.0], ended_s=14.5, output_tokens=5)
    assert one.ttft_s == 0.5
    assert one.itl_s == [0.5, 2.0]
    assert one.e2el_s == 4.5
    assert one.tpot_s == 1.0
    # a single token has no time per further token, and no gap
    short = Measured(7, 10.0, [12.0], ended_s=12.0, output_tokens=1)
    assert short.tpot_s is None
    found = spreads([one, short])
    assert found["tpot"].mean == 1000
    assert found["ttft"].mean == 1250
    assert spreads([])["itl"].p99 == 0


EXPECTED = """\
============ Serving Benchmark Result ============
Successful requests:                     1
Failed requests:                         1
Maximum request concurrency:             2
Request rate configured (RPS):           0.50
Benchmark duration (s):                  4.00
Total input tokens:                      7
Total generated tokens:                  5
Request throughput (req/s):              0.25
Output token throughput (tok/s):         1.25
Total token throughput (tok/s):          3.00
---------------Time to First Token----------------
Mean TTFT (ms):                          500.00
Median TTFT (ms):                        500.00
P99 TTFT (ms):                           500.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          1000.00
Median TPOT (ms):                        1000.00
P99 TPOT (ms):                           1000.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           1250.00
Median ITL (ms):                         1250.00
P99 ITL (ms):                            1985.00
----------------End-to-end Latency----------------
Mean E2EL (ms):                          4500.00
Median E2EL (ms):                        4500.00
P99 E2EL (ms):                           4500.00
==================================================
"""


def test_the_block_is_vllms_line_by_line() -> None:
    one = Measured(7, 10.0, [10.5, 11.0, 13.0], ended_s=14.5, output_tokens=5)
    failed = Measured(9, 10.0, error="500: no")
    finished = Run(
        model="m", requests=[one, failed], duration_s=4.0, concurrency=2, request_rate=0.5
    )
    lines = result_block(finished).splitlines()
    assert [line.rstrip() for line in lines] == EXPECTED.splitlines()
    # figures are padded to ten, so that blocks of two engines stand side by side
    assert {len(line) for line in lines} == {50, 51}
    found = as_json(finished)
    assert found["completed"] == 1
    assert found["failed"] == 1
    assert found["output_lens"] == [5, 0]
    assert found["itls"] == [[0.5, 2.0], []]
    assert found["errors"] == ["", "500: no"]
    assert found["p99_itl_ms"] == pytest.approx(1985)


@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(3, 50), st.integers(), st.sets(st.just(2))
)
def test_random_prompts_are_drawn_from_the_seed_alone(
    count: int, length: int, vocab_size: int, seed: int, never: set[int]
) -> None:
    def draw() -> list[Any]:
        return random_asks(
            count=count,
            input_tokens=length,
            output_tokens=3,
            vocab_size=vocab_size,
            seed=seed,
            never=never,
        )

    asks = draw()
    assert asks == draw()
    assert [len(ask.prompt) for ask in asks] == [length] * count
    assert {i for ask in asks for i in ask.prompt} <= set(range(vocab_size)) - never


def test_a_data_set_is_gone_through_again_and_its_faults_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a b", "max_tokens": 3}\n\n{"prompt": [1, 2], "other": 0}\n')
    asks = read_dataset(file, count=5, output_tokens=9, seed=0)
    assert sorted((str(a.prompt), a.output_tokens) for a in asks[:2]) == [
        ("[1, 2]", 9),
        ("a b", 3),
    ]
    assert asks[2:] == [asks[0], asks[1], asks[0]]
    assert warm_up(asks, 2) == [msgspec.structs.replace(asks[0], prompt=asks[0].prompt[::-1])] * 2
    for bad, words in [
        ('{"prompt": ""}\n{"prompt": []}', "line 2"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"messages": []}', "prompt"),
        ("{", "line 1"),
        ("\n", "no lines"),
    ]:
        file.write_text(bad)
        with pytest.raises(ConfigError, match=words):
            read_dataset(file, count=1, output_tokens=1, seed=0)


def figures(block: str) -> dict[str, float]:
    """The numbers of a printed block, by label."""
    return {
        label: float(value) for label, value in re.findall(r"^(\w.+?):\s+([\d.]+)", block, re.M)
    }


SMALL = ["--num-threads", "1", "--max-model-len", "64", "--num-warmups", "1"]


def test_offline_answers_all_and_counts_every_token(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.json"
    flags = ["--num-prompts", "5", "--random-input-len", "9", "--output-len", "4"]
    flags += ["--max-concurrency", "2", "--output-json", str(target), *SMALL]
    assert run(["bench", "offline", str(tiny_checkpoint), *flags]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{target}\n")
    found = figures(out)
    assert found["Successful requests"] == 5
    assert found["Total input tokens"] == 45
    assert found["Total generated tokens"] == 20
    assert found["Maximum request concurrency"] == 2
    saved = json.loads(target.read_text())
    assert saved["output_lens"] == [4] * 5
    assert saved["output_throughput"] * saved["duration"] == pytest.approx(20)
    # at most two at a time: whoever starts third has seen one end
    ends = [a + b for a, b in zip(saved["start_times"], saved["latencies"], strict=True)]
    assert sorted(saved["start_times"])[2] >= min(ends)


def test_offline_takes_a_data_set_of_text(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": [5, 6, 7], "max_tokens": 2}\n')
    flags = ["--dataset", str(file), "--num-prompts", "2", "--output-len", "3", *SMALL]
    assert run(["bench", "offline", str(tiny_checkpoint), *flags, "--temperature", "0"]) == 0
    found = figures(capsys.readouterr().out)
    assert found["Total generated tokens"] == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["offline", "MODEL", "--input-len", "60", "--output-len", "9"], "--input-len"),
        (["offline", "MODEL", "--temperature", "nan"], "temperature"),
        (["offline", "MODEL", "--num-prompts", "0"], "--num-prompts"),
        (["offline", "MODEL", "--output-json", "/nowhere/x"], "--output-json"),
        (["offline", "MODEL", "--dataset", "/nowhere"], "--dataset"),
        (["offline", "MODEL", "--num-promts", "3"], "--num-prompts"),
        (["serve", "--request-rate", "0"], "--request-rate"),
        (["serve", "--base-url", "localhost:1"], "--base-url must start with http"),
        (["serve", "--base-url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["serve", "--output-json", "."], "--output-json . cannot be written: Is a directory"),
    ],
)
def test_a_users_mistake_is_one_line_that_names_it(
    flags: list[str],
    words: str,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tiny_checkpoint) if flag == "MODEL" else flag for flag in flags]
    small = SMALL if flags[0] == "offline" else []
    assert run(["bench", *given, *small]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_a_base_url_may_end_in_v1(url: str) -> None:
    assert Target(base_url=url).root == "http://h:1/v1"


@pytest.fixture(scope="module")
def our_server() -> Iterator[str]:
    """The URL of our app over HTTP, its core scripted."""
    listener = socket.create_server(("127.0.0.1", 0))
    http: list[uvicorn.Server] = []
    is_ready = threading.Event()

    async def serve() -> None:
        async with serve_app() as running:
            config = uvicorn.Config(running.app, log_config=None, lifespan="off")
            http.append(uvicorn.Server(config))
            is_ready.set()
            await http[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_ready.wait(30)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    http[0].should_exit = True
    thread.join(30)


def test_serve_measures_our_server(
    our_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.json"
    flags = ["--base-url", our_server, "--num-prompts", "6", "--input-len", "5"]
    flags += ["--output-len", "7", "--vocab-size", "300", "--output-file", str(target)]
    assert run(["bench", "serve", *flags, "--concurrency", "3"]) == 0
    found = figures(capsys.readouterr().out)
    assert found["Successful requests"] == 6
    assert found["Total input tokens"] == 30
    assert found["Total generated tokens"] == 42
    saved = json.loads(target.read_text())
    assert saved["model_id"] == "org/ring"
    assert all(0 < t <= e for t, e in zip(saved["ttfts"], saved["latencies"], strict=True))
    # sending times of a seed are the same each run, and the rate is about what was asked for
    assert run(["bench", "serve", *flags, "--request-rate", "200"]) == 0
    assert figures(capsys.readouterr().out)["Request rate configured (RPS)"] == 200


def test_what_our_server_refuses_is_one_line(
    our_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base-url", our_server, "--num-prompts", "2", "--input-len", "5"]
    assert run(["bench", "serve", *flags, "--input-len", "600", "--vocab-size", "300"]) == 2
    assert "refuses the first request: 400: " in capsys.readouterr().err
    assert run(["bench", "serve", *flags, "--model", "other"]) == 2
    assert "404" in capsys.readouterr().err


def chunk(text: str, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode()


END = [chunk("", "length"), b"data: [DONE]"]
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}'
MODELS = json.dumps({"data": [{"id": "foreign"}]}).encode()


class Foreign(ThreadingHTTPServer):
    """A server of another make: `events` are what a completion streams, `models` its list."""

    events: list[bytes] = []
    models: bytes = MODELS
    status = 200
    daemon_threads = True
    bodies: list[dict[str, Any]]


class _Answers(BaseHTTPRequestHandler):
    server: Foreign

    def do_GET(self) -> None:
        self._send([self.server.models], 200)

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self._send(self.server.events, self.server.status)

    def _send(self, events: list[bytes], status: int) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"".join(event + b"\n\n" for event in events))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    server = Foreign(("127.0.0.1", 0), _Answers)
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("events", "tokens", "pieces", "error"),
    [
        ([b": hello", chunk("a"), chunk("b"), *END], 2, 2, ""),
        ([chunk("a"), chunk("bc"), USAGE, *END], 9, 2, ""),
        # a token whose text is not whole yet is a piece; the last word is none
        ([chunk("a"), chunk(""), *END], 2, 2, ""),
        ([chunk("a"), b'data: {"error": {"message": "out of\\nmemory"}}'], 0, 1, "out of memory"),
        ([chunk("a")], 1, 1, "the stream broke off"),
        ([b"data: {"], 0, 0, "an event that is not OpenAI's"),
    ],
)
def test_streams_of_other_servers(
    foreign: Foreign,
    events: list[bytes],
    tokens: int,
    pieces: int,
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign.events = events
    target = tmp_path / "run.json"
    flags = ["--base-url", f"http://127.0.0.1:{foreign.server_port}/v1", "--num-prompts", "2"]
    flags += ["--num-warmups", "0", "--input-len", "4", "--no-ignore-eos"]
    assert run(["bench", "serve", *flags, "--output-json", str(target)]) == (1 if error else 0)
    saved = json.loads(target.read_text())
    assert saved["output_lens"] == [tokens] * 2
    assert [len(itl) for itl in saved["itls"]] == [max(0, pieces - 1)] * 2
    assert all(found.startswith(error) and bool(found) == bool(error) for found in saved["errors"])
    assert saved["model_id"] == foreign.bodies[0]["model"] == "foreign"
    assert "ignore_eos" not in foreign.bodies[0]
    captured = capsys.readouterr()
    assert figures(captured.out)["Failed requests"] == (2 if error else 0)
    assert error in captured.err


def test_a_server_without_models_or_with_a_key(
    foreign: Foreign, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.models = b"<html>"
    foreign.events = [chunk("a"), *END]
    flags = ["--base-url", f"http://127.0.0.1:{foreign.server_port}", "--num-prompts", "1"]
    assert run(["bench", "serve", *flags]) == 2
    assert "give --model" in capsys.readouterr().err
    assert run(["bench", "serve", *flags, "--model", "m"]) == 0
    assert foreign.bodies[-1]["model"] == "m"
    assert foreign.bodies[-1]["ignore_eos"] is True
    foreign.status, foreign.events = 429, [b'{"error": {"message": "too many"}}']
    assert run(["bench", "serve", *flags, "--model", "m"]) == 2
    assert "refuses the first request: 429: too many" in capsys.readouterr().err
