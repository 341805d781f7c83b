"""The core as a process and as a thread: the same messages, the same bits, an end with its front."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from everstep.engine.config import EngineConfig, KVConfig, ModelConfig
from everstep.engine.core import core
from everstep.engine.errors import CheckpointError, ConfigError, EngineDied
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Died, Loading
from everstep.engine.native import ProcessBackend, ThreadBackend
from everstep.engine.rollout import SamplingParams
from everstep.engine.tokenizer import Tokenizer

from .flips import make_versions


def config_of(folder: Path, **model) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(folder), max_model_len=256, **model),
        kv=KVConfig(num_blocks=64),
        num_threads=1,
    )


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def generate(backend, folder, *, kill=False):
    manager = RolloutManager(backend, Tokenizer.from_folder(folder))
    await manager.start()
    try:
        rollouts = []
        for i in range(5):
            sampling = SamplingParams(max_tokens=24, seed=i, ignore_eos=True)
            rollouts += manager.submit(Submission(prompt_ids=[10, 20, 30 + i], sampling=sampling))
        if kill:
            while not rollouts[0].output_ids:
                await asyncio.sleep(0.001)
            os.kill(backend.pid, signal.SIGKILL)
        done = [await manager.wait(r.id) for r in rollouts]
        if kill:
            assert any(len(r.segments) == 2 for r in done), "the kill hit nothing"
        return [(r.output_ids, r.lp_sampled, r.lp_temp, r.kept_mass, r.text) for r in done]
    finally:
        await manager.close()


def test_a_thread_a_process_and_a_killed_process_give_the_same_bits(tiny_checkpoint):
    config = config_of(tiny_checkpoint)
    thread = asyncio.run(generate(ThreadBackend(config), tiny_checkpoint))
    process = asyncio.run(generate(ProcessBackend(config), tiny_checkpoint))
    killed = asyncio.run(generate(ProcessBackend(config), tiny_checkpoint, kill=True))
    assert thread == process == killed


@pytest.mark.parametrize("kind", [ThreadBackend, ProcessBackend])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"path": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all"),
        ({"max_model_len": 10**6}, ConfigError, "max_model_len"),
        ({"numerics": "w8a8"}, ConfigError, "w8a8"),
    ],
)
def test_a_start_that_cannot_work_keeps_its_kind_of_error(
    tiny_checkpoint, kind, change, error, match
):
    config = EngineConfig(
        model=ModelConfig(**{"path": str(tiny_checkpoint)} | change), num_threads=1
    )

    async def body():
        backend = kind(config)
        try:
            with pytest.raises(error, match=match) as caught:
                await backend.start()
            assert "\n" not in str(caught.value)
        finally:
            await backend.close()

    asyncio.run(body())


def test_a_core_killed_while_loading_is_reported(tiny_checkpoint):
    async def body():
        backend = ProcessBackend(config_of(tiny_checkpoint))
        starting = asyncio.create_task(backend.start())
        while backend.pid is None:
            await asyncio.sleep(0.01)
        os.kill(backend.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="ended with code -9"):
            await starting
        await backend.close()
        assert isinstance((await backend.receive())[0], Died)

    asyncio.run(body())


def test_loading_is_not_waited_for_where_nobody_wants_it_any_more(monkeypatch, tmp_path):
    def endless(config, on_loading, weights):
        for done in itertools.count():
            on_loading(Loading("read", done, 1 << 30))
            time.sleep(0.001)

    async def body():
        begun = asyncio.Event()
        backend = ThreadBackend(config_of(tmp_path), on_loading=lambda _: begun.set())
        starting = asyncio.create_task(backend.start())
        await begun.wait()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.wait_for(backend.close(), 30)

    monkeypatch.setattr(core, "build", endless)
    asyncio.run(body())


def test_a_core_whose_front_is_killed_ends_itself(tiny_checkpoint, tmp_path):
    code = textwrap.dedent(
        f"""
        import asyncio
        from pathlib import Path
        from everstep.engine.config import *
        from everstep.engine.native import ProcessBackend

        async def main():
            model = ModelConfig(path={str(tiny_checkpoint)!r}, max_model_len=64)
            backend = ProcessBackend(EngineConfig(model=model, num_threads=1))
            await backend.start()
            Path({str(tmp_path / "pid")!r}).write_text(str(backend.pid))
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    front = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline, "the core never came up"
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
    finally:
        front.kill()
        front.wait()
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, "the core outlived its front"
        time.sleep(0.05)


def test_a_core_that_is_killed_after_a_swap_comes_back_with_the_swapped_version(tmp_path):
    """A process, real weights, and a rollout that lives through both."""

    async def body():
        first, second = make_versions(tmp_path, 2)
        backend = ProcessBackend(config_of(first))
        manager = RolloutManager(backend, None, model_path=str(first))
        await manager.start()
        try:
            sampling = SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
            [rollout] = manager.submit(Submission(prompt_ids=[10, 20, 30], sampling=sampling))
            await manager.pause([rollout.id])
            _, flipped = await manager.versions.update(str(second), "recompute")
            pid = backend.pid
            os.kill(pid, signal.SIGKILL)
            await manager.resume([rollout.id])
            done = await manager.wait(rollout.id)
            assert backend.pid != pid
            assert (done.segments[-1].version, done.segments[-1].digest) == (1, flipped.digest)
            assert manager.info.digest == flipped.digest
            return done
        finally:
            await manager.close()

    done = asyncio.run(body())
    if len(done.segments) == 1:
        # nothing was drawn under the first weights: it is a rollout of the second
        assert set(done.versions) == {1}
