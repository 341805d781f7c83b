"""The harness on trial: bugs that are planted on purpose, and how long each stays hidden.

    python trial.py --work FOLDER [--bug NAME …] [--limit 600]

Each bug of faults.py is patched into every server of a run of the harness; runs of a few seconds
follow each other, each with its own seed, until the checker names a fault. Prints a row per bug: the
seed and the seconds under the nemesis, in all runs together, until it was found. Exit code 1 if one
was not found within its limit. `none` runs the harness without a bug: it must find nothing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from faults import BUGS

HERE = Path(__file__).parent


def run_once(work: Path, bug: str, seed: int, seconds: float) -> tuple[list[str], int]:
    """One run of the harness; returns the checker's faults and how many were killed."""
    for file in ("history.jsonl", "kills.jsonl", "report.json", "stop", "server.log"):
        (work / file).unlink(missing_ok=True)
    for file in work.glob("journal.db*"):
        file.unlink()
    fault = [] if bug == "none" else ["--fault", f"bug:{bug}"]
    command = [
        *(sys.executable, str(HERE / "harness.py"), "--work", str(work), "--seed", str(seed)),
        *("--seconds", str(seconds), "--end", "90", "--no-unharmed", *fault),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = work / "report.json"
    if not report.exists():
        raise SystemExit(f"the harness did not come to a verdict:\n{done.stdout}{done.stderr}")
    found = json.loads(report.read_text())
    faults = [fault for fault in found["faults"] if not fault.startswith("harness")]
    return faults, found["counts"].get("kills", 0)


def how_vague(fault: str) -> int:
    """A client that waits for ever says little of what it waits for."""
    vague = ("come to its end", "never delivered", "never accepted", "not acknowledged at the end")
    return sum(words in fault for words in vague)


def trial(work: Path, bug: str, *, limit_s: float, seconds: float) -> tuple[bool, str]:
    """Whether the bug was found, and its row."""
    began, kills = time.monotonic(), 0
    what = "no bug at all" if bug == "none" else BUGS[bug][2]
    for seed in range(10**6):
        faults, num = run_once(work, bug, seed, seconds)
        kills += num
        took = time.monotonic() - began
        if faults:
            said = min(faults, key=how_vague)
            row = f"| `{bug}` | {what} | {seed} | {took:.0f} | {kills} | {said} |"
            return True, row
        if took > limit_s:
            return False, f"| `{bug}` | {what} | - | not within {took:.0f} | {kills} | |"
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description="put the crash harness on trial")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bug", action="append", choices=[*BUGS, "none"])
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per bug")
    parser.add_argument("--seconds", type=float, default=12.0, help="of one run")
    given = parser.parse_args()
    print("| bug | what it does | seed | seconds | kills | how it is found |")
    print("|---|---|---|---|---|---|", flush=True)
    is_good = True
    for bug in given.bug or BUGS:
        given.work.mkdir(parents=True, exist_ok=True)
        found, row = trial(given.work, bug, limit_s=given.limit, seconds=given.seconds)
        print(row, flush=True)
        is_good &= found == (bug != "none")
    shutil.rmtree(given.work, ignore_errors=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
