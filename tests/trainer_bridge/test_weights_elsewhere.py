"""Versions that ranks send, as processes: worlds of 1 to 3, several receivers, kills of both sides."""

import gc
import mmap
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.engine.checkpoint.fp8_policy import Fp8Format
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.errors import ConfigError, EverstepError
from everstep.trainer_bridge.trainer.sharding import join_world
from everstep.trainer_bridge.weights import chunks as weight_chunks
from everstep.trainer_bridge.weights.targets import Elsewhere, Here
from everstep.weights_receiving import Job, ReceiverChild

from .training_runs import free_port
from .weight_runs import (
    change,
    files_of,
    names_of,
    ring_of,
    sender_of,
    sending,
    start_ranks,
    taking,
)

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
SMALL = 8192


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "source", format="f32")


@contextmanager
def ranks(world: int, work: Any, *arguments: Any) -> Iterator[Callable[[], None]]:
    """`work(rank, world, port, *arguments)` in processes; what waits until they have ended well."""
    running = start_ranks(work, world, *arguments, join=False)

    def join() -> None:
        end_s = time.monotonic() + WAIT_S
        while not running.join(1.0):
            assert time.monotonic() < end_s

    try:
        yield join
    finally:
        for process in running.processes:
            process.kill()


@contextmanager
def joined(rank: int, world: int, port: int) -> Iterator[Any]:
    gc.freeze()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    weight_chunks.CHUNK_BYTES = SMALL
    with join_world("cpu") as found:
        yield found


