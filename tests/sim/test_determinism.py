"""A seed is a history: nothing else has a say in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.profile import Profile
from tests.sim.world import run

SEEDS = range(30)
_CODE = "from tests.sim.world import run; print([run(seed).digest for seed in range(0, 30)])"


@pytest.fixture(scope="module")
def digests() -> list[str]:
    return [run(seed).digest for seed in SEEDS]


def test_the_same_seed_twice_gives_the_same_history(digests: list[str]) -> None:
    assert [run(seed).digest for seed in reversed(SEEDS)] == digests[::-1]
    assert len(set(digests)) == len(digests)


def test_another_process_with_another_hash_seed_gives_the_same_history(digests) -> None:
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.append({str(root)!r}); {_CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(digests)


def test_both_disks_are_drawn() -> None:
    import random

    profiles = [Profile.draw(random.Random(seed), sqlite_share=0.1) for seed in range(100)]
    assert {profile.is_sqlite for profile in profiles} == {True, False}
