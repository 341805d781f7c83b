"""A trainer that an engine's end of the bridge feeds: nothing twice, nothing lost, over a restart."""

import asyncio
import shutil
import threading
from contextlib import contextmanager

import pytest
from msgspec.structs import replace

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.manifest import read_manifest
from everstep.engine.config import ModelConfig
from everstep.engine.errors import BridgeError, ConfigError, PeerMissing
from everstep.engine.model.canaries import make_canary
from everstep.engine.model.weights import load_weights
from everstep.engine.rollout import Segment
from everstep.trainer_bridge.fsdp_trainer import train
from everstep.trainer_bridge.trainer import sources
from everstep.trainer_bridge.trainer.config import read_config
from everstep.trainer_bridge.trajectories.sender import TrajectorySender

from .bridge_groups import ListSource
from .training_runs import make_run, reports, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@contextmanager
def an_engine(source, iterations, *, acked=-1, is_over=None):
    """The engine's end on a thread of its own, with some iterations complete; (sender, endpoint).

    is_over: it says goodbye when the last is trained, for ever or not; None: it stays
    """
    ready, done = threading.Event(), asyncio.Event()
    found = {}

    async def serve():
        sender = TrajectorySender(
            source, run="run", endpoint="tcp://127.0.0.1:0", heartbeat_s=0.2, acked=acked
        )
        found["endpoint"] = await sender.start()
        found["sender"], found["loop"] = sender, asyncio.get_running_loop()
        source.sender = sender
        for iteration in iterations:
            sender.announce(iteration)
        ready.set()
        if is_over is not None:
            await sender.trained(iterations[-1], 60)
            await sender.finish("enough", 20, is_over=is_over)
            await sender.close()
            return
        await done.wait()
        await sender.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield found["sender"], found["endpoint"]
    finally:
        if thread.is_alive():
            found["loop"].call_soon_threadsafe(done.set)
        thread.join(20)


def config_of(folder, output, endpoint, **more):
    source = {"path": "", "endpoint": endpoint, "deadline_s": 20.0} | more.pop("source", {})
    sections = {
        "source": source,
        "publish": {"root": str(folder / f"{output}-versions"), "canaries": 2},
        "numerics": {"kernels": "exact"},
    }
    return read_config(write_config(folder, output, **sections, **more))


def test_iterations_are_trained_acknowledged_and_dealt_anew_after_a_restart(folder):
    source = ListSource([[[3, 5], [0, 4]], [[2, 2]], [], [[6, 1], [1, 9]]])
    with an_engine(source, range(4)) as (sender, endpoint):
        train(config_of(folder, "online", endpoint, max_steps=1), lambda line: None)
        # three more are trained in another life of the trainer
        several = config_of(folder, "online", endpoint, max_steps=4, checkpoint={"every": 1})
        train(several, lambda line: None)
        # a checkpoint that is kept lacks the last
        assert source.released == 2
        assert sender.dealer.done_through == 3
        assert sender.dealer.trained[3].version == 4
        final = Checkpoint.open(folder / "online" / "final")
        assert sender.dealer.trained[3].digest == final.content_digest()
    versions = folder / "online-versions"
    assert sorted(path.name for path in versions.glob("v*")) == ["v3", "v4"]
    manifest = read_manifest(versions / "v4")
    assert (manifest.version, manifest.digest) == (4, final.content_digest())
    assert manifest.parent == read_manifest(versions / "v3").digest
    # in the engine's own kernels the trainer says what the engine says, to the bit
    weights = load_weights(
        Checkpoint.open(versions / "v4"), ModelConfig(), on_progress=lambda *_: None
    )
    assert len(manifest.canaries) == 2
    for canary in manifest.canaries:
        assert canary == make_canary(weights, canary.ids, canary.num_prompt)
    found = reports(folder / "online")
    assert [report["version"] for report in found] == [1, 2, 3, 4]
    # a response of no tokens counts
    assert [report["samples"] for report in found] == [4, 2, 0, 4]
    assert [report["trained_groups"] for report in found] == [2, 1, 0, 2]


