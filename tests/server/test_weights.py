"""/weights: every route, who may call it, and what the clients make of it."""

import asyncio
import contextlib
from types import SimpleNamespace

import httpx
import pytest

from everstep import AsyncClient
from everstep.engine.config import EngineConfig, ModelConfig
from everstep.engine.errors import ConfigError, StaleVersion, WeightsRefused
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Stage
from everstep.engine.rollout import SamplingParams
from everstep.server.app import create_app
from everstep.server.config import HttpConfig, ServeConfig
from tests.engine.inline_backend import InlineBackend
from tests.fakes import make_version

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def serve(**http):
    backend = InlineBackend()
    manager = RolloutManager(backend, None)
    model = EngineConfig(model=ModelConfig(path="org/ring"))
    app = create_app(manager, None, ServeConfig(engine=model, http=HttpConfig(**http)))
    await manager.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield SimpleNamespace(http=client, manager=manager, backend=backend)
    await manager.close()


async def test_a_version_is_staged_and_flipped_to(tmp_path):
    async with serve() as server:
        server.backend.steps_left = 2
        ask = Submission(prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=9))
        [rollout] = server.manager.submit(ask)
        await server.manager.wait(rollout.id, after=1)
        path = str(make_version(tmp_path, 4))
        staged = await server.http.post("/weights/stage", json={"path": path})
        assert (staged.status_code, staged.json()["version"]) == (200, 4)
        assert staged.json()["report"]["slices"] > 0
        known = (await server.http.get("/weights")).json()
        assert (known["current"]["number"], known["staged"]["number"]) == (1, 4)
        flipped = await server.http.post(
            "/weights/flip", json={"version": 4, "kv": "recompute-prompt"}
        )
        assert flipped.status_code == 200, flipped.text
        assert flipped.json()["flipped"]["kept_rollouts"] == 1
        known = (await server.http.get("/weights")).json()
        assert [one["number"] for one in known["history"]] == [1, 4]
        assert known["current"]["folder"] == path
        server.backend.steps_left = None
        done = await server.manager.wait(rollout.id)
        assert [(s.version, s.kv) for s in done.segments] == [
            (1, "computed"),
            (4, "recompute-prompt"),
        ]
        ready = (await server.http.get("/ready")).json()
        assert (ready["version"], ready["digest"]) == (4, staged.json()["digest"])


async def test_what_a_change_took_is_told_afterwards(tmp_path):
    async with serve() as server:
        known = (await server.http.get("/weights")).json()
        assert (known["last_staged"], known["last_flip"]) == (None, None)
        update = {"path": str(make_version(tmp_path, 4)), "priority": "full"}
        updated = (await server.http.post("/weights/update", json=update)).json()
        known = (await server.http.get("/weights")).json()
        assert known["last_staged"] == updated["staged"]
        assert known["last_flip"] == updated["flipped"]
        metrics = (await server.http.get("/metrics")).text
        for name in ("flip_steps_lost_total", "longest_slice_seconds", "flip_seconds_count"):
            assert f"everstep:weight_{name}" in metrics


@pytest.mark.parametrize("verb", ["stage", "update", "rollback"])
@pytest.mark.parametrize("priority", [None, "background", "full"])
async def test_the_priority_of_a_change_reaches_the_core(tmp_path, verb, priority):
    async with serve() as server:
        body = {"path": str(make_version(tmp_path, 4))}
        if verb == "rollback":
            body["version"] = 4
        if priority is not None:
            body["priority"] = priority
        answer = await server.http.post(f"/weights/{verb}", json=body)
        assert answer.status_code == 200, answer.text
        [order] = [message for message in server.backend.sent if isinstance(message, Stage)]
        assert order.priority == (priority or "background")


async def test_what_is_refused_says_why_and_names_the_tensor(tmp_path):
    async with serve() as server:
        (make_version(tmp_path / "4", 4) / "refuse").touch()
        refused = await server.http.post("/weights/update", json={"path": str(tmp_path / "4")})
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("weights_refused", "w")
        for path in (tmp_path, tmp_path / "none"):
            answer = await server.http.post("/weights/stage", json={"path": str(path)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "checkpoint_error")
        answer = await server.http.post("/weights/flip", json={"version": 4})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "illegal_state")
        assert (await server.http.get("/weights")).json()["current"]["number"] == 1


