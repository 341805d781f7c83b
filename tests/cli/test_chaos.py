"""everstep chaos: what it refuses, what it would notice, and a run against a real server."""

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from everstep import processes
from everstep.chaos.load import Load, Watch
from everstep.chaos.run import Certificate, seconds_of, url_of
from everstep.cli import run
from everstep.engine.errors import ConfigError
from everstep.engine.rollout import RolloutState
from everstep.server.rollouts.wire import RolloutSummary


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("30s", 30), ("1.5m", 90), ("2h", 7200)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert seconds_of(text, "--every") == seconds


@pytest.mark.parametrize("text", ["", "0", "-3s", "3 days", "s", "1e9s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--every must be a time"):
        seconds_of(text, "--every")


def test_the_address_is_that_of_the_command() -> None:
    assert url_of(None, []) == "http://127.0.0.1:8000"
    assert url_of(None, ["everstep", "serve", "m", "--port", "81"]) == "http://127.0.0.1:81"
    assert url_of(None, ["everstep", "serve", "--port=82"]) == "http://127.0.0.1:82"
    assert url_of("http://localhost:9", ["--port", "81"]) == "http://localhost:9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kill", "trainer"], "--kill must name core or server, got 'trainer'"),
        (["--every", "soon"], "--every must be a time such as 30s"),
        (["--url", "ftp://x"], "--url must be http://HOST:PORT"),
        (["--url", "http://127.0.0.1:x"], "--url must be http://HOST:PORT"),
        (["--restart", "a", "--", "b"], "--restart and -- COMMAND both start the server"),
        (["--", "/no/such/everstep", "serve"], "/no/such/everstep serve: No such file"),
        (["--url", "http://127.0.0.1:1", "--duration", "1s"], "no answer from http://127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["chaos", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_only_an_everstep_server_is_a_victim() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = processes.listener(listener.getsockname()[1])
    assert pid is not None
    assert not processes.is_server(pid)


def summary(rollout_id="a", *, state=RolloutState.RUNNING, num=5, is_acked=False):
    return RolloutSummary(
        id=rollout_id,
        group_id="g",
        index=0,
        pool="",
        state=state,
        created_s=0.0,
        ended_s=None,
        num_output_tokens=num,
        is_acked=is_acked,
    )


class Lists:
    """A server of which only lists are asked; each look gives the next."""

    def __init__(self, *looks) -> None:
        self._looks = iter(looks)

    async def list(self, **_):
        for item in next(self._looks):
            yield item


ENDED = summary(state=RolloutState.FINISHED, num=9)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (summary(), [], "is not known any more"),
        (summary(), [summary(num=4)], "had 5 tokens and has 4"),
        (ENDED, [summary(num=9)], "had ended as finished and is running"),
        (summary(is_acked=True), [summary(is_acked=False)], "is offered again"),
    ],
)
def test_what_no_rollout_may_do_is_noticed(before, after, said) -> None:
    async def body():
        watch = Watch(Lists([before], after))
        await watch.look()
        await watch.look()
        return watch.faults

    [fault] = asyncio.run(body())
    assert said in fault


def test_a_kill_hits_what_had_tokens_and_gets_more() -> None:
    async def body(after):
        watch = Watch(Lists([summary()], [after]))
        await watch.look()
        watch.hit()
        await watch.look()
        assert watch.faults == []
        return watch.num_hits()

    assert asyncio.run(body(summary(num=6))) == 1
    assert asyncio.run(body(summary())) == 0


def test_rollouts_that_come_again_after_their_acknowledgement_are_duplicates() -> None:
    async def body():
        load = Load(Lists([ENDED]), width=1, max_tokens=4)
        load.seen["a"] = None
        await load.check_list()
        return load

    load = asyncio.run(body())
    assert load.num_duplicates == 1
    assert "offered again" in load.faults[0]


def test_a_certificate_shows_its_faults() -> None:
    certificate = Certificate(
        seconds=60.0,
        kills={"core": 2, "server": 1},
        num_in_mid_stream=0,
        accepted=4,
        delivered=3,
        acknowledged=3,
        duplicates=0,
        regenerated_tokens=0,
        watched=4,
        slowest_return_s=1.0,
        faults=["no kill hit the middle"],
        has_load=True,
    )
    text = "\n".join(certificate.lines())
    assert "killed         3 (core 2, server 1)" in text
    assert "books          NOT balanced" in text
    assert text.splitlines()[-2:] == ["FAULT no kill hit the middle", "certificate: 1 FAULTS"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_server_that_chaos_owns_is_killed_and_certified(tiny_checkpoint, port, tmp_path) -> None:
    serve = [str(Path(sys.executable).with_name("everstep")), "serve", str(tiny_checkpoint)]
    options = ["--port", str(port), "--journal", str(tmp_path / "run.db"), "--num-threads", "1"]
    chaos = ["chaos", "--kill", "core,server", "--every", "2s", "--duration", "12s", "--seed", "4"]
    done = subprocess.run(
        [serve[0], *chaos, "--width", "3", "--max-tokens", "400", "--", *serve, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2] == "certificate: nothing lost, nothing twice"
    kills = (tmp_path / "chaos-kills.jsonl").read_text().splitlines()
    killed = int(re.search(r"killed +(\d+)", done.stdout)[1])
    assert len(kills) >= killed > 0
    assert re.search(r"regenerated +[1-9]\d* tokens \(identical\)", done.stdout)
    # nothing is left running
    assert processes.listener(port) is None
