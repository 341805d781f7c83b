"""Both ends over real sockets: cut links, killed trainers, strangers, readers that do not read."""

import asyncio
import functools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from everstep.engine.errors import BridgeError, ConfigError, PeerMissing, PeerRefused
from everstep.trainer_bridge import protocol
from everstep.trainer_bridge.curve import make_keys, read_keys
from everstep.trainer_bridge.trajectories.receiver import Iteration, TrajectoryReceiver
from everstep.trainer_bridge.trajectories.sender import TrajectorySender

from ..proxy import Proxy
from .bridge_groups import ListSource

WAIT_S = 20.0


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@asynccontextmanager
async def sending(
    source: ListSource, **options: Any
) -> AsyncIterator[tuple[TrajectorySender, str]]:
    options = {"run": "run", "endpoint": "tcp://127.0.0.1:0", "heartbeat_s": 0.2} | options
    sender = TrajectorySender(source, **options)
    endpoint = await sender.start()
    try:
        yield sender, endpoint
    finally:
        await sender.close()


def names_of(receiver: TrajectoryReceiver, iterations: int) -> list[str]:
    """Take so many iterations whole."""
    return [group.name for _ in range(iterations) for group in next_of(receiver)]


def next_of(receiver: TrajectoryReceiver) -> Iteration:
    found = receiver.next_iteration(WAIT_S)
    assert found is not None
    return found


def receiver_of(endpoint: str, **options: Any) -> TrajectoryReceiver:
    return TrajectoryReceiver(endpoint, **({"run": "run", "lineage": "a"} | options))


async def on_threads(*calls: Callable[[], Any]) -> list[Any]:
    return await asyncio.gather(*map(asyncio.to_thread, calls))


@in_loop
async def test_two_ranks_share_every_iteration() -> None:
    source = ListSource.drawn(1, iterations=4)
    async with sending(source) as (sender, endpoint):

        def rank(number: int) -> list[str]:
            with receiver_of(endpoint, rank=number, world=2) as receiver:
                found = names_of(receiver, 4)
                receiver.trained(3, 17, "digest")
                receiver.durable("step-4", 3)
                time.sleep(0.3)
                return found

        for iteration in range(4):
            sender.announce(iteration)
        both = asyncio.create_task(on_threads(lambda: rank(0), lambda: rank(1)))
        assert (await sender.trained(3, WAIT_S)).version == 17
        first, second = await both
        assert sorted(first + second) == sorted(n for i in range(4) for n in source.names(i))
        assert source.released == 3


@in_loop
async def test_a_cut_link_loses_nothing_and_doubles_nothing() -> None:
    source = ListSource.drawn(2, iterations=20, tokens=60)
    draw = random.Random(2)
    async with sending(source) as (sender, endpoint):
        port = int(endpoint.rpartition(":")[2])
        proxy = Proxy(port, cut_after=lambda: draw.randint(500, 9000))
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for iteration in range(20):
            sender.announce(iteration)

        def rank() -> list[str]:
            with receiver_of(f"tcp://127.0.0.1:{port}", max_groups=3) as receiver:
                return names_of(receiver, 20)

        found = await asyncio.to_thread(rank)
        server.close()
    assert found == [name for i in range(20) for name in source.names(i)]
    assert proxy.num_cuts >= 5


@in_loop
async def test_who_does_not_read_costs_no_memory() -> None:
    source = ListSource([[[10, 10]] * 200])
    async with sending(source) as (sender, endpoint):
        sender.announce(0)
        with receiver_of(endpoint, max_groups=7) as receiver:
            await asyncio.to_thread(receiver.connect, WAIT_S)
            await asyncio.sleep(0.5)
            assert len(source.loads) == 7

            def slowly() -> int:
                for number, _ in enumerate(next_of(receiver)):
                    assert len(source.loads) <= number + 1 + 7
                return number + 1

            assert await asyncio.to_thread(slowly) == 200
    assert Counter(source.loads).most_common(1)[0][1] == 1


@in_loop
async def test_bytes_are_a_limit_too() -> None:
    source = ListSource([[[4000]] * 50])
    async with sending(source) as (sender, endpoint):
        sender.announce(0)
        with receiver_of(endpoint, max_bytes=200_000) as receiver:
            await asyncio.to_thread(receiver.connect, WAIT_S)
            await asyncio.sleep(0.5)
            size = 4000 * 17
            assert 200_000 // size <= len(source.loads) <= 200_000 // size + 1


