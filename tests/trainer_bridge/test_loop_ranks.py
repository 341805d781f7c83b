"""The loop with a trainer of two ranks, one of which is killed."""

import signal
import subprocess
import time
from pathlib import Path

from .training_loop import WAIT_S, Loop
from .training_runs import free_port, start


def start_ranks(loop: Loop) -> list[subprocess.Popen]:
    port = free_port()
    config = loop.folder / "train.toml"
    return [start(config, rank=rank, size=2, port=port) for rank in range(2)]


def test_two_ranks_share_the_groups_and_the_death_of_one_is_named(tmp_path: Path) -> None:
    loop = Loop(tmp_path, kv="recompute", old_policy="exact")
    engine = loop.start(loop.embedded)
    first, second = start_ranks(loop)
    metrics = tmp_path / "trained" / "metrics.jsonl"
    end_s = time.monotonic() + WAIT_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < end_s, loop.log()
        assert engine.poll() is first.poll() is None, loop.log()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, said = first.communicate(timeout=WAIT_S)
    assert first.returncode == 2, said
    assert "Traceback" not in said
    *_, last = said.splitlines()
    assert last.startswith("error: rank 1 of 2 is gone ("), said
    # the engine has waited
    assert engine.poll() is None
    ranks = start_ranks(loop)
    for rank in ranks:
        _, said = rank.communicate(timeout=WAIT_S)
        assert rank.returncode == 0, said
    loop.end(engine)
    loop.check()
    loop.check_bits()
