"""The simulation on trial: each planted bug must be found, and soon.

python -m pytest tests/sim/test_harness_on_trial.py -m '' -s      bug → seed → seconds
"""

import random
import time

import pytest

from tests.sim.bugs import BUGS
from tests.sim.driver_bugs import DRIVER_BUGS
from tests.sim.profile import Profile
from tests.sim.world import SQLITE_SHARE, run

WITHIN = 400
"""Seeds after which a bug counts as missed."""
RARE = ("resumed_too_early", "lost_lease_dealt_again", "output_not_synced")
"""These take some dozens of histories to be found, or hundreds, and run with the slow tests."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in RARE))
        for name in (*BUGS, *DRIVER_BUGS)
    ],
)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS.get(name) or DRIVER_BUGS[name]
    bug(monkeypatch)
    began_s = time.perf_counter()
    for seed in range(WITHIN):
        if name in DRIVER_BUGS and not _has_driver(seed):
            continue
        outcome = run(seed)
        if outcome.faults:
            took_s = time.perf_counter() - began_s
            # of a traceback its last line
            fault = outcome.faults[0].strip().splitlines()[-1][:110]
            print(f"\n| `{name}` | {bug.__doc__} | {seed} | {took_s:.1f} | {fault} |")
            return
    pytest.fail(f"{name} was not found in {WITHIN} histories")


def _has_driver(seed: int) -> bool:
    drawn = Profile.draw(random.Random(f"{seed}/profile"), sqlite_share=SQLITE_SHARE)
    return drawn.driver is not None