@in_loop
async def test_garbage_disturbs_nobody() -> None:
    source = ListSource.drawn(3, iterations=3)
    async with sending(source) as (sender, endpoint):
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(endpoint)
        draw = random.Random(3)
        hello = protocol.encode(
            protocol.Hello(protocol=1, software="", run="run", lineage="a", rank=0, world=1)
        )
        with receiver_of(endpoint) as receiver:
            for iteration in range(3):
                stranger.send(draw.randbytes(50))
                stranger.send(hello[: draw.randint(0, len(hello) - 1)])
                stranger.send_multipart([b"", b"", hello])
                sender.announce(iteration)
                assert await asyncio.to_thread(names_of, receiver, 1) == source.names(iteration)
        # what the stranger said may come after what the rank did
        async with asyncio.timeout(WAIT_S):
            while sender.num_refused < 9:
                await asyncio.sleep(0.01)
        stranger.close(0)
        context.term()


@in_loop
async def test_another_version_is_refused_with_both_named(monkeypatch: Any) -> None:
    async with sending(ListSource([])) as (_, endpoint):
        monkeypatch.setattr("everstep.trainer_bridge.trajectories.receiver.PROTOCOL_VERSION", 2)
        with (
            receiver_of(endpoint) as receiver,
            pytest.raises(PeerRefused, match="speaks bridge protocol 2, this side 1"),
        ):
            await asyncio.to_thread(receiver.connect, WAIT_S)


@in_loop
async def test_deadlines_name_who_is_missing() -> None:
    source = ListSource.drawn(4, iterations=1)
    async with sending(source, patience_s=0.5) as (sender, endpoint):
        sender.announce(0)
        with pytest.raises(PeerMissing, match="no rank of the trainer has said hello"):
            await sender.trained(0, 0.1)
        with receiver_of(endpoint, rank=1, world=2) as receiver:
            await asyncio.to_thread(receiver.connect, WAIT_S)
            with pytest.raises(PeerMissing, match="rank 0 of 2 has not said hello"):
                await sender.all_there(0.2)
            await asyncio.to_thread(names_of, receiver, 1)
            with pytest.raises(PeerMissing, match="is there, but brought no group for 0 s"):
                await asyncio.to_thread(receiver.next_iteration, 0.2)
    with (
        receiver_of("tcp://127.0.0.1:9") as receiver,
        pytest.raises(PeerMissing, match=r"no engine answers at tcp://127.0.0.1:9 for 0 s"),
    ):
        await asyncio.to_thread(receiver.connect, 0.3)


@in_loop
async def test_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "good")
    make_keys(tmp_path / "other")
    source = ListSource.drawn(5, iterations=1)
    engine = read_keys(tmp_path / "good", "engine")
    async with sending(source, keys=engine) as (sender, endpoint):
        sender.announce(0)
        trainer = read_keys(tmp_path / "good", "trainer")
        with receiver_of(endpoint, keys=trainer) as receiver:
            assert await asyncio.to_thread(names_of, receiver, 1) == source.names(0)
        foreign = read_keys(tmp_path / "other", "trainer")
        for keys, error in (
            # its own pair is not the trainer's
            (type(foreign)(foreign.public, foreign.secret, trainer.peer), PeerRefused),
            # it takes somebody else for the engine; and: no keys at all
            (foreign, BridgeError),
            (None, BridgeError),
        ):
            with receiver_of(endpoint, keys=keys) as receiver, pytest.raises(error):
                await asyncio.to_thread(receiver.connect, 1.0)


def test_beyond_this_machine_keys_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--bridge: .* can be reached from outside"):
        TrajectorySender(ListSource([]), run="run", endpoint="tcp://0.0.0.0:5000")
    for wrong in ("http://127.0.0.1:1", "tcp://[::1", "5600", ""):
        with pytest.raises(ConfigError, match=r"^source.endpoint: .*; accepted: tcp://HOST:PORT"):
            receiver_of(wrong)
    with pytest.raises(ConfigError, match="everstep keys"):
        read_keys(tmp_path, "engine")
    make_keys(tmp_path)
    assert (tmp_path / "engine.key_secret").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="is there already"):
        make_keys(tmp_path)


