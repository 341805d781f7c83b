"""benchmarks/cpu.py: its arithmetic, its tables, and how it treats the sides' processes."""

import argparse
import sys
import textwrap
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cpu
from peers import cells, report
from peers.cells import Cell, Measured, Results
from peers.driver import PEERS, Driver, SideFailed
from peers.models import (
    SIZES,
    Sizes,
    ring_shape,
)

from everstep.engine.checkpoint.expected_tensors import expected_tensors
from everstep.engine.checkpoint.make_checkpoint import config_json
from everstep.engine.checkpoint.ring_config import parse_config

FAKE = f"""
import sys, time
sys.path.insert(0, {str(PEERS)!r})
from protocol import serve

class Side:
    def load(self, model, *, threads, context, concurrent):
        print("noise of an engine")
        if "bad" in model:
            raise OSError("no such\\nmodel")
        return {{"version": "1", "path": "fake"}}

    def prepare(self, concurrent, length):
        time.sleep(0.3)

    def generate(self, prompts, new_tokens, seed):
        if len(prompts) == 3:
            time.sleep(60)
        if len(prompts) == 4:
            sys.exit(7)
        time.sleep(0.01)
        return len(prompts) * new_tokens - (len(prompts) == 5)

serve(Side)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "fake.py"
    file.write_text(textwrap.dedent(FAKE))
    return file


@pytest.fixture
def driver(script: Path, tmp_path: Path):
    made = Driver("fake", Path(sys.executable), str(script), {}, tmp_path / "log")
    yield made
    made.close()


def load(driver: Driver, model: str = "good") -> None:
    driver.load(Path(model), threads=1, context=9, concurrent=9, limit_s=30)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_side_answers_and_is_stopped_in_between(driver: Driver, tmp_path: Path) -> None:
    load(driver)
    assert driver.said == {"version": "1", "path": "fake"}
    # what it prints does not disturb the answers
    assert "noise" in (tmp_path / "log").read_text()
    # preparing is not timed
    assert 0.01 <= driver.run([[1], [2]], 3, limit_s=30) < 0.3
    deadline = time.monotonic() + 10
    while state_of(driver._process.pid) != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.run([[1]], 3, limit_s=30)
    driver.close()
    driver.close()


def test_what_a_side_cannot_do_is_one_line(driver: Driver) -> None:
    with pytest.raises(SideFailed, match=r"^OSError: no such model$"):
        load(driver, "bad")
    load(driver)
    with pytest.raises(SideFailed, match="14 tokens instead of 15"):
        driver.run([[1]] * 5, 3, limit_s=30)


def test_a_side_that_hangs_is_ended(driver: Driver) -> None:
    load(driver)
    with pytest.raises(SideFailed, match="no answer in 1 s"):
        driver.run([[1]] * 3, 3, limit_s=1)
    with pytest.raises(SideFailed, match="it ended"):
        driver.run([[1]], 3, limit_s=30)


def test_sizes_are_those_of_the_checkpoints() -> None:
    for name, s in SIZES.items():
        config = parse_config(config_json(ring_shape(name), "bf16", 0, 2))
        numbers = {spec.name: spec.shape for spec in expected_tensors(config)}
        layers = [shape for n, shape in numbers.items() if ".layers." in n and len(shape) == 2]
        routers = s.layers * s.experts * s.hidden
        wanted = sum(a * b for a, b in layers) - routers
        # a batch so large that every expert is met, one token, no context worth speaking of
        cell = Cell(name, "bf16", 10**4, 0, 1)
        head = 2 * s.vocab * s.hidden
        assert cells.read_bytes(Cell(name, "bf16", 10**4, 1, 1)) == pytest.approx(
            2 * wanted + head + 10**4 * 4 * s.layers * s.kv_heads * s.head_dim, rel=1e-6
        )
        assert cell.is_prefill


def test_operations_are_counted_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sizes(2, 8, 4, 2, 4, 6, 3, 5, 11)
    monkeypatch.setitem(SIZES, "small", s)
    cell = Cell("small", "bf16", 3, 4, 2)
    count = 0
    for position in range(4 + 2 - 1):
        for _ in range(s.layers):
            count += 2 * s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim
            count += 2 * s.heads * s.head_dim * s.hidden
            count += s.chosen * 3 * 2 * s.hidden * s.width
            # scores and their sum over the values
            count += 2 * 2 * (position + 1) * s.heads * s.head_dim
    count += 2 * 2 * s.vocab * s.hidden
    assert cells.operations(cell) == 3 * count


def measured(cell: Cell, **seconds: float) -> Measured:
    taken = {side.replace("_", "."): [s, 2 * s, s] for side, s in seconds.items()}
    return Measured(cell, "abc", "today", [0.5, 1.5], 20.0, 100.0, taken)


def test_tables_say_rates_ratios_and_who_failed(tmp_path: Path) -> None:
    whole = measured(Cell("default", "bf16", 8, 1920, 128), everstep=10.0, llama_cpp=20.0)
    whole.failed["vllm"] = "not installed"
    whole.said["everstep"] = {"version": "9", "path": "here"}
    first = measured(Cell("default", "bf16", 8, 1920, 1), everstep=6.0)
    results = Results("box", 2, {m.cell.id: m for m in (first, whole)})
    text = report.markdown(results, {"default": "TABLE"})
    assert "| 8 at once, context 1920 | 102 | – | 51 | 2.00 |" in text
    assert "| prefill 8 × 1920 | 2560 |" in text
    # 8 × 127 tokens in 10 − 6 seconds
    assert "tokens/s: everstep 254." in text
    assert "- 8 at once, context 1920, vllm: not installed" in text
    assert "TABLE" in text
    assert "0.5–1.5" in text
    file = tmp_path / "results.json"
    cells.save_results(results, file)
    assert cells.load_results(file, "box", 2) == results
    # figures of another machine are put aside, not mixed in
    assert cells.load_results(file, "other", 2).cells == {}
    assert file.with_suffix(".other.json").exists()


def options(tmp_path: Path, **changed: object) -> argparse.Namespace:
    plain = {
        "peers": tmp_path / "peers",
        "out": tmp_path / "out",
        "models": None,
        "threads": 1,
        "sides": ["everstep", "llama.cpp"],
        "rounds": 2,
        "run_limit": 30.0,
        "cell_limit": 60.0,
        "again": False,
    }
    return argparse.Namespace(**(plain | changed))


def test_a_run_takes_turns_resumes_and_goes_on_without_a_side(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def start(bench: cpu.Bench, side: str) -> Driver:
        if side == "vllm":
            raise SideFailed("not installed")
        return Driver(side, Path(sys.executable), str(script), {}, tmp_path / f"{side}.log")

    def run(driver: Driver, prompts: list, new_tokens: int, *, limit_s: float) -> float:
        order.append((driver.name, new_tokens))
        return plain_run(driver, prompts, new_tokens, limit_s=limit_s)

    plain_run = Driver.run
    monkeypatch.setattr(cpu.Bench, "_start", start)
    monkeypatch.setattr(cpu.Bench, "_model", lambda *_: Path("good"))
    monkeypatch.setattr(cpu, "limits", lambda threads: (1.0, 2.0))
    monkeypatch.setattr(Driver, "run", run)
    plan = [Cell("default", "bf16", n, 4, 8) for n in (1, 2)]
    chosen = options(tmp_path, sides=["everstep", "vllm", "llama.cpp"])
    cpu.Bench(chosen).run(plan)
    found = cells.load_results(tmp_path / "out" / "results.json", cpu.machine(), 1).cells
    assert {side: len(taken) for side, taken in found[plan[1].id].seconds.items()} == {
        "everstep": 2,
        "llama.cpp": 2,
    }
    assert found[plan[0].id].failed == {"vllm": "cannot be loaded: not installed"}
    # a short run that is not counted, then each side once per round, another one first
    assert [name for name, new in order[: len(order) // 2] if new == 8] == [
        "everstep",
        "llama.cpp",
        "llama.cpp",
        "everstep",
    ]
    # nothing is left to do, unless the code has changed
    order.clear()
    cpu.Bench(chosen).run(plan)
    assert order == []
    monkeypatch.setattr(cpu, "commit", lambda: "other")
    cpu.Bench(chosen).run(plan[:1])
    assert order
    # what must take longer than the limit is not tried
    order.clear()
    slow = Cell("default", "bf16", 2, 4, 8)
    limited = cpu.Bench(options(tmp_path, run_limit=0.001))
    limited.run([slow])
    assert "--run-limit" in limited.results.cells[slow.id].failed["everstep"]


def test_a_peer_that_is_not_installed_is_said_and_nothing_is_made_for_it(tmp_path: Path) -> None:
    cell = Cell("default", "bf16", 1, 4, 8)
    bench = cpu.Bench(options(tmp_path, sides=["vllm", "llama.cpp", "transformers-f32"], rounds=1))
    bench.run([cell])
    failed = bench.results.cells[cell.id].failed
    assert len(failed) == 3
    assert all("not installed in" in why for why in failed.values())
    assert list((tmp_path / "peers" / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "torch_side"),
    [
        ({"avx2"}, "vllm-f32"),
        ({"avx2", "avx512_bf16"}, "vllm"),
        ({"amx_bf16"}, "vllm"),
        ((), "vllm"),
    ],
)
def test_peers_on_torch_run_in_what_is_fast_for_them(flags: set[str], torch_side: str) -> None:
    sides = cells.default_sides(flags)
    assert torch_side in sides
    assert {side.partition("-")[0] for side in sides} == {
        "everstep",
        "vllm",
        "llama.cpp",
        "transformers",
    }
    assert len(sides) == 4


def test_the_plans_have_what_the_issue_asks_for() -> None:
    full = cells.full_plan()
    assert len(full) == len(set(full))
    for model in SIZES:
        for n in (1, 8, 32, 128):
            assert {Cell(model, "bf16", n, 128, 128), Cell(model, "8bit", n, 128, 128)} <= set(full)
        assert Cell(model, "bf16", 8, 1920, 128) in full
        assert Cell(model, "bf16", 1, 2048, 1) in full
    prompts = full[1].prompts()
    assert len({tuple(p) for p in prompts}) == 8
    assert all(0 <= i < SIZES["default"].vocab for p in prompts for i in p)
    longest = max(cell.prompt + cell.new for cell in full)
    assert longest <= cpu.CONTEXT
