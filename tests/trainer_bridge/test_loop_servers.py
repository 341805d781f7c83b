"""The loop with servers: `everstep rollout --server` and a trainer, and the kill of a server."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.version_folders import find_versions
from tests.serving import Served, two_served

from .training_loop import WAIT_S, Loop

KEY = "admin-of-the-test"


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path, kv="recompute", old_policy="exact")


@pytest.fixture
def servers(loop: Loop) -> Iterator[list[Served]]:
    with two_served(loop.folder / "model", loop.folder, "--admin-key", KEY) as found:
        yield found


def weights_of(server: Served) -> dict:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.get(f"{server.url}/weights", headers=headers).json()


def test_two_servers_are_given_every_version_through_the_kill_of_one(
    loop: Loop, servers: list[Served]
) -> None:
    urls = ",".join(server.url for server in servers)
    command = [*loop.rollout, "--server", urls, "--admin-key", KEY]
    driver, trainer = loop.start(command), loop.start(loop.train)
    end_s = time.monotonic() + WAIT_S
    while weights_of(servers[1])["current"]["number"] < 2:
        assert time.monotonic() < end_s, loop.log()
        assert driver.poll() is None, loop.log()
        time.sleep(0.02)
    servers[1].kill()
    # beyond the next flip, it may be
    time.sleep(0.5)
    servers[1].start()
    loop.end(driver, trainer)
    loop.check()
    loop.check_bits()
    assert "version 1 serves on 2 of 2 engines: staged in" in loop.log()
    assert {line["engine"] for line in loop.lines} == {server.url for server in servers}
    # both serve the last one, whose folder is there for their next start
    for server in servers:
        current = weights_of(server)["current"]
        assert (current["number"], Path(current["folder"]).is_dir()) == (5, True)
    assert [path.name for path in (loop.folder / "versions").glob("v*")] == ["v5"]


@pytest.mark.slow
def test_a_server_that_comes_back_with_an_old_version_catches_up(
    loop: Loop, servers: list[Served]
) -> None:
    """Its journal is gone: it serves the model that it was started with."""
    urls = ",".join(server.url for server in servers)
    more = ["--server", urls, "--admin-key", KEY, "--wait-s", "60"]
    loop.end(loop.start([*loop.rollout, *more]), loop.start(loop.train))
    servers[1].kill()
    for path in (loop.folder / "b").glob("journal.db*"):
        path.unlink()
    servers[1].start()
    assert weights_of(servers[1])["current"]["number"] == 0
    again = [*loop.rollout, *more, "--iterations", "7"]
    driver, trainer = loop.start(again), loop.start(loop.train)
    loop.iterations = 7
    loop.end(driver, trainer)
    loop.check()
    loop.check_bits()
    assert "version 5 serves on 1 of 2 engines" in loop.log()


def test_a_wrong_admin_key_is_said_before_anything_is_sampled(
    loop: Loop, servers: list[Served]
) -> None:
    driver = loop.start([*loop.rollout, "--server", servers[0].url, "--admin-key", "wrong"])
    assert driver.wait(WAIT_S) == 2
    assert "a valid admin key is required" in loop.log()
    assert not (loop.folder / "out.jsonl").exists()


def test_a_fresh_run_on_other_weights_than_the_trainers_is_refused_on_both_sides(
    loop: Loop,
) -> None:
    other = make_checkpoint(loop.folder / "other", format="f32", seed=2)
    command = [*loop.rollout, "--model", str(other), "--dtype", "float32"]
    driver, trainer = loop.start(command), loop.start(loop.train)
    assert (driver.wait(WAIT_S), trainer.wait(WAIT_S)) == (2, 2), loop.log()
    mine, theirs = (
        next(iter(find_versions([loop.folder / name])))[:12] for name in ("model", "other")
    )
    line = f"the trainer begins with weights {mine}, the engines serve {theirs}: serve the model"
    assert loop.log().count(line) == 2
    assert not (loop.folder / "trained" / "metrics.jsonl").exists()
