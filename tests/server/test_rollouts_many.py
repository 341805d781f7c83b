"""Several rollouts in one request: each is accepted or refused for itself, read, waited for."""

import asyncio
import time

import msgspec
import pytest

from everstep.engine.config import JournalConfig
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.trajectory import decode, encode, pack, unpack
from everstep.server.rollouts.many import MOST_ENDED
from everstep.server.rollouts.wire import PackedRollouts

from .conftest import serve

pytestmark = pytest.mark.anyio
UNKNOWN = "ro-00000000000000000000000000000000"
MSGPACK = {"accept": "application/msgpack"}


async def submitted(server, *submissions):
    response = await server.post("/rollouts/submit", submissions=list(submissions))
    assert response.status_code == 202, response.text
    return response.json()["data"]


async def some(server, count: int) -> list[str]:
    outcomes = await submitted(server, *({"prompt": "Hi"} for _ in range(count)))
    return [outcome["rollout_ids"][0] for outcome in outcomes]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


# --- submit


async def test_each_is_accepted_or_refused_for_itself(durable):
    found = await submitted(
        durable,
        {"prompt": "Hi", "samples": 2, "group_id": "g"},
        {"prompt": "Hi", "sampling": {"top_p": 3}},
        {"prompt": "Hi", "tempo": 1},
        {"prompt_ids": [1], "sampling": {"max_tokens": 10**6}},
        {"prompt": "Hi", "model": "another"},
        {"prompt": "Hi", "idempotency_key": 7},
        {"prompt": "Hi", "sampling": None},
    )
    assert found[0]["group_id"] == "g"
    assert len(found[0]["rollout_ids"]) == 2
    assert len(found[6]["rollout_ids"]) == 1
    assert [(one["error"]["param"], one["error"]["code"]) for one in found[1:6]] == [
        ("sampling.top_p", "invalid_request_error"),
        ("tempo", "invalid_request_error"),
        ("sampling.max_tokens", "context_length_exceeded"),
        ("model", "model_not_found"),
        ("submissions[5].idempotency_key", "invalid_request_error"),
    ]
    assert len(durable.backend.adds) == 3


