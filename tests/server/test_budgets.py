"""/rollouts/budget: every route, with what it should take and what it must refuse."""

import asyncio

import msgspec
import pytest

from everstep import AsyncClient
from everstep.engine.errors import Conflict, InvalidRequest
from everstep.engine.journal.ops import Budget
from everstep.server.rollouts.wire import BudgetList

from .conftest import serve

pytestmark = pytest.mark.anyio
MSGPACK = {"accept": "application/msgpack", "content-type": "application/msgpack"}


def endless(server) -> None:
    """Rollouts that run to their max_tokens."""
    server.replies[:] = [[5]]


async def opened(server, pool="math", tokens=10, **headers) -> dict:
    response = await server.http.post(
        "/rollouts/budget", json={"pool": pool, "tokens": tokens}, headers=headers
    )
    assert response.status_code == 202, response.text
    return response.json()


async def waited(server, budget_id, wait=20) -> dict:
    response = await server.http.get(f"/rollouts/budget/{budget_id}", params={"wait": wait})
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_pool_grows_by_its_budget_and_then_waits(durable):
    endless(durable)
    budget = await opened(durable, tokens=25)
    assert (budget["pool"], budget["tokens"], budget["used"]) == ("math", 25, 0)
    assert (budget["state"], budget["ended_s"]) == ("open", None)
    sampling = {"max_tokens": 20, "ignore_eos": True}
    ids = await durable.submit(prompt="Hi", samples=3, pool="math", sampling=sampling)
    [chat] = await durable.submit(prompt="Hi", sampling=sampling)
    budget = await waited(durable, budget["id"])
    assert (budget["state"], budget["used"]) == ("spent", 25)
    assert budget["ended_s"] >= budget["created_s"]
    found = [(await durable.http.get(f"/rollouts/{i}")).json() for i in ids]
    assert sum(len(one["output_ids"]) for one in found) == 25
    assert [(one["state"], one["waits_for"]) for one in found] == [("paused", "budget")] * 3
    assert len((await durable.ended(chat))["output_ids"]) == 20

    again = await opened(durable, tokens=35)
    assert (await waited(durable, again["id"]))["used"] == 35
    assert all([len((await durable.ended(i))["output_ids"]) == 20 for i in ids])
    listed = (await durable.http.get("/rollouts/budget", params={"pool": "math"})).json()
    assert [(one["id"], one["state"]) for one in listed["data"]] == [
        (budget["id"], "spent"),
        (again["id"], "spent"),
    ]
    assert (await durable.http.get("/rollouts/budget?pool=other")).json() == {"data": []}


async def test_what_the_user_paused_says_so(durable):
    endless(durable)
    await opened(durable, tokens=3)
    durable.backend.gate.clear()
    [one] = await durable.submit(prompt="Hi", pool="math", sampling={"max_tokens": 20})
    await durable.post(f"/rollouts/{one}/pause")
    rollout = (await durable.http.get(f"/rollouts/{one}")).json()
    assert (rollout["state"], rollout["waits_for"]) == ("paused", "resume")


async def test_a_closed_budget_says_what_was_used_and_stops_the_pool(durable):
    endless(durable)
    durable.backend.step_s = 0.002
    budget = await opened(durable, tokens=1000)
    await durable.submit(prompt="Hi", samples=4, pool="math", sampling={"max_tokens": 400})
    while not (await durable.http.get(f"/rollouts/budget/{budget['id']}")).json()["used"]:
        await asyncio.sleep(0.001)
    closed = (await durable.post(f"/rollouts/budget/{budget['id']}/close")).json()
    assert closed["state"] == "closed"
    assert 0 < closed["used"] < 1000
    await asyncio.sleep(0.02)
    assert durable.backend.drawn["math"] == closed["used"]
    assert await waited(durable, budget["id"]) == closed
    # whoever says it again hears the same
    assert (await durable.post(f"/rollouts/budget/{budget['id']}/close")).json() == closed


async def test_the_same_key_gives_the_same_budget(durable):
    key = {"Idempotency-Key": "step-1"}
    first = await opened(durable, **key)
    assert await opened(durable, **key) == first
    other = await durable.keyed("/rollouts/budget", "step-1", pool="math", tokens=11)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    second = await durable.post("/rollouts/budget", pool="math", tokens=10)
    assert second.status_code == 409
    assert first["id"] in second.json()["error"]["message"]
    await opened(durable, pool="code")


