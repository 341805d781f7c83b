"""The simulation on trial: each planted bug must be found, and soon.

python -m pytest tests/sim/test_harness_on_trial.py -s      bug → seed → seconds
"""

import time

import pytest

from tests.sim.bugs import BUGS
from tests.sim.world import run

WITHIN = 100
"""Seeds after which a bug counts as missed."""


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    bug(monkeypatch)
    began_s = time.perf_counter()
    for seed in range(WITHIN):
        outcome = run(seed)
        if outcome.faults:
            took_s = time.perf_counter() - began_s
            fault = outcome.faults[0].strip().splitlines()[0][:110]
            print(f"\n| `{name}` | {bug.__doc__} | {seed} | {took_s:.1f} | {fault} |")
            return
    pytest.fail(f"{name} was not found in {WITHIN} histories")
