"""A server as a host of versions: what `everstep rollout --server` asks of it, and its kills."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec
import pytest

from everstep.engine.checkpoint.manifest import Version, read_manifest
from everstep.engine.config import EngineConfig, KVConfig, ModelConfig
from everstep.engine.errors import ConfigError, EngineUnavailable, WeightsRefused
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.native import ThreadBackend
from everstep.engine.rollout import SamplingParams
from everstep.engine.trajectory import encode, pack
from everstep.rollout.http_engine import HttpEngine
from everstep.server.app import create_app
from everstep.server.config import HttpConfig, ServeConfig
from everstep.trainer_bridge.run.engine import Prompt, Work
from everstep.trainer_bridge.run.hosts import serve
from everstep.trainer_bridge.run.manager_engine import ManagerEngine
from tests.engine.flips import make_versions
from tests.engine.inline_backend import InlineBackend
from tests.fakes import make_version
from tests.listening import listening


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**given: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**given), 60))

    return run


class Lasting(MemoryJournal):
    """What the next life of a server opens again."""

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def server(
    store: Lasting, port: int = 0, **http: Any
) -> AsyncIterator[tuple[RolloutManager, int]]:
    manager = RolloutManager(InlineBackend(), None, journal=JournalThread(store), model_path="base")
    model = EngineConfig(model=ModelConfig(path="org/ring"))
    app = create_app(manager, None, ServeConfig(engine=model, http=HttpConfig(**http)))
    await manager.start()
    try:
        async with listening(app, port) as bound:
            yield manager, bound
    finally:
        await manager.close()


@contextlib.asynccontextmanager
async def engine(port: int, **given: Any) -> AsyncIterator[HttpEngine]:
    usual = {"wait_s": 10.0, "is_known": True, "is_trained": True}
    found = HttpEngine(f"http://127.0.0.1:{port}", **(usual | given))
    try:
        yield found
    finally:
        await found.close()


def version_of(folder: Path) -> Version:
    manifest = read_manifest(folder)
    assert manifest is not None
    return Version(number=manifest.version, digest=manifest.digest, folder=str(folder))


def make(folder: Path, number: int, **given: Any) -> Version:
    return version_of(
        make_version(folder / f"v{number}-{given.get('lineage', '')}", number, **given)
    )


@in_loop
async def test_a_version_is_given_to_two_servers_with_a_key(tmp_path: Path) -> None:
    async with (
        server(Lasting(), admin_key="admin") as (one, port),
        server(Lasting(), admin_key="admin") as (two, other_port),
        engine(port, admin_key="admin") as first,
        engine(other_port, admin_key="admin") as second,
    ):
        version = make(tmp_path, 4)
        served = await serve([first, second], version, "recompute")
        assert served.note.startswith("version 4 serves on 2 of 2 engines: staged in")
        assert one.version.digest == two.version.digest == version.digest
        assert await first.serves(version)
        # an answer that was lost is asked for again
        assert (await first.flip(version, "keep")).digest == version.digest
        # one of them cannot have the next: the other must not
        bad = make(tmp_path, 5)
        (Path(bad.folder) / "refuse").touch()
        with pytest.raises(WeightsRefused, match=rf"^{first.name}: ") as raised:
            await serve([first, second], bad, "keep")
        assert raised.value.tensor == "w"
        assert one.version.number == two.version.number == 4
        assert one.versions.staged is two.versions.staged is None


@in_loop
async def test_a_wrong_key_is_said_at_once() -> None:
    async with server(Lasting(), admin_key="admin") as (_, port), engine(port) as found:
        with pytest.raises(ConfigError, match=r"^http://127.* a valid admin key is required"):
            await found.serves(Version(number=1, digest="d", folder="/v1"))


@in_loop
async def test_a_new_lineage_is_gone_back_to_by_name(tmp_path: Path) -> None:
    async with server(Lasting()) as (manager, port), engine(port) as found:
        for number in (4, 5):
            await serve([found], make(tmp_path, number, lineage="a"), "keep")
        back = make(tmp_path, 4, lineage="b", content="other")
        assert "version 4 of a new lineage serves" in (await serve([found], back, "keep")).note
        assert (manager.version.number, manager.version.lineage) == (4, "b")
        await serve([found], make(tmp_path, 5, lineage="b", content="other"), "keep")
        assert (manager.version.number, manager.version.lineage) == (5, "b")


@in_loop
async def test_a_server_that_is_killed_between_stage_and_flip_stages_again(tmp_path: Path) -> None:
    store, version = Lasting(), make(tmp_path, 4)
    async with server(store) as (_, port), engine(port) as found:
        await found.stage(version)
    async with server(store, port) as (manager, _), engine(port) as found:
        flipped = await found.flip(version, "keep")
        assert (flipped.digest, manager.version.number) == (version.digest, 4)


@in_loop
async def test_a_version_of_the_same_number_and_another_lineage_is_no_version_of_it(
    tmp_path: Path,
) -> None:
    store = Lasting()
    mine = make(tmp_path, 4, lineage="b", content="other")
    async with server(store) as (manager, port), engine(port) as found:
        await serve([found], make(tmp_path, 4, lineage="a"), "keep")
        await found.stage(mine)
        await manager.versions.unstage()
        # its number serves already; its weights do not
        assert (await found.flip(mine, "keep")).digest == mine.digest
        assert manager.version.lineage == "b"


@in_loop
async def test_a_server_whose_weights_are_gone_is_there_for_a_trainer_alone(tmp_path: Path) -> None:
    store, version = Lasting(), make(tmp_path, 4)
    async with server(store) as (_, port), engine(port) as found:
        await serve([found], version, "keep")
    folder = Path(version.folder)
    (folder / "manifest.json").rename(tmp_path / "kept")
    folder.rmdir()
    async with server(store, port) as (manager, _):
        assert manager.versions.waiting_for is not None
        async with engine(port, is_trained=False, wait_s=0.1) as found:
            with pytest.raises(EngineUnavailable, match="waiting for the weights of version 4"):
                await found.start()
        async with engine(port) as found:
            assert (await found.start()).numerics
            assert not await found.serves(version)
            again = make(tmp_path, 4, lineage="b")
            await serve([found], again, "keep")
            assert manager.versions.waiting_for is None


@in_loop
async def test_what_comes_over_http_is_what_the_engine_here_would_give(
    tmp_path: Path,
) -> None:
    """Of a rollout that weights changed under: every column, segments and routes, to the bit."""
    folder, other = make_versions(tmp_path, 2)
    model = EngineConfig(
        model=ModelConfig(path=str(folder), max_model_len=128),
        kv=KVConfig(num_blocks=64),
        num_threads=1,
    )
    manager = RolloutManager(
        ThreadBackend(model), None, journal=JournalThread(Lasting()), model_path=str(folder)
    )
    app = create_app(manager, None, ServeConfig(engine=model))
    await manager.start()
    sampling = SamplingParams(
        max_tokens=40, ignore_eos=True, top_p=0.9, record=("kept_ids", "routing")
    )
    prompt = Prompt(id="p", prompt_ids=[5, 6, 7, 8], sampling=sampling, metadata={"n": [1, None]})
    work = Work(key="k", prompt=prompt, group_id="g", attempt=1, seed=7, pool="pool")
    async with listening(app) as port, engine(port) as over_http:
        here = ManagerEngine("here", manager, lambda _: [])
        try:
            budget = await over_http.open_budget("pool", 15, "b0", None)
            name = await over_http.submit(work)
            while (await over_http.budget(budget.id, 20.0)).is_open:
                pass
            await serve([over_http], version_of(other), "keep")
            assert await here.serves(version_of(other))
            await over_http.open_budget("pool", None, "b1", None)
            found, wanted = await over_http.ended(name), await here.ended(name)
            assert msgspec.structs.asdict(found) == msgspec.structs.asdict(wanted)
            assert encode(pack(found)) == encode(pack(wanted))
            assert [(s.version, s.kv) for s in found.segments] == [(0, "computed"), (1, "keep")]
            assert found.versions == [0] * 15 + [1] * 25
            assert len(found.kept_ids) == len(found.lp_raw) == 40
            assert found.routing_ids
            assert found.routing_weights
        finally:
            await manager.close()