def publish_both(rank: int, world: int, port: int, source: Path, here: Path, endpoint: str) -> None:
    """Two versions, here and there."""
    with joined(rank, world, port) as found:
        ring = ring_of(source, found)
        there = Elsewhere(found, [endpoint], run="run", lineage="a", deadline_s=20.0)
        # in FP8 where shards cut a block, and ranks have something to agree about
        fp8: Fp8Format | None = "fp8-experts" if world == 2 else None
        senders = [sender_of(ring, found, t, source, fp8) for t in (Here(found, here), there)]
        for version in (1, 2):
            published = [sender.publish(version) for sender in senders]
            assert published[0].digest == published[1].digest
            change(ring)
        senders[1].close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_arrives_is_what_is_written_here(world: int, source: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with (
        ranks(world, publish_both, source, here, endpoint) as join,
        taking(there, endpoint=endpoint),
    ):
        join()
    for version in ("v1", "v2"):
        assert files_of(here / version) == files_of(there / version)
    assert names_of(there) == ["v1", "v2"]


def publish_with_one_that_fails(
    rank: int, world: int, port: int, source: Path, endpoint: str, words: Path
) -> None:
    """The last rank knows another address, where nobody is."""
    with joined(rank, world, port) as found:
        address = endpoint if rank < world - 1 else "tcp://127.0.0.1:9"
        target = Elsewhere(found, [address], run="run", lineage="a", deadline_s=1.0)
        sender = sender_of(ring_of(source, found), found, target, source)
        try:
            sender.publish(1)
        except EverstepError as error:
            (words / str(rank)).write_text(f"{type(error).__name__}: {error}")
        sender.close()


def test_what_fails_on_one_rank_fails_on_all(source: Path, tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    (tmp_path / "words").mkdir()
    with (
        ranks(2, publish_with_one_that_fails, source, endpoint, tmp_path / "words") as join,
        taking(tmp_path / "there", endpoint=endpoint),
    ):
        join()
        assert not names_of(tmp_path / "there")
    first, second = ((tmp_path / "words" / str(rank)).read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(
        "PeerMissing: rank 1: no receiver of weights answers at tcp://127.0.0.1:9"
    )


def publish_until_one_dies(
    rank: int, world: int, port: int, source: Path, endpoint: str, words: Path
) -> None:
    """The last rank is gone in the middle of the first version."""
    try:
        with joined(rank, world, port) as found:
            target = Elsewhere(found, [endpoint], run="run", lineage="a", deadline_s=10.0)
            sender = sender_of(ring_of(source, found), found, target, source)
            if rank == world - 1:
                target.write = lambda _: os._exit(0)  # type: ignore[assignment, method-assign]
            with closing(sender):
                sender.publish(1)
    except EverstepError as error:
        (words / str(rank)).write_text(f"{type(error).__name__}: {error}")


def test_a_rank_that_is_killed_ends_the_others_with_a_line(source: Path, tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with (
        ranks(2, publish_until_one_dies, source, endpoint, tmp_path) as join,
        taking(tmp_path / "there", endpoint=endpoint),
    ):
        join()
        wait_for(lambda: not names_of(tmp_path / "there"))
    said = (tmp_path / "0").read_text()
    assert said.startswith("PeerMissing: rank 1 of 2 is gone (")
    assert "\n" not in said


# what a receiver is on a host of its own: two of them have the same root; while one is started again
# the trainer says nothing to the other
RECEIVER = """
import sys
from pathlib import Path
from everstep.trainer_bridge.weights.receiver import WeightReceiver

receiver = WeightReceiver(Path("versions"), run="run", endpoint=sys.argv[1], patience_s=6.0)
receiver.start()
receiver.run()
"""
# publishes for ever, slowly: a kill finds it in the middle
TRAINER = """
import sys, time
from itertools import count
from pathlib import Path
from everstep.trainer_bridge.trainer.sharding import join_world
from everstep.trainer_bridge.weights import chunks as weight_chunks
from everstep.trainer_bridge.weights.link import WeightLink
from everstep.trainer_bridge.weights.targets import Elsewhere
from tests.trainer_bridge.weight_runs import change, ring_of, sender_of

source, lineage, first, pause_s, *endpoints = sys.argv[1:]
weight_chunks.CHUNK_BYTES = 8192
real = WeightLink.send

def send(link, chunk):
    time.sleep(float(pause_s))
    real(link, chunk)

WeightLink.send = send
with join_world("cpu") as world:
    target = Elsewhere(world, endpoints, run="run", lineage=lineage, deadline_s=20.0)
    ring = ring_of(Path(source), world)
    sender = sender_of(ring, world, target, Path(source))
    for version in count(int(first)):
        print(sender.publish(version).digest, flush=True)
        change(ring)
"""


class Processes:
    """Started here, and gone at the end of the test."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []

    def start(self, code: str, *arguments: object, cwd: Path | None = None) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    for process in found.running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_the_command_says_what_arrives_and_what_it_cannot(source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "everstep",
        "receive-weights",
        "--root",
        str(tmp_path / "root"),
    ]
    refused = subprocess.run(
        [*command, "--bind", "tcp://0.0.0.0:1"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --bind: 'tcp://0.0.0.0:1' can be reached from")
    assert refused.stderr.count("\n") == 1
    with subprocess.Popen(
        [*command, "--bind", "tcp://127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.fullmatch(
            rf"weights of the run 'run' arrive at (\S+), in {tmp_path}/root\n", first
        )
        assert found is not None, first
        with sending(source, [found[1]]) as (sender, _):
            sender.publish(7)
        second = process.stdout.readline()
        assert re.fullmatch(rf"version 7: 0\.7 MB in \S+ s \(.*\), {tmp_path}/root/v7\n", second)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0


def test_a_child_of_rollout_names_the_flags_of_rollout() -> None:
    job = Job.of("tcp://0.0.0.0:1", "run", None, None, prefix="weights-")
    with pytest.raises(ConfigError, match=r"^--weights-bind: 'tcp://0\.0\.0\.0:1' can be reached"):
        ReceiverChild(job)


FAULTS = """
import resource, threading
import numpy as np
from everstep.weights_receiving import _keep_memory

def faults():
    # on a thread, as messages are received: it has memory of its own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        there = [np.empty(1 << 20, np.uint8) for _ in range(3)]
        for one in there:
            one.fill(1)
        del there, one
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

for _ in range(2):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
    _keep_memory()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept where glibc gives it")
def test_a_receiver_keeps_the_memory_of_messages() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    without, kept = map(int, found.stdout.split())
    pages = 3 * 2**20 // mmap.PAGESIZE
    assert kept < 3 * pages < without, found


def wait_for(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_kills_of_both_sides(source: Path, tmp_path: Path, processes: Processes) -> None:
    """Two receivers; one is killed in the middle of a version and comes back, then the trainer is."""
    hosts = [tmp_path / name for name in ("one", "two")]
    endpoints = [f"tcp://127.0.0.1:{free_port()}" for _ in hosts]
    receivers = []
    for host, endpoint in zip(hosts, endpoints, strict=True):
        host.mkdir()
        receivers.append(processes.start(RECEIVER, endpoint, cwd=host))

    def is_there(name: str, host: Path) -> bool:
        return (host / "versions" / name).exists()

    trainer = processes.start(TRAINER, source, "a", 1, 0.01, *endpoints)
    wait_for(lambda: is_there("v1", hosts[0]) and is_there(".partial-v2", hosts[1]))
    receivers[1].send_signal(signal.SIGKILL)
    receivers[1].wait()
    assert is_there("v1", hosts[1])
    assert not is_there("v2", hosts[1])
    processes.start(RECEIVER, endpoints[1], cwd=hosts[1])
    wait_for(lambda: all(is_there("v2", host) for host in hosts))
    assert len({trainer.stdout.readline() for _ in range(2)}) == 2

    wait_for(lambda: is_there(".partial-v3", hosts[0]))
    trainer.send_signal(signal.SIGKILL)
    # what was never finished goes, what was finished stays
    wait_for(lambda: not any(is_there(".partial-v3", host) for host in hosts))
    for host in hosts:
        assert names_of(host / "versions") == ["v1", "v2"]
        assert files_of(host / "versions" / "v2") == files_of(hosts[0] / "versions" / "v2")
    # another life of it begins again from what it knows
    processes.start(TRAINER, source, "b", 2, 0.0, *endpoints)
    wait_for(lambda: all(is_there("v4", host) for host in hosts))
