"""Health, readiness and metrics."""

import asyncio
import subprocess
import sys

import httpx
import pytest

from everstep import __version__
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Stats
from everstep.server.app import create_app
from everstep.server.config import ServeConfig

from .fake_backend import FakeBackend

pytestmark = pytest.mark.anyio
STATS = Stats(
    num_running=3,
    num_waiting=2,
    num_paused=1,
    num_blocks_used=25,
    num_blocks=100,
    steps_total=9,
    prompt_tokens_total=40,
    generation_tokens_total=50,
    prefix_queries_total=8,
    prefix_hits_total=6,
    preemptions_total=1,
    kv_resume_total={"kept": 2},
    step_seconds_total=1.5,
)


async def test_a_ready_server_is_healthy(server):
    assert (await server.http.get("/health")).json() == {"status": "ok"}
    ready = (await server.http.get("/ready")).json()
    assert (ready["ready"], ready["version"], ready["model"]) == (True, 7, "org/ring")
    assert (await server.http.get("/version")).json()["version"] == __version__


async def test_a_loading_and_a_dead_engine_say_so(anyio_backend):
    backend = FakeBackend(lambda add, index: 5)
    manager = RolloutManager(backend, None)
    app = create_app(manager, None, ServeConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as http:
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert response.status_code == 503
            assert "loading" in response.json()["reason"]
            assert response.headers["retry-after"] == "1"
        response = await http.post("/v1/completions", json={"prompt": [5]})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        assert (await http.get("/metrics")).status_code == 200
        await manager.start()
        assert (await http.get("/health")).status_code == 200
        manager._core.failure, manager._core._info = "the engine died: out of memory", None
        response = await http.get("/health")
        assert response.status_code == 503
        assert "out of memory" in response.json()["reason"]
        await manager.close()


async def test_metrics_under_our_names_and_those_of_existing_dashboards(server):
    server.backend.say(STATS)
    await server.post("/v1/completions", prompt="Hi")
    for _ in range(20):
        await asyncio.sleep(0)
    response = await server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in [
        "everstep:num_requests_running 3.0",
        "everstep:num_requests_waiting 2.0",
        "everstep:kv_cache_usage_perc 0.25",
        "everstep:prefix_cache_queries_total 8.0",
        "everstep:num_preemptions_total 1.0",
        "everstep:prompt_tokens_total 40.0",
        'everstep:kv_resume_total{kind="kept"} 2.0',
        'everstep:rollouts_ended_total{reason="stop"} 1.0',
        "everstep:time_to_first_token_seconds_count 1.0",
        'vllm:request_success_total{finished_reason="stop",model_name="org/ring"} 1.0',
        'vllm:num_requests_running{model_name="org/ring"} 3.0',
        'vllm:generation_tokens_total{model_name="org/ring"} 50.0',
        'vllm:prefix_cache_hits_total{model_name="org/ring"} 6.0',
        'vllm:e2e_request_latency_seconds_count{model_name="org/ring"} 1.0',
        'sglang:num_running_reqs{model_name="org/ring"} 3.0',
        'sglang:num_queue_reqs{model_name="org/ring"} 2.0',
        'sglang:num_used_tokens{model_name="org/ring"} 400.0',
        'sglang:cache_hit_rate{model_name="org/ring"} 0.75',
        'sglang:token_usage{model_name="org/ring"} 0.25',
    ]:
        assert line in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


async def test_histogram_buckets_are_cumulative(server):
    for _ in range(3):
        await server.post("/v1/completions", prompt="Hi")
    text = (await server.http.get("/metrics")).text
    prefix = "everstep:e2e_request_latency_seconds_bucket"
    counts = [float(line.split()[1]) for line in text.splitlines() if line.startswith(prefix)]
    assert counts == sorted(counts)
    assert counts[-1] == 3.0


def test_the_front_imports_no_torch():
    code = "import sys, everstep.server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