@pytest.mark.parametrize(
    ("verb", "body", "field"),
    [
        ("stage", {}, "path"),
        ("stage", {"path": ""}, "path"),
        ("flip", {"version": -1}, "version"),
        ("flip", {"version": 1, "kv": "drop"}, "kv"),
        ("stage", {"path": "/x", "priority": "low"}, "priority"),
        ("update", {"path": "/x", "kvs": "keep"}, "kvs"),
        ("rollback", {"version": "one"}, "version"),
        ("unstage", {"version": 1}, "version"),
    ],
)
async def test_a_wrong_field_is_named(verb, body, field):
    async with serve() as server:
        answer = await server.http.post(f"/weights/{verb}", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


async def test_the_admin_key_guards_weights_and_nothing_else():
    async with serve(api_key="user", admin_key="admin") as server:
        for key, status in ((None, 401), ("user", 401), ("admin", 200)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            answer = await server.http.get("/weights", headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.json()["error"]["code"] == "invalid_admin_key"
        admin = {"authorization": "Bearer admin"}
        assert (await server.http.get("/v1/models", headers=admin)).status_code == 401
        assert (await server.http.get("/health")).status_code == 200


async def test_without_an_admin_key_a_server_that_others_reach_refuses_admin_calls():
    async with serve(host="0.0.0.0", api_key="user") as server:
        user = {"authorization": "Bearer user"}
        for path in ("/weights", "/weights/stage"):
            answer = await server.http.post(path, json={"path": "/x"}, headers=user)
            assert answer.status_code == 403
            assert "--admin-key" in answer.json()["error"]["message"]


def test_one_key_for_both_is_refused():
    with pytest.raises(ConfigError, match=r"http\.admin_key"):
        ServeConfig(http=HttpConfig(api_key="one", admin_key="one")).check()


async def test_the_client_changes_and_rolls_back_weights(tmp_path):
    async with serve(admin_key="admin") as server:
        client = AsyncClient("http://test", admin_key="admin", http=server.http)
        paths = {n: str(make_version(tmp_path / f"{n}", n)) for n in (2, 3)}
        first = await client.update_weights(paths[2])
        assert (first.staged.version, first.flipped.version, first.lineage) == (2, 2, "")
        assert (await client.stage_weights(paths[3], priority="full")).version == 3
        assert server.backend.sent[-1].priority == "full"
        assert (await client.flip_weights(3, kv="recompute")).flipped.kv == "recompute"
        with pytest.raises(StaleVersion, match="backwards"):
            await client.update_weights(paths[2])
        assert (await client.stage_weights(paths[2], rollback=2)).version == 2
        assert (await client.unstage_weights()).staged is None
        back = await client.rollback_weights(2)
        assert back.lineage
        assert (await client.weights()).current.lineage == back.lineage
        (make_version(tmp_path / "9", 9, lineage=back.lineage) / "refuse").touch()
        with pytest.raises(WeightsRefused) as refused:
            await client.update_weights(str(tmp_path / "9"))
        assert refused.value.tensor == "w"


async def test_while_weights_are_missing_the_server_says_so_and_is_not_ready(tmp_path):
    async with serve() as server:
        folder = make_version(tmp_path / "4", 4)
        await server.manager.versions.update(str(folder))
        (folder / "manifest.json").unlink()
        folder.rmdir()
        server.backend.die()
        while server.manager.versions.waiting_for is None:
            await asyncio.sleep(0.01)
        ready = await server.http.get("/ready")
        assert ready.status_code == 503
        assert "waiting for the weights of version 4" in ready.json()["reason"]
        # it is there, for whoever has weights for it
        assert (ready.json()["ready"], ready.json()["waits_for"]) == (False, "weights")
        assert "version 4" in (await server.http.get("/weights")).json()["waiting_for"]
