"""Rewards that raise, hang, crash and lie, in real processes: one line for one sample, no more."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from everstep.engine.errors import ConfigError, MissingExtra
from everstep.trainer_bridge.rewards.rewards import (
    FunctionConfig,
    HttpConfig,
    RegexConfig,
    RewardConfig,
    RewardSample,
)
from everstep.trainer_bridge.rewards.workers import RewardPool, Rewards

MODULE = """
import asyncio, ctypes, os, subprocess, sys, time

def score(sample):
    return BEHAVIOURS[sample.text](sample)

def raises(sample):
    return 1 / 0

def hangs(sample):
    time.sleep(1000)

def hangs_with_a_child(sample):
    child = subprocess.Popen(["sleep", "1000"])
    open(sample.metadata, "w").write(str(child.pid))
    child.wait()

def crashes(sample):
    ctypes.string_at(0)

def prints(sample):
    print("noise" * 1000)
    os.write(1, b"more noise")
    return 0.5

async def slow(sample):
    await asyncio.sleep(0.01)
    return 0.25

BEHAVIOURS = {
    "good": lambda sample: float(sample.answer),
    "raises": raises,
    "hangs": hangs,
    "hangs with a child": hangs_with_a_child,
    "crashes": crashes,
    "exits": lambda sample: os._exit(3),
    "leaves": lambda sample: sys.exit("enough"),
    "nan": lambda sample: float("nan"),
    "text": lambda sample: "1.0",
    "prints": prints,
    "slow": slow,
    "where": lambda sample: float(os.getpid()),
}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Where the run starts there is a module `my_rewards`."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def function(**more):
    more = {"deadline_s": 60.0, **more}
    return RewardConfig(name="function", function=FunctionConfig(path="my_rewards:score"), **more)


def sample(text, answer=1, number=0, metadata=None):
    return RewardSample(id=f"ro-{number}", text=text, answer=answer, metadata=metadata)


def score_all(config, samples):
    with Rewards(config) as rewards:
        return rewards.score(samples)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


async def until(condition):
    """Wait for what must come; pytest's timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("text", "failure", "replaced"),
    [
        ("raises", "raised ZeroDivisionError: division by zero (", 0),
        ("crashes", "ended its worker: SIGSEGV", 1),
        ("exits", "ended its worker: exit code 3", 1),
        ("leaves", "raised SystemExit: enough (", 0),
        ("nan", "returned nan, not a finite number", 0),
        ("text", "returned '1.0' (str), not a number", 0),
    ],
)
def test_a_reward_that_fails_costs_its_sample_alone(module, text, failure, replaced):
    async def run():
        async with RewardPool(function(failure_reward=-1.0)) as pool:
            samples = [sample("good", 0.5, 1), sample(text, number=2), sample("good", 2, 3)]
            return await pool.score_all(samples), pool.num_replaced

    (before, failed, after), num_replaced = asyncio.run(run())
    assert (before.reward, before.failure) == (0.5, None)
    assert (after.reward, after.failure) == (2.0, None)
    assert failed.reward == -1.0
    assert failed.failure.startswith(f"reward my_rewards:score {failure}")
    assert failed.failure.endswith("; rollout ro-2 gets -1")
    assert "\n" not in failed.failure
    assert num_replaced == replaced


def test_a_reward_that_never_returns_is_killed_at_its_deadline(module):
    async def run():
        async with RewardPool(function(deadline_s=2.0)) as pool:
            hung = await pool.score(sample("hangs", number=4))
            return hung, await pool.score(sample("slow"))

    hung, after = asyncio.run(run())
    assert hung.reward == 0.0
    assert hung.failure == (
        "reward my_rewards:score took more than 2 s for it; rollout ro-4 gets 0"
    )
    assert after.reward == 0.25


def test_what_a_killed_reward_started_is_killed_too(module):
    pid_file = module / "pid"

    async def run():
        async with RewardPool(function(deadline_s=2.0)) as pool:
            await pool.score(sample("hangs with a child", metadata=str(pid_file)))
            child = int(pid_file.read_text())
            await until(lambda: not is_alive(child))

    asyncio.run(run())


def test_others_go_on_while_one_hangs(module):
    async def run():
        async with RewardPool(function(workers=2)) as pool:
            hung = asyncio.ensure_future(pool.score(sample("hangs")))
            others = await pool.score_all([sample("good", n, n) for n in range(6)])
            assert not hung.done()
            hung.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hung
            # its worker was spoilt; both can be used again
            both = await pool.score_all([sample("where"), sample("where")])
            return others, both

    others, both = asyncio.run(run())
    assert [outcome.reward for outcome in others] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(outcome.failure is None for outcome in both)


def test_dropped_samples_have_no_reward(module):
    [outcome] = score_all(function(on_failure="drop"), [sample("raises")])
    assert outcome.reward is None
    assert outcome.failure.endswith("rollout ro-0 gets no reward")


def test_what_a_reward_prints_is_no_answer(module, capfd):
    [outcome, after] = score_all(function(), [sample("prints"), sample("good")])
    assert (outcome.reward, after.reward) == (0.5, 1.0)
    assert capfd.readouterr().out == ""


def test_a_worker_that_is_killed_from_outside_is_replaced(module):
    async def run():
        async with RewardPool(function()) as pool:
            first = int((await pool.score(sample("where"))).reward)
            os.kill(first, signal.SIGKILL)
            lost = await pool.score(sample("good", number=7))
            return first, lost, int((await pool.score(sample("where"))).reward)

    first, lost, second = asyncio.run(run())
    assert lost.failure == (
        "reward my_rewards:score ended its worker: SIGKILL; rollout ro-7 gets 0"
    )
    assert first != second


def test_where_no_process_can_be_had_it_costs_the_sample_alone(module, monkeypatch):
    async def run():
        async with RewardPool(function()) as pool:
            await pool.score(sample("crashes"))

            async def refuses(*_, **__):
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "create_subprocess_exec", refuses)
                lost = await pool.score(sample("good", number=7))
            return lost, await pool.score(sample("good"))

    lost, after = asyncio.run(run())
    assert lost.failure == (
        "reward my_rewards:score has no worker: Resource temporarily unavailable; "
        "rollout ro-7 gets 0"
    )
    assert after.reward == 1.0


PARENT = """
import asyncio, sys
from everstep.trainer_bridge.rewards.workers import RewardPool
from everstep.trainer_bridge.rewards.rewards import FunctionConfig, RewardConfig, RewardSample