class OfTwoLineages(ListSource):
    """From iteration 1 on the first member of a group is of version 1 as it was published, the second
    of a version 1 that was undone."""

    digest = None

    async def load(self, iteration, index):
        group = await super().load(iteration, index)
        while self.digest is None and 0 not in self.sender.dealer.trained:
            await asyncio.sleep(0.01)
        self.digest = self.digest or self.sender.dealer.trained[0].digest
        group.members[0].trajectory.segments = [Segment(0, 1, self.digest, "n", "c")]
        return group


def test_weights_of_an_undone_lineage_are_not_those_of_the_same_number(folder):
    source = OfTwoLineages([[], [[3, 5]], [[2, 6]]])
    with an_engine(source, range(3)) as (_, endpoint):
        exact = {"loss": {"old_policy": "exact"}, "checkpoint": {"every": 1}}
        for steps in (2, 3):
            # what is known of versions outlives the trainer
            config = config_of(folder, "lineages", endpoint, max_steps=steps, **exact)
            train(config, lambda line: None)
    _, first, second = reports(folder / "lineages")
    assert first["metrics"]["proximal_fraction"] == 5 / 8
    assert second["metrics"]["proximal_fraction"] == 6 / 8


def test_a_run_that_is_over_waits_for_no_engine(folder):
    source = ListSource([[[3, 5]], [[2, 2]]])
    with an_engine(source, range(2), is_over=True) as (_, endpoint):
        # the last iteration is in the checkpoint that is saved when it has ended
        config = config_of(folder, "over", endpoint, checkpoint={"every": 3})
        train(config, lambda line: None)
    final, said = folder / "over" / "final", []
    shutil.rmtree(final)
    train(config, said.append)
    assert said == [
        f"goes on from {folder / 'over' / 'checkpoints' / '00000002'}: 2 iterations were trained",
        f"the engine's run 'run' is over: nothing is left to train; the model is in {final}",
    ]
    assert (final / "model.safetensors").is_file()
    # an older checkpoint is another matter, and so is another run
    soon = {"source": replace(config.source, deadline_s=0.2)}
    for other in (
        soon | {"output": str(folder / "none")},
        {"source": replace(soon["source"], run="b")},
    ):
        with pytest.raises(PeerMissing, match="no engine answers"):
            train(replace(config, **other), said.append)


def test_what_max_steps_allows_is_trained_without_asking_an_engine(folder):
    with an_engine(ListSource([[[3, 5]]]), range(1), is_over=False) as (_, endpoint):
        config = config_of(folder, "enough", endpoint, max_steps=1)
        train(config, lambda line: None)
    said = []
    train(config, said.append)
    assert said[-1].startswith("max_steps is 1, and 1 iterations were trained: nothing is left to")
    # without that limit the run may go on one day: its engine did not say that it is over
    longer = replace(config, max_steps=None, source=replace(config.source, deadline_s=0.2))
    with pytest.raises(PeerMissing, match="no engine answers"):
        train(longer, said.append)


@pytest.mark.parametrize("name", ["a/b", "../a", ".", "-a", "a b", "", "x" * 65, "é"])
def test_a_run_s_name_is_part_of_a_folder_s(folder, name):
    with pytest.raises(ConfigError, match=r"source.run is .*; accepted: letters, digits"):
        config_of(folder, "named", "tcp://127.0.0.1:9", source={"run": name})


def test_who_waits_for_long_is_told_for_what(folder, monkeypatch):
    monkeypatch.setattr(sources, "_SOON_S", 0.1)
    said = []
    config = config_of(folder, "early", "tcp://127.0.0.1:9", source={"deadline_s": 0.3})
    with pytest.raises(PeerMissing, match=r"no engine answers at tcp://127.0.0.1:9 for 0 s"):
        train(config, said.append)
    assert said == ["waits for an engine at tcp://127.0.0.1:9, 0 s at most"]


def test_weights_older_than_what_was_acknowledged_are_refused(folder):
    with an_engine(ListSource([[], [], [[1, 2]]]), [2], acked=1) as (_, endpoint):
        config = config_of(folder, "older", endpoint)
        with pytest.raises(BridgeError, match="goes on with iteration 2, the weights here hold"):
            train(config, lambda line: None)


def test_one_source_is_named(folder):
    with pytest.raises(ConfigError, match=r"source.path .* or source.endpoint .*: set one"):
        config_of(folder, "both", "")