@in_loop
async def test_an_address_that_is_taken_is_named() -> None:
    async with sending(ListSource([])) as (_, endpoint):
        other = TrajectorySender(ListSource([]), run="run", endpoint=endpoint)
        with pytest.raises(ConfigError, match="Address already in use"):
            await other.start()


TRAINER = """
import json, os, sys, time
from pathlib import Path
from everstep.trainer_bridge.trajectories.receiver import TrajectoryReceiver

endpoint, folder, total = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
saved = json.loads((folder / "saved").read_text()) if (folder / "saved").exists() else []
done = saved[-1][0] if saved else -1
receiver = TrajectoryReceiver(
    endpoint, run="run", lineage=f"life {os.getpid()}", checkpoint=f"step-{done}", done_through=done
)
while done < total - 1:
    iteration = receiver.next_iteration(20.0)
    saved.append((iteration.number, [group.name for group in iteration]))
    done = iteration.number
    receiver.trained(done, done + 1, "digest")
    (folder / "part").write_text(json.dumps(saved))
    os.replace(folder / "part", folder / "saved")
    receiver.durable(f"step-{done}", done)
receiver.close()
"""


@in_loop
async def test_a_killed_trainer_trains_everything_once(tmp_path: Path) -> None:
    total, num_kills = 200, 0
    source = ListSource.drawn(6, iterations=total, groups=4)

    def num_saved() -> int:
        file = tmp_path / "saved"
        return len(json.loads(file.read_text())) if file.exists() else 0

    async with sending(source) as (sender, endpoint):
        for iteration in range(total):
            sender.announce(iteration)
        command = [sys.executable, "-c", TRAINER, endpoint, str(tmp_path), str(total)]
        while num_kills < 4:
            process = subprocess.Popen(command)
            # while it is in the middle of its work
            while num_saved() < 20 * (num_kills + 1) and process.poll() is None:
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
            num_kills += 1
        assert await asyncio.to_thread(subprocess.Popen(command).wait) == 0
        await sender.trained(total - 1, WAIT_S)
    saved = json.loads((tmp_path / "saved").read_text())
    assert [iteration for iteration, _ in saved] == list(range(total))
    assert [names for _, names in saved] == [source.names(i) for i in range(total)]


@in_loop
async def test_an_engine_that_comes_back_goes_on() -> None:
    source = ListSource.drawn(7, iterations=6)
    found: list[str] = []
    async with sending(source) as (sender, endpoint):
        receiver = receiver_of(endpoint, max_groups=2)
        for iteration in range(3):
            sender.announce(iteration)
        found += await asyncio.to_thread(names_of, receiver, 2)
        receiver.durable("step-2", 1)
        while source.released < 1:
            await asyncio.sleep(0.01)
    async with sending(source, endpoint=endpoint, acked=1) as (sender, _):
        for iteration in range(6):
            sender.announce(iteration)
        found += await asyncio.to_thread(names_of, receiver, 4)
        receiver.trained(5, 6, "digest")
        assert (await sender.trained(5, WAIT_S)).version == 6
    await asyncio.to_thread(receiver.close)
    assert found == [name for i in range(6) for name in source.names(i)]


@in_loop
async def test_a_source_that_fails_is_said_to_whoever_waits() -> None:
    class Broken(ListSource):
        async def load(self, iteration: int, index: int) -> Any:
            raise OSError("disk gone")

    async with sending(Broken([[[1]]])) as (sender, endpoint):
        sender.announce(0)
        with receiver_of(endpoint) as receiver:
            threading.Thread(target=receiver.connect, args=(WAIT_S,)).start()
            with pytest.raises(BridgeError, match="disk gone"):
                await sender.trained(0, WAIT_S)


@in_loop
async def test_the_end_of_a_run_is_said() -> None:
    source = ListSource.drawn(8, iterations=1)
    async with sending(source) as (sender, endpoint):
        sender.announce(0)

        def rank() -> str:
            with receiver_of(endpoint) as receiver:
                names_of(receiver, 1)
                assert receiver.next_iteration(WAIT_S) is None
                receiver.durable("last", 0)
                assert receiver.ended is not None
                return f"{receiver.ended.reason}: {receiver.ended.needs}"

        task = asyncio.create_task(on_threads(rank))
        await sender.all_there(WAIT_S)
        await sender.finish("the prompts are done", WAIT_S, needs=["/v1"])
        assert await task == ["the prompts are done: ['/v1']"]
        assert source.released == 0
        assert sender.dealer.num_seated == 0