async def main():
    config = RewardConfig(name="function", function=FunctionConfig(path="my_rewards:score"))
    async with RewardPool(config) as pool:
        where = await pool.score(RewardSample(id="a", text="where"))
        print(int(where.reward), flush=True)
        await pool.score(RewardSample(id="b", text="hangs"))

asyncio.run(main())
"""


def test_a_worker_does_not_outlive_its_run(module):
    run = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    assert is_alive(worker)
    run.kill()
    run.communicate()
    asyncio.run(until(lambda: not is_alive(worker)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("my_rewards:scores", "'my_rewards' has no 'scores'"),
        ("broken:score", "raised ValueError: not today"),
    ],
)
def test_a_reward_that_cannot_be_imported_ends_the_start(module, path, message):
    (module / "broken.py").write_text("raise ValueError('not today')\n")
    config = RewardConfig(name="function", function=FunctionConfig(path=path))
    with pytest.raises(ConfigError) as caught:
        score_all(config, [sample("good")])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_import_that_hangs_has_a_deadline_too(module):
    (module / "stuck.py").write_text("import time\ntime.sleep(1000)\n")
    config = RewardConfig(
        name="function", function=FunctionConfig(path="stuck:score"), start_deadline_s=0.5
    )
    with pytest.raises(ConfigError, match="took more than 0\\.5 s to be imported"):
        score_all(config, [sample("good")])


def test_numeric_without_its_package_ends_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install 'everstep\\[train\\]'"):
        RewardPool(RewardConfig(name="numeric"))


def test_a_pattern_that_backtracks_for_ever_is_killed():
    config = RewardConfig(name="regex", regex=RegexConfig(pattern="(a+)+$"), deadline_s=2.0)
    [stuck, after] = score_all(config, [sample("a" * 64 + "b"), sample("aaa")])
    assert stuck.failure.startswith("reward regex took more than 2 s")
    assert after.reward == 1.0


@pytest.fixture
def reward_server():
    """Answers by the sample's text; `seen` are the bodies."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(body)
            status, answer = {
                "good": (200, '{"reward": 0.5}'),
                "absent": (200, '{"score": 1}'),
                "nan": (200, '{"reward": "NaN"}'),
                "no json": (200, "<html>"),
                "refused": (422, "what is that"),
                "busy once": (503 if len(seen) == 1 else 200, '{"reward": 1}'),
                "busy": (503, "busy"),
            }[body["text"]]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_a_reward_over_http(reward_server):
    url, seen = reward_server
    config = RewardConfig(name="http", http=HttpConfig(url=url, retries=1))
    texts = ["busy once", "good", "absent", "nan", "no json", "refused", "busy"]
    outcomes = score_all(config, [sample(text, "a", n) for n, text in enumerate(texts)])
    assert [outcome.reward for outcome in outcomes] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    begin = f"reward {url} "
    for outcome, failure in zip(
        outcomes,
        [
            None,
            None,
            "answered {'score': 1}, not {\"reward\": number}",
            "returned 'NaN' (str), not a number",
            "answered what is no JSON",
            "answered HTTP 422: 'what is that'",
            f"cannot be had from {url}: HTTP 503",
        ],
        strict=True,
    ):
        if failure is None:
            assert outcome.failure is None
        else:
            assert outcome.failure.startswith(begin + failure)
    assert seen[0]["answer"] == "a"
    assert set(seen[0]) >= {"id", "prompt", "text", "answer", "metadata", "finish_reason"}


def test_a_reward_server_that_is_not_there_is_named():
    url = "http://127.0.0.1:9"
    [outcome] = score_all(
        RewardConfig(name="http", http=HttpConfig(url=url, retries=0)), [sample("good")]
    )
    assert outcome.failure.startswith(f"reward {url} cannot be had from {url}: ConnectError")


def test_the_rewards_need_no_torch():
    code = (
        "import sys; import everstep.trainer_bridge.rewards.workers, everstep.trainer_bridge.rewards.rewards,"
        " everstep.trainer_bridge.losses.advantages, everstep.trainer_bridge.losses.config,"
        " everstep.trainer_bridge.losses.alarms;"
        "print([m for m in ('torch', 'numpy', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
