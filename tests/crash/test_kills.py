"""Real processes and real SIGKILLs; the judge is a program of its own (checker.py).

CI runs some dozens of kills. By hand, on an idle machine about one a second:

    python tests/crash/harness.py --work /tmp/crash --kills 1000
    python tests/crash/trial.py --work /tmp/trial
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_run(work: Path, *arguments: object) -> dict[str, int]:
    """Run the harness; returns its counts. What it printed is shown if it found a fault."""
    done = run("harness.py", "--work", work, *arguments)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((work / "report.json").read_text())["counts"]


@pytest.mark.timeout(900)
def test_nothing_is_lost_under_dozens_of_kills(tmp_path: Path) -> None:
    counts = check_run(tmp_path, "--kills", 40, "--seconds", 60, "--judge", 0.3)
    assert counts["kills in mid-stream"] > 0
    assert counts["resumed"] > 0
    assert counts["delivered"] == counts["accepted"] > 0


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_servers_that_start_as_a_users_do(tmp_path: Path) -> None:
    counts = check_run(tmp_path, "--kills", 25, "--seconds", 400, "--every", 3, "--cold")
    assert counts["kills in mid-stream"] > 0


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
def test_a_disk_that_is_full_now_and_then(tmp_path: Path) -> None:
    counts = check_run(tmp_path, "--kills", 60, "--seconds", 300, "--disk", 8, "--judge", 0.3)
    assert counts["times the disk was full"] > 0


@pytest.mark.timeout(14400)
@pytest.mark.slow
def test_nothing_is_lost_under_a_thousand_kills(tmp_path: Path) -> None:
    counts = check_run(tmp_path, "--kills", 1000, "--seconds", 10000, "--judge", 0.1)
    assert counts["kills"] >= 1000
    # the states that matter were reached
    for name in ("redelivered", "replayed submissions", "unknown outcomes", "cancelled"):
        assert counts[name] > 10, name
    for victim in ("server", "core", "client"):
        assert counts[f"kills of a {victim}"] > 10, victim


@pytest.mark.timeout(14400)
@pytest.mark.slow
def test_every_planted_bug_is_found(tmp_path: Path) -> None:
    done = run("trial.py", "--work", tmp_path / "trial", "--limit", 600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
