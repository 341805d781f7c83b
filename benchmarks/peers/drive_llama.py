"""llama.cpp: llama-server with one slot per request, its continuous batching over HTTP.

The server is started anew where the number of slots changes: each slot has its own part of the KV
cache, and the time to start is not counted. Answers come whole, not as streams. Sampling is
temperature 1 and nothing else, on the server's own one thread; tokens come back as text, for it
has no other way.
"""

import http.client
import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protocol import serve

START_S = 120.0


class Llama:
    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None
        self.slots = (0, 0)
        # the folder of the build, which benchmarks/cpu.py names
        self.binary = Path(os.environ["BENCH_LLAMA_BIN"]) / "llama-server"

    def load(self, model: str, *, threads: int, **_: int) -> dict[str, str]:
        self.model, self.threads = model, threads
        said = subprocess.run([self.binary, "--version"], capture_output=True, text=True)
        words = (said.stdout + said.stderr).split("version:")
        version = words[1].splitlines()[0].strip() if len(words) > 1 else "unknown"
        return {"version": version, "path": "llama-server -np N, no stream"}

    def generate(self, prompts: list[list[int]], new_tokens: int, _seed: int) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(self._ask, prompts, [new_tokens] * len(prompts)))

    def prepare(self, concurrent: int, length: int) -> None:
        """A server with that many slots of that many tokens; not timed."""
        if self.slots == (concurrent, length) and self.server is not None:
            return
        self.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags: list[Any] = ["-m", self.model, "--host", "127.0.0.1", "--port", self.port]
        flags += ["-t", self.threads, "-tb", self.threads, "-np", concurrent]
        flags += ["-c", concurrent * length, "--no-kv-unified", "-fa", "on", "--no-cache-prompt"]
        flags += ["-cram", 0, "--no-slots", "--threads-http", concurrent + 2]
        self.server = subprocess.Popen([self.binary, *map(str, flags)])
        self.slots = (concurrent, length)
        deadline = time.monotonic() + START_S
        while True:
            try:
                if self._http("GET", "/health", b"")[0] == 200:
                    return
            except OSError:
                pass
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"llama-server did not start (exit {self.server.poll()})")
            time.sleep(0.2)

    def close(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
            self.server = None

    def _ask(self, prompt: list[int], new_tokens: int) -> int:
        body = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "samplers": ["temperature"],
            "temperature": 1.0,
            "response_fields": ["tokens_predicted", "tokens_evaluated"],
        }
        status, answer = self._http("POST", "/completion", json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"llama-server: {status} {answer[:200]!r}")
        found = json.loads(answer)
        if found["tokens_evaluated"] < len(prompt):
            raise RuntimeError(f"only {found['tokens_evaluated']} prompt tokens were computed")
        return int(found["tokens_predicted"])

    def _http(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


serve(Llama)