async def test_a_key_is_of_its_submission_however_it_comes(durable):
    mine = {"prompt": "Hi", "sampling": {"max_tokens": 4}}
    [first, other] = await submitted(
        durable, mine | {"idempotency_key": "k"}, mine | {"idempotency_key": "l"}
    )
    [again] = await submitted(durable, mine | {"idempotency_key": "k"})
    assert again == first | {"is_replay": True}
    alone = await durable.keyed("/rollouts", "l", **mine)
    assert alone.json()["rollout_ids"] == other["rollout_ids"]
    assert alone.headers["idempotent-replayed"] == "true"
    [reused] = await submitted(durable, {"prompt": "Ho", "idempotency_key": "k"})
    assert reused["error"]["code"] == "idempotency_key_reused"
    assert len(durable.backend.adds) == 2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "submissions"),
        ({"submissions": []}, "submissions"),
        ({"submissions": [3]}, "submissions[0]"),
        ({"submissions": [{}], "samples": 2}, "samples"),
    ],
)
async def test_a_request_of_another_shape_makes_nothing(durable, body, field):
    response = await durable.post("/rollouts/submit", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    keyed = await durable.keyed("/rollouts/submit", "k", submissions=[{"prompt": "Hi"}])
    assert keyed.status_code == 400
    assert "give each its own" in keyed.json()["error"]["message"]
    assert not durable.backend.adds


async def test_what_meets_all_answers_for_all_and_the_same_request_goes_on(anyio_backend):
    journal = MemoryJournal(JournalConfig(max_bytes=2**20))
    async with serve(journal=journal) as server:
        many = [
            {"prompt": "Hi", "metadata": "x" * 400_000, "idempotency_key": f"k{number}"}
            for number in range(4)
        ]
        ids = []
        for one in many[:3]:
            [outcome] = await submitted(server, one)
            ids += outcome["rollout_ids"]
            await server.ended(ids[-1])
        refused = await server.post("/rollouts/submit", submissions=many)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "journal_full"
        assert int(refused.headers["retry-after"]) >= 1
        await server.post("/rollouts/ack", ids=ids)
        found = await submitted(server, *many)
        # those that were accepted before are the same ones
        assert [one["rollout_ids"][0] for one in found[:3]] == ids
        assert [one.get("is_replay", False) for one in found] == [True, True, True, False]


async def test_without_a_journal_nothing_durable_is_taken(server):
    response = await server.post("/rollouts/submit", submissions=[{"prompt": "Hi"}])
    assert response.status_code == 503
    assert "--journal" in response.json()["error"]["message"]


# --- get


async def test_several_are_read_as_each_alone(durable):
    ids = await some(durable, 3)
    for rollout_id in ids:
        await durable.ended(rollout_id)
    response = await durable.post("/rollouts/get", ids=[*ids, UNKNOWN, ids[0]])
    body = response.json()
    alone = [(await durable.http.get(f"/rollouts/{one}")).json() for one in ids]
    assert sorted(body["data"], key=lambda one: one["id"]) == sorted(alone, key=lambda o: o["id"])
    assert body["unknown"] == {UNKNOWN: f"no rollout has the id {UNKNOWN!r}"}
    packed = await durable.http.post("/rollouts/get", json={"ids": ids}, headers=MSGPACK)
    assert packed.headers["content-type"] == "application/msgpack"
    for raw in msgspec.msgpack.decode(packed.content, type=PackedRollouts).data:
        rollout = unpack(decode(memoryview(raw)))
        single = await durable.http.get(f"/rollouts/{rollout.id}", headers=MSGPACK)
        assert encode(pack(rollout)) == single.content


async def test_one_that_was_acknowledged_is_said_so(durable):
    ids = await some(durable, 2)
    for rollout_id in ids:
        await durable.ended(rollout_id)
    await durable.post("/rollouts/ack", ids=ids[:1])
    body = (await durable.post("/rollouts/get", ids=ids)).json()
    assert [one["id"] for one in body["data"]] == ids[1:]
    assert "was acknowledged" in body["unknown"][ids[0]]


async def test_who_waits_gets_those_that_have_ended_once_one_has(durable):
    durable.backend.gate.clear()
    ids = await some(durable, 3)
    poll = asyncio.create_task(
        durable.http.post("/rollouts/get", json={"ids": ids}, params={"wait": 60})
    )
    await settle()
    assert not poll.done()
    await durable.post("/rollouts/cancel", ids=ids[1:2])
    body = (await asyncio.wait_for(poll, 10)).json()
    assert [(one["id"], one["state"]) for one in body["data"]] == [(ids[1], "aborted")]
    # those that ended before are there at once, and of the live ones nothing is said
    again = await durable.http.post("/rollouts/get", json={"ids": ids}, params={"wait": 60})
    assert again.json() == body
    began_s = time.monotonic()
    late = await durable.http.post("/rollouts/get", json={"ids": ids[:1]}, params={"wait": 0.05})
    assert late.json() == {"data": [], "unknown": {}}
    assert time.monotonic() - began_s >= 0.05
    unknown = await durable.http.post(
        "/rollouts/get", json={"ids": [ids[0], UNKNOWN]}, params={"wait": 60}
    )
    assert list(unknown.json()["unknown"]) == [UNKNOWN]
    assert not any(growth.bells for growth in durable.manager._holdings)


async def test_an_answer_to_who_waits_has_an_end(durable):
    ids = await some(durable, MOST_ENDED + 3)
    for rollout_id in ids:
        await durable.ended(rollout_id)
    left = set(ids)
    for count in (MOST_ENDED, 3):
        poll = await durable.http.post(
            "/rollouts/get", json={"ids": sorted(left)}, params={"wait": 60}
        )
        found = {one["id"] for one in poll.json()["data"]}
        assert len(found) == count
        left -= found
    assert not left


async def test_a_drain_lets_those_go_who_wait(durable):
    durable.backend.gate.clear()
    ids = await some(durable, 2)
    poll = asyncio.create_task(
        durable.http.post("/rollouts/get", json={"ids": ids}, params={"wait": 60})
    )
    await settle()
    durable.manager.drain()
    assert (await asyncio.wait_for(poll, 10)).status_code == 503
