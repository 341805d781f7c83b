"""New weights under real SIGKILLs of server and core: while they are staged, at the flip, around its
journaling. What serves afterwards is one of the two versions and the one that was promised, and every
token is, to the bit, what its segments say of weights and KV."""

import contextlib
import random
import sys
import threading
import time
from pathlib import Path

import pytest

from everstep import Client
from everstep.cli import run
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint, resize
from everstep.engine.checkpoint.manifest import write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.errors import EverstepError
from everstep.engine.model.canaries import make_canary
from tests.engine.flips import weights_of

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from harness import free_port, options  # noqa: E402
from test_budget_kills import strike, wait_until_ready  # noqa: E402
from victims import Server  # noqa: E402

POLICIES = ("keep", "recompute", "recompute-prompt")
# where which process dies, at which passing, and whether the new version serves then
POINTS = [
    ("core", "mid_staging", 1, False),
    ("core", "mid_staging", 40, False),
    ("core", "mid_flip", 1, False),
    ("core", "after_core_flip", 1, False),
    ("server", "before_flip", 1, False),
    ("server", "after_flip", 1, True),
]
NUM_STRIKES = 4
NUM_ROLLOUTS, LENGTH = 3, 400


def make_versions(root: Path, count: int) -> list[Path]:
    folders = []
    for version in range(count):
        sizes = resize("tiny", ["num_hidden_layers=2"])
        folder = make_checkpoint(root / f"v{version}", shape=sizes, format="f32", seed=version)
        canary = make_canary(weights_of(folder), list(range(3, 40)), 8)
        manifest = manifest_of(Checkpoint.open(folder), version=version, canaries=[canary])
        write_manifest(folder, manifest)
        folders.append(folder)
    return folders


class Trial:
    """A server under which the weights change once, and which is killed meanwhile."""

    def __init__(self, server: Server, client: Client, root: Path, number: int, kv: str) -> None:
        self.server, self.client, self.root, self.number, self.kv = server, client, root, number, kv
        self.outcome: list[object] = []

    def begin(self, faults: list[str]) -> None:
        """Another server over the same journal, and rollouts under way."""
        strike(self.server, "server", faults)
        self.before = self.client.weights().current.number
        sampling = {"max_tokens": LENGTH, "ignore_eos": True}
        self.ids = [
            self.client.submit(prompt_ids=[self.number, n, 3, 4, 5], sampling=sampling).rollout_ids[
                0
            ]
            for n in range(NUM_ROLLOUTS)
        ]
        for one in self.ids:
            while len(self.client.get(one).output_ids) < 5:
                time.sleep(0.002)

    def update(self) -> threading.Thread:
        thread = threading.Thread(target=self._update)
        thread.start()
        return thread

    def _update(self) -> None:
        # asked once: who asks again is served
        with Client(self.client.base_url, retry_s=0.0) as client:
            try:
                path = str(self.root / f"v{self.number}")
                self.outcome.append(client.update_weights(path, kv=self.kv, priority="full"))
            except (EverstepError, OSError) as error:
                self.outcome.append(error)

    def end(self) -> int:
        """Which version serves after it; then the new one does, and all rollouts are what they say
        that they are."""
        wait_until_ready(self.server)
        served = self.client.weights().current.number
        assert served in (self.before, self.number)
        if not isinstance(self.outcome[0], Exception):
            assert served == self.number
        # nor does another kill change what serves
        strike(self.server, "server")
        assert self.client.weights().current.number == served
        if served != self.number:
            self.client.update_weights(str(self.root / f"v{self.number}"), kv=self.kv)
        assert self.client.weights().current.number == self.number
        done = [self.client.wait(one, timeout_s=60) for one in self.ids]
        assert all(len(rollout.output_ids) == LENGTH for rollout in done)
        most = max(done, key=lambda rollout: len(rollout.segments))
        file = self.root / f"{most.id}.rollout"
        file.write_bytes(self.client.export(most.id))
        code = run(["replay", str(file), "--weights", str(self.root), "--num-threads", "1"])
        assert code == 0, most.segments
        return served


@contextlib.contextmanager
def served(work: Path):
    folders = make_versions(work / "versions", len(POINTS) + NUM_STRIKES + 1)
    port = free_port()
    server = Server(work, port, options(folders[0], work / "journal.db", port), is_cold=False)
    try:
        server.start([])
        with Client(f"http://127.0.0.1:{port}", retry_s=60.0) as client:
            wait_until_ready(server)
            yield server, client, work / "versions"
    finally:
        server.close()


@pytest.mark.timeout(300)
def test_whatever_is_killed_during_a_swap_one_version_serves(tmp_path, capsys):
    rng = random.Random(5)
    with served(tmp_path) as (server, client, root):
        log = tmp_path / "kills.jsonl"
        for number, (victim, point, passing, is_new) in enumerate(POINTS, start=1):
            trial = Trial(server, client, root, number, rng.choice(POLICIES))
            trial.begin([f"die:{point}:{passing}:{log}"])
            trial.update().join()
            assert f'"{point}"' in log.read_text(), "it did not die there"
            log.write_text("")
            if victim == "server":
                come_back(server)
            assert isinstance(trial.outcome[0], Exception)
            assert (trial.end() == number) == is_new, point
        for number in range(len(POINTS) + 1, len(POINTS) + 1 + NUM_STRIKES):
            trial = Trial(server, client, root, number, rng.choice(POLICIES))
            trial.begin([])
            thread = trial.update()
            time.sleep(rng.uniform(0, 0.06))
            strike(server, rng.choice(["core", "server"]))
            thread.join()
            trial.end()
    said = capsys.readouterr().out
    assert said.count("identical to the bit\n") == len(POINTS) + NUM_STRIKES


def come_back(server: Server) -> None:
    """Once it has died."""
    while server.pid is not None:
        server.look()
        time.sleep(0.001)
    server.start([])
