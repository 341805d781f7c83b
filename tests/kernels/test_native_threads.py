"""The threads of the C++ library: the same bits for any caller, after fork, and asleep when idle."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from everstep.kernels import native
from everstep.kernels.packed import pack, packed_linear

from .draws import assert_same_bits, make_weight, random, threads

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ library here")
TASKS = Path("/proc/self/task")
needs_linux = pytest.mark.skipif(not TASKS.is_dir(), reason="reads Linux's /proc")
GIVE_UP_S = 60


def product():
    """A call with more than enough work for several threads, and what it must give."""
    x, packed = (
        random(1, 64, 512, dtype=torch.bfloat16),
        pack(make_weight("plain", 512, 512, torch.bfloat16)),
    )
    with threads(1):
        return x, packed, packed_linear(x, packed)


def workers():
    """What the system says about each of this process's workers."""
    found = []
    for task in TASKS.iterdir():
        lines = task.joinpath("status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        if status["Name"] == "everstep-worker":
            found.append(status)
    return found


def comes_true(condition):
    """Whether it does before we give up: a thread starts, and falls asleep, when it is its turn."""
    end = time.monotonic() + GIVE_UP_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_callers_on_several_threads_do_not_disturb_each_other():
    x, packed, expected = product()
    wrong = []

    def call():
        wrong.extend(i for i in range(100) if not torch.equal(packed_linear(x, packed), expected))

    with threads(3):
        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert wrong == []


@needs_linux
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_has_workers_of_its_own():
    x, packed, expected = product()
    with threads(3):
        assert_same_bits(packed_linear(x, packed), expected)
        child = os.fork()
        if child == 0:
            # the parent's workers do not exist here: waiting for one would be for ever
            signal.alarm(2 * GIVE_UP_S)
            same = all(torch.equal(packed_linear(x, packed), expected) for _ in range(50))
            os._exit(0 if same and comes_true(lambda: len(workers()) == 2) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert_same_bits(packed_linear(x, packed), expected)


@needs_linux
def test_workers_sleep_between_calls_and_take_no_signals():
    x, packed, _ = product()
    with threads(4):
        packed_linear(x, packed)
    assert comes_true(lambda: len(workers()) >= 3)
    assert comes_true(lambda: all(status["State"].startswith("S") for status in workers()))
    for status in workers():
        assert int(status["SigBlk"], 16) & 1 << (signal.SIGINT - 1)


def test_a_process_ends_beside_its_workers():
    code = (
        "import torch; from everstep.kernels import Weight\n"
        "from everstep.kernels.packed import pack, packed_linear\n"
        "torch.set_num_threads(4)\n"
        "weight = pack(Weight(torch.ones(512, 512), torch.float32))\n"
        "for _ in range(20): out = packed_linear(torch.ones(64, 512), weight)\n"
        "print(out.sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout.strip(), done.stderr) == (str(64.0 * 512 * 512), "")
