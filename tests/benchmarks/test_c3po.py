"""benchmarks/c3po.py sim, small: every table, the plot, and the figures that they must agree in."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import c3po
import c3po_engine
import c3po_sim
import c3po_steps


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "MEDIAN": 24,
        "BATCH": 4,
        "GROUP": 2,
        "SAMPLES": 8,
        "WARM_UP": 12,
        "MEASURED": 16,
        "KILLED": 60,
        "RATIOS": (1, 16),
    }.items():
        monkeypatch.setattr(c3po_sim, name, value)


def test_all_tables_and_the_plot_are_made(small, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["c3po.py", "sim", "--plots", str(tmp_path)])
    c3po.main()
    text = capsys.readouterr().out
    assert text.count("####") == 9
    rows = [line for line in text.splitlines() if line.startswith("| 1 | 1.00 |")]
    # equal lengths lose nothing, whatever σ
    assert len(rows) == 2
    assert all(row.split(" | ")[3:9] == ["1.00"] * 6 for row in rows)
    assert (tmp_path / "c3po_sim.svg").stat().st_size > 10_000


def test_a_step_gains_less_than_its_rollouts_and_by_the_same_training(small):
    point = c3po_sim.point(16)
    assert point.rollout("synchronous") > point.step("synchronous") > 1
    ours = point.ours.seconds_per_token
    synchronous = point.theirs["synchronous"].seconds_per_token
    training = synchronous * 0.8
    # 4/9 of a synchronous step is training: 0.8 of its rollouts
    for which, figures in point.theirs.items():
        expected = (figures.seconds_per_token + training) / (ours + training)
        assert point.step(which) == pytest.approx(expected)


def test_kills_come_as_often_as_they_say():
    fate = c3po_sim.killed(0.5, "error")
    after = [fate(c3po_sim.Sample(str(number), 0), 0).after for number in range(3000)]
    assert min(after) >= 1
    assert sum(after) / 3000 == pytest.approx(c3po_sim.MEDIAN / 0.5, rel=0.06)


def test_steps_and_times_are_compared_by_delivered_token():
    slow = [c3po_engine.Phase(2.0, 100, 100, 50), c3po_engine.Phase(4.0, 100, 100, 50)]
    fast = [c3po_engine.Phase(1.0, 150, 200, 20), c3po_engine.Phase(1.0, 150, 200, 20)]
    names = ["C3PO++, σ = 9", "synchronous"]
    first, second = c3po_engine.rows(16, 12, names, [fast, slow])
    assert first[:5] == ["16", "C3PO++, σ = 9", "10.0", "83 %", "133.3"]
    # 1/2 of a step per token against 2/15; 150 tokens per second against 50 and 25
    assert first[5:] == ["3.75 ×", "150", "4.50 (3.00–6.00)", "25 %"]
    assert second[5:] == ["1.00 ×", "38", "1.00 (1.00–1.00)", "0 %"]


def test_the_bound_is_what_steps_cost():
    assert c3po_steps.row_counts(6) == [1, 2, 4, 6]
    assert c3po_steps.row_counts(8) == [1, 2, 4, 8]
    costs = {1: 1.0, 2: 1.5, 4: 2.0}
    assert [c3po_steps.cost_of(costs, rows) for rows in (1, 2, 3, 4)] == [1.0, 1.5, 1.75, 2.0]
    # a step of 4, one of 2, two of 1: 5.5 s for 8 tokens, which two full steps have in 4
    assert c3po_steps.bound(costs, [[1, 2, 4, 1]], 4) == 5.5 / 4.0
    assert c3po_steps.bound(costs, [[1, 2, 4, 1], [3, 3, 3, 3]], 4) == 11.5 / 10.0
    assert c3po_steps.bound(costs, [[7, 7, 7, 7]], 4) == 1.0