async def test_budgets_are_said_in_msgpack_too(durable):
    body = msgspec.msgpack.encode({"pool": "math", "tokens": 4})
    response = await durable.http.post("/rollouts/budget", content=body, headers=MSGPACK)
    assert response.status_code == 202
    budget = msgspec.msgpack.decode(response.content, type=Budget)
    listed = await durable.http.get("/rollouts/budget", headers={"accept": MSGPACK["accept"]})
    assert msgspec.msgpack.decode(listed.content, type=BudgetList).data == [budget]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"pool": "math", "tokens": 0}, "tokens", "at least 1, got 0"),
        ({"pool": "math", "tokens": -5}, "tokens", "at least 1, got -5"),
        ({"pool": "math", "tokens": 1.5}, "tokens", "an integer"),
        ({"pool": "math"}, "tokens", "is required"),
        ({"pool": "", "tokens": 5}, "pool", "non-empty string"),
        ({"pool": "a b", "tokens": 5}, "pool", "got"),
        ({"tokens": 5}, "pool", "is required"),
        ({"pool": "math", "token": 5}, "token", "did you mean tokens"),
    ],
)
async def test_a_bad_body_is_400_and_opens_nothing(durable, body, field, words):
    response = await durable.http.post("/rollouts/budget", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert words in error["message"]
    assert (await durable.http.get("/rollouts/budget")).json() == {"data": []}


async def test_what_is_not_there_is_404_and_a_bad_query_400(durable):
    for response in (
        await durable.http.get("/rollouts/budget/bud-1"),
        await durable.http.get("/rollouts/budget/bud-1", params={"wait": 1}),
        await durable.post("/rollouts/budget/bud-1/close"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "budget_not_found")
    budget = await opened(durable)
    response = await durable.http.get(f"/rollouts/budget/{budget['id']}", params={"wait": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "wait")
    response = await durable.http.get("/rollouts/budget", params={"state": "open"})
    assert response.status_code == 400
    response = await durable.post(f"/rollouts/budget/{budget['id']}/close", tokens=5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_the_metrics_show_the_newest_budget_of_each_pool(durable):
    endless(durable)
    budget = await opened(durable, tokens=7)
    await durable.submit(prompt="Hi", pool="math", sampling={"max_tokens": 20})
    await waited(durable, budget["id"])
    text = (await durable.http.get("/metrics")).text
    assert 'everstep:budget_tokens_used{pool="math"} 7' in text
    assert 'everstep:budget_tokens{pool="math"} 7' in text


async def test_attempt_comes_back_untouched(durable):
    [one] = await durable.submit(prompt="Hi", attempt=3, sampling={"seed": 5})
    assert (await durable.ended(one))["attempt"] == 3
    response = await durable.post("/rollouts", prompt="Hi", attempt=-1)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "attempt")


async def test_the_client_opens_waits_and_closes(durable):
    endless(durable)
    client = AsyncClient("http://test", http=durable.http)
    budget = await client.open_budget("math", 12, idempotency_key="k")
    assert await client.open_budget("math", 12, idempotency_key="k") == budget
    with pytest.raises(Conflict, match="open budget"):
        await client.open_budget("math", 5)
    with pytest.raises(InvalidRequest, match="tokens must be"):
        await client.open_budget("code", 0)
    with pytest.raises(InvalidRequest, match="places"):
        await client.open_budget("code", 5, places=0)
    code = await client.open_budget("code", 5, places=3)
    assert (code.tokens, code.places, budget.places) == (5, 3, None)
    sampling = {"max_tokens": 10}
    group = await client.submit("Hi", samples=2, pool="math", attempt=1, sampling=sampling)
    found = await client.wait_budget(budget.id)
    assert (found.state, found.used) == ("spent", 12)
    assert sum([len((await client.get(i)).output_ids) for i in group.rollout_ids]) == 12
    other = await client.open_budget("math", 100)
    for rollout_id in group.rollout_ids:
        assert len((await client.wait(rollout_id)).output_ids) == 10
    assert (await client.wait_budget(other.id, timeout_s=0)).state == "open"
    closed = await client.close_budget(other.id)
    assert (closed.state, closed.used) == ("closed", 8)
    assert await client.budgets("math") == [found, closed]


async def test_without_a_journal_a_budget_is_opened_and_closed(anyio_backend):
    async with serve() as server:
        budget = await opened(server)
        assert (await waited(server, budget["id"], 0))["state"] == "open"
        closed = (await server.post(f"/rollouts/budget/{budget['id']}/close")).json()
        assert (closed["state"], closed["used"]) == ("closed", 0)
