"""Batches over a fake core: what becomes a record, what becomes an error, and how a run resumes."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everstep.engine.config import RestartConfig
from everstep.engine.errors import ConfigError, EngineUnavailable
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.rollout import SamplingParams
from everstep.server.batches.lines import Defaults
from everstep.server.batches.output import BatchOutput, IdSet
from everstep.server.batches.run import BatchRun, Counts, check_paths

from .batch_backend import FakeBackend, token_of

DEFAULTS = Defaults(sampling=SamplingParams(max_tokens=4))


def write_lines(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    os.utime(path, (1000, 1000))
    return path


def run(
    source: Path,
    target: Path,
    *,
    backend: FakeBackend | None = None,
    defaults: Defaults = DEFAULTS,
    retry: bool = False,
    window: int = 8,
) -> Counts:
    async def go() -> Counts:
        restarts = RestartConfig(attempts=0)
        manager = RolloutManager(backend or FakeBackend(), None, restarts=restarts)
        await manager.start()
        try:
            batch = BatchRun(manager, None, source, output, defaults=defaults, window=window)
            return await batch.run()
        finally:
            await manager.close()

    output = BatchOutput(target)
    try:
        if retry:
            output.drop_errors()
        return asyncio.run(go())
    finally:
        output.close()


def records(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found), "an id has two records"
    return by_id


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"custom_id": f"p{i}", "prompt": [1 + i % 200, 7]} for i in range(count)]


def test_each_line_gets_one_record_in_openai_form(tmp_path: Path) -> None:
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions"}
    line["body"] = {"prompt": [5, 6], "max_tokens": 3, "seed": 9, "unknown_to_us": 1}
    source = write_lines(tmp_path / "in", [line, {"prompt": [1], "n": 2, "metadata": {"k": [1]}}])
    counts = run(source, tmp_path / "out")
    found = records(tmp_path / "out")
    assert (counts.num_answered, counts.num_errors) == (2, 0)
    assert found["x"]["error"] is None
    body = found["x"]["response"]["body"]
    assert found["x"]["response"]["status_code"] == 200
    assert (body["object"], body["created"], body["model"]) == ("text_completion", 1000, "default")
    assert body["choices"][0]["token_ids"] == [token_of(9, t) for t in range(3)]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    second = found["line-2"]["response"]["body"]
    assert second["metadata"] == {"k": [1]}
    assert second["choices"][0]["seed"] != second["choices"][1]["seed"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{nonsense", "not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"prompt": [1], "custom_id": "\\ud800"}', "not JSON"),
        ({}, "needs a prompt or messages"),
        ({"prompt": [1], "messages": []}, "one of them"),
        ({"prompt": []}, "empty"),
        ({"prompt": [999]}, "outside the vocabulary"),
        ({"prompt": [True]}, "a string or an integer"),
        ({"prompt": [1] * 64}, "the context holds 64"),
        ({"prompt": [1], "max_tokens": 64}, "leave room for 63"),
        ({"prompt": [1], "max_tokens": "4"}, "max_tokens"),
        ({"prompt": [1], "temprature": 1}, "did you mean temperature"),
        ({"prompt": [1], "temperature": -1}, "temperature"),
        ({"prompt": [1], "n": 0}, "from 1 to 1024"),
        ({"prompt": [1], "model": "gpt-4"}, "not the one that runs"),
        ({"prompt": "text"}, "needs a tokenizer"),
        ({"prompt": [1], "custom_id": {"a": 1}}, "custom_id must be"),
        ({"custom_id": "c", "url": "/v1/embeddings", "body": {}}, "url must be one of"),
        ({"custom_id": "c", "method": "GET", "url": "/v1/completions", "body": {}}, "must be POST"),
        ({"custom_id": "c", "url": "/v1/completions", "body": 3}, "body must be"),
        ({"custom_id": "c", "url": "/v1/completions", "body": {}}, "body.prompt is missing"),
        ({"url": "/v1/completions", "body": {"prompt": [1], "stream": True}}, "stream"),
    ],
)
def test_bad_line_becomes_an_error_record_and_stops_nothing(
    tmp_path: Path, line: Any, word: str
) -> None:
    source = write_lines(tmp_path / "in", [line, {"custom_id": "good", "prompt": [1]}])
    counts = run(source, tmp_path / "out")
    found = records(tmp_path / "out")
    assert (counts.num_answered, counts.num_errors) == (1, 1)
    assert found["good"]["error"] is None
    [bad] = [record for name, record in found.items() if name != "good"]
    assert bad["response"] is None
    assert word in bad["error"]["message"]
    assert bad["error"]["line"] == 1


def test_second_line_with_an_id_is_an_error_under_its_own_number(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "a", "prompt": [1]},
        {"custom_id": "a", "prompt": [2]},
        # takes the name that line 4 would get
        {"custom_id": "line-4", "prompt": [3]},
        {"prompt": [4]},
    ]
    source = write_lines(tmp_path / "in", lines)
    run(source, tmp_path / "out")
    found = records(tmp_path / "out")
    assert set(found) == {"a", "line-2", "line-4", "line-4-2"}
    assert "earlier line" in found["line-2"]["error"]["message"]
    assert found["line-4-2"]["error"] is None
    before = (tmp_path / "out").read_bytes()
    assert run(source, tmp_path / "out").num_skipped == 4
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 20, 150, 400, 700])
def test_a_run_cut_at_any_byte_ends_as_an_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    source = write_lines(tmp_path / "in", [*prompts(20), "bad", *prompts(3)])
    run(source, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) - cut])
    run(source, tmp_path / "cut")
    assert sorted((tmp_path / "cut").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_retry_errors_runs_error_lines_again_and_no_other(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [*prompts(3), {"custom_id": "long", "prompt": [1] * 70}])
    run(source, tmp_path / "out")
    assert records(tmp_path / "out")["long"]["error"]["code"] == "context_length_exceeded"
    assert run(source, tmp_path / "out", backend=FakeBackend(max_model_len=100)).num_skipped == 4
    counts = run(source, tmp_path / "out", backend=FakeBackend(max_model_len=100), retry=True)
    assert (counts.num_answered, counts.num_skipped) == (1, 3)
    assert records(tmp_path / "out")["long"]["error"] is None
    assert not list(tmp_path.glob("*.retry"))


def test_another_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    first = BatchOutput(tmp_path / "out")
    with pytest.raises(ConfigError, match="another process is writing it"):
        BatchOutput(tmp_path / "out")
    first.append(b'{"id":"batch_req_1","custom_id":"a","response":null,"error":{"code":"x"}}')
    first.close()
    # the lock moves to the file that a retry puts in place
    second = BatchOutput(tmp_path / "out")
    assert second.drop_errors() == 1
    with pytest.raises(ConfigError, match="another process is writing it"):
        BatchOutput(tmp_path / "out")
    second.close()
    BatchOutput(tmp_path / "out").close()


@pytest.mark.parametrize("content", ["my notes\n", "no newline at all", '{"custom_id": 3}\n'])
def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").write_text(content)
    with pytest.raises(ConfigError, match="no batch record"):
        BatchOutput(tmp_path / "out")
    assert (tmp_path / "out").read_text() == content


def test_an_output_of_other_settings_is_not_mixed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", prompts(2))
    run(source, tmp_path / "out")
    for backend, defaults in [
        (FakeBackend(digest="e" * 64), DEFAULTS),
        (FakeBackend(), Defaults(sampling=SamplingParams(max_tokens=5))),
        (FakeBackend(), Defaults(sampling=SamplingParams(max_tokens=4), run_seed=1)),
    ]:
        with pytest.raises(ConfigError, match="another model, seed or sampling"):
            run(source, tmp_path / "out", backend=backend, defaults=defaults)


def test_a_dead_engine_leaves_no_error_records_and_the_run_goes_on_later(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", prompts(40))
    with pytest.raises(EngineUnavailable, match="told to die"):
        run(source, tmp_path / "out", backend=FakeBackend(steps_to_die=10))
    part = records(tmp_path / "out")
    assert 0 < len(part) < 40
    assert all(record["error"] is None for record in part.values())
    counts = run(source, tmp_path / "out")
    assert counts.num_skipped == len(part)
    run(source, tmp_path / "whole")
    assert records(tmp_path / "out") == records(tmp_path / "whole")


def test_full_disk_cuts_the_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = BatchOutput(tmp_path / "out")
    output.append(b'{"id":"batch_req_1","custom_id":"a","response":null,"error":null}')
    size = (tmp_path / "out").stat().st_size
    write = os.write

    def half(fd: int, data: memoryview) -> int:
        if len(data) > 10:
            return write(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(ConfigError, match="no space left"):
        output.append(b"x" * 15)
    monkeypatch.undo()
    assert (tmp_path / "out").stat().st_size == size
    output.close()


def test_unusable_paths_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [])
    with pytest.raises(ConfigError, match="no such file"):
        check_paths(tmp_path / "nix", tmp_path / "out")
    with pytest.raises(ConfigError, match="is the input"):
        check_paths(source, tmp_path / "in")
    with pytest.raises(ConfigError, match="is a folder"):
        check_paths(source, tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        BatchOutput(tmp_path / "none" / "out")


def test_window_bounds_what_is_in_flight(tmp_path: Path) -> None:
    backend = FakeBackend()
    source = write_lines(tmp_path / "in", [{"prompt": [1], "n": 3} for _ in range(30)])
    run(source, tmp_path / "out", backend=backend, window=7)
    assert backend.most_live == 6


def write_many(path: Path, count: int) -> Path:
    with path.open("w") as lines:
        for i in range(count):
            lines.write(f'{{"custom_id": "p{i}", "prompt": [{i % 200}, 7], "max_tokens": 1}}\n')
    return path


def growth_bytes(tmp_path: Path, few: int, many: int) -> int:
    """How much higher the resident peak of a process gets by `many` lines, first answered and
    then skipped, after the same with `few`."""
    small, large = write_many(tmp_path / "few", few), write_many(tmp_path / "many", many)
    code = f"""
import resource, sys
from pathlib import Path
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.server.test_batch_run import run
def peak(source):
    for _ in range(2):
        counts = run(Path(source), Path(source + ".out"), window=64)
    assert counts.num_skipped == int(sys.argv[1 + source.endswith("many")])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak({str(small)!r})
print(peak({str(large)!r}) - before)
"""
    command = [sys.executable, "-c", code, str(few), str(many)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with (tmp_path / "many.out").open() as lines:
        assert sum(1 for _ in lines) == many
    return int(done.stdout)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    # two tables of ids, 32 bytes a line at most while they grow, and what the allocator keeps
    assert growth_bytes(tmp_path, 2_000, 20_000) < 6 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_a_million_lines(tmp_path: Path) -> None:
    assert growth_bytes(tmp_path, 20_000, 1_000_000) < 100 * 2**20


def test_id_set_holds_what_was_put_in() -> None:
    ids = IdSet()
    assert all(ids.add(f"id-{i}") for i in range(5000))
    assert not any(ids.add(f"id-{i}") for i in range(5000))
    assert len(ids) == 5000
    assert "id-17" in ids
    assert "id-5000" not in ids
