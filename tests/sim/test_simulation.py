"""The whole front, scheduler and core in one thread, over drawn histories of faults.

python -m pytest tests/sim                                          500 histories
python -m pytest tests/sim --sim-seeds 100000 --sim-jobs 8 -s       many, with what was reached
python -m pytest tests/sim --sim-seed 17                            one, printed
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.sim import sometimes
from tests.sim.world import Outcome, run

DEFAULT_SEEDS = sometimes.SEEDS
_CHUNK = 50


def _option(request: pytest.FixtureRequest, name: str, default: int | None) -> int | None:
    value: int | None = request.config.getoption(name, None)
    return default if value is None else value


@pytest.mark.timeout(0)
def test_every_history_keeps_what_was_promised(request, capsys) -> None:
    alone = _option(request, "--sim-seed", None)
    if alone is not None:
        with capsys.disabled():
            print()
            outcome = run(alone, is_printing=True)
            print(_verdict(outcome))
        assert not outcome.faults, _report([outcome])
        return
    first, num = _option(request, "--sim-first", 0), _option(request, "--sim-seeds", DEFAULT_SEEDS)
    bad: list[Outcome] = []
    reached: Counter[str] = Counter()
    histories: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    began_s = time.perf_counter()
    for outcome in _all(range(first, first + num), _option(request, "--sim-jobs", 1)):
        if outcome.faults:
            bad.append(outcome)
        reached.update(outcome.reached)
        histories.update(outcome.reached.keys())
        totals.update(events=outcome.num_events, turns=outcome.num_turns)
        totals.update(sqlite=outcome.is_sqlite, virtual=round(outcome.lasted_s))
    took_s = time.perf_counter() - began_s
    print(
        f"\n{num:,} histories ({totals['sqlite']:,} over SQLite), {totals['virtual']:,} virtual "
        f"seconds, {totals['events']:,} events, {totals['turns']:,} turns of the loop, "
        f"{len(bad)} with faults; {took_s:.0f} s"
    )
    print("\n".join(sometimes.table(reached, histories)))
    assert not bad, _report(bad)
    assert not sometimes.missed(reached, num)


def _all(seeds: range, num_jobs: int) -> Iterator[Outcome]:
    if num_jobs == 1:
        yield from map(run, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=spawn) as pool:
        yield from pool.map(run, seeds, chunksize=_CHUNK)


def _verdict(outcome: Outcome) -> str:
    lines = [f"seed {outcome.seed}: {outcome.num_events} events, hash {outcome.digest}"]
    return "\n".join(lines + (outcome.faults or ["no fault"]))


def _report(bad: list[Outcome]) -> str:
    lines = [f"{len(bad)} histories with faults; of the first:"]
    for outcome in bad[:5]:
        lines += [
            f"  {outcome.faults[0]}",
            f"    python -m pytest tests/sim/test_simulation.py --sim-seed {outcome.seed}",
        ]
    return "\n".join(lines)
