"""`everstep rollout --server`: real servers, one of which is killed and started again."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from everstep.cli import run
from everstep.engine.native import ThreadBackend
from everstep.rollout import embedded as rollout_embedded

from ..serving import Served, two_served

# what depends on where a rollout ran, and when
_CHANGING = (
    *("iteration", "iterations", "retention", "segments", "rollout_id", "num_preemptions"),
    *("created_s", "first_token_s", "ended_s", "group_id", "engine"),
)


@pytest.fixture
def servers(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[list[Served]]:
    with two_served(tiny_checkpoint, tmp_path) as found:
        yield found


def lasting(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for line in path.read_bytes().splitlines():
        fields = json.loads(line)
        for name in _CHANGING:
            del fields[name]
        found[fields["prompt_id"], fields["index"]] = fields
    return found


def test_a_run_on_servers_survives_their_kill_and_minds_its_own_budget(
    servers: list[Served],
    tmp_path: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = tmp_path / "in.jsonl"
    lines: list[dict[str, Any]] = [
        {
            "id": f"p{i}",
            "prompt_ids": [i + 1, 2],
            "sampling": {"max_tokens": 20 + 13 * (i % 4), "ignore_eos": True},
        }
        for i in range(10)
    ]
    lines.append({"id": "long", "prompt_ids": [1], "sampling": {"max_tokens": 5000}})
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, here = tmp_path / "out.jsonl", tmp_path / "here.jsonl"
    base = ["rollout", "--prompts", str(prompts), "--group", "2", "--capacity", "6"]
    flags = [*base, "--budget", "150", "--retention", "100"]
    chats: list[int] = []

    def trouble() -> None:
        while not out.exists() or not out.stat().st_size:
            time.sleep(0.01)
        # others are served beside the run, whatever its budget does
        body = {"model": str(tiny_checkpoint), "prompt": [1, 2], "max_tokens": 9}
        response = httpx.post(f"{servers[1].url}/v1/completions", json=body, timeout=60)
        chats.append(response.json()["usage"]["completion_tokens"])
        servers[0].kill()
        servers[0].start()

    storm = threading.Thread(target=trouble)
    storm.start()
    urls = ",".join(server.url for server in servers)
    code = run([*flags, "--out", str(out), "--server", urls])
    storm.join()
    said = capfd.readouterr().err
    # one line is too long for the servers, so 1
    assert code == 1, said
    assert f"{prompts}:11: max_tokens: 1 prompt tokens leave room" in said
    assert "stays away" not in said
    assert len(chats) == 1
    monkeypatch.setattr(rollout_embedded, "ProcessBackend", ThreadBackend)
    engine = ["--model", str(tiny_checkpoint), "--num-threads", "1", "--max-model-len", "1024"]
    assert run([*flags, "--out", str(here), *engine]) == 1
    assert len(lasting(out)) == 20
    assert lasting(out) == lasting(here)
    engines = {json.loads(line)["engine"] for line in out.read_bytes().splitlines()}
    assert engines == {server.url for server in servers}
    # in the only one that is named rollouts stand by
    alone = tmp_path / "alone.jsonl"
    assert run([*flags, "--out", str(alone), "--server", servers[0].url]) == 1
    assert lasting(alone) == lasting(here)
    # nothing of the run is left, and no budget of it is open
    for server in servers:
        listed = httpx.get(f"{server.url}/rollouts").json()["data"]
        assert all(one["is_acked"] for one in listed)
        budgets = httpx.get(f"{server.url}/rollouts/budget").json()["data"]
        assert {budget["state"] for budget in budgets} <= {"spent", "closed"}
        assert {budget["places"] for budget in budgets} == {None, 6}


def test_a_server_that_is_not_there_is_one_line_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_ids": [1]}\n')
    before = sorted(tmp_path.iterdir())
    flags = [
        "--server",
        "http://127.0.0.1:9",
        "--wait-s",
        "0.3",
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    assert run(["rollout", "--prompts", str(prompts), *flags]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: no answer from http://127.0.0.1:9")
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
