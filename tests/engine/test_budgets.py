"""Token budgets of pools, claim by claim; test_durable_machine.py has them in random histories."""

import asyncio
import contextlib
from functools import partial

import pytest

from everstep.engine.errors import (
    Conflict,
    Draining,
    InvalidRequest,
    JournalFull,
    KeyReused,
    UnknownBudget,
)
from everstep.engine.journal.ops import RequestKey
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.rollout import RolloutState, SamplingParams

from .arena import make_batch, make_kv
from .durable_world import World, alone, fake_core, half_tokenizer
from .inline_backend import InlineBackend

POOL = "math"


@pytest.fixture
def world():
    loop = asyncio.new_event_loop()
    kv = make_kv(num_blocks=200)
    running = World(loop, partial(fake_core, kv, make_batch()), half_tokenizer())
    yield running
    running.close()
    loop.close()


def ask(world: World, *, samples: int = 1, max_tokens: int = 20, pool: str = POOL, **sampling):
    """Ids of durable rollouts, whose prompts share nothing."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    work = [
        Submission(prompt_ids=[number, 1, 2], sampling=params, pool=pool)
        for number in range(samples)
    ]
    return world.do(world.manager.accept(work)).rollout_ids


def opened(world: World, tokens: int, pool: str = POOL) -> str:
    return world.do(world.manager.budgets.open(pool, tokens)).id


def step(world: World, count: int) -> None:
    """Steps, journaled and shown."""
    world.step(count)
    world.journal.pump()
    world.settle()


def rest(world: World) -> None:
    """Until nothing moves any more."""
    idle = 0
    while idle < 3:
        idle = 0 if world.step() or world.journal.pending else idle + 1
        world.journal.pump()
        world.settle()


def lengths(world: World, ids) -> list[int]:
    return [len(world.do(world.manager.find(one)).output_ids) for one in ids]


def state_of(world: World, budget_id: str) -> tuple[int, str]:
    budget = world.manager.budgets.get(budget_id)
    return budget.used, str(budget.state)


def key(name: str = "k", body: str = "b") -> RequestKey:
    return RequestKey(holder="", route="/rollouts/budget", key=name, body_digest=body)


# --- open, spent, closed


def test_a_pool_grows_by_exactly_its_budget_and_others_go_on(world):
    budget = opened(world, 25)
    ids, chat = ask(world, samples=3), ask(world, pool="")
    rest(world)
    assert sum(lengths(world, ids)) == 25
    assert lengths(world, chat) == [20]
    assert state_of(world, budget) == (25, "spent")
    for one in ids:
        assert world.manager.get(one).state is RolloutState.PAUSED
        assert world.manager.waits_for(world.manager.get(one)) == "budget"
    more = opened(world, 100)
    rest(world)
    assert lengths(world, ids) == [20] * 3
    assert state_of(world, more) == (35, "open")
    for one in ids:
        rollout = world.do(world.manager.find(one))
        assert rollout.output_ids == alone(rollout)[0]


@pytest.mark.parametrize("death", ["", "core", "front"])
def test_as_many_run_at_once_as_a_budget_has_places_whatever_dies(world, death):
    budget = world.do(world.manager.budgets.open(POOL, 100, places=2))
    ids = ask(world, samples=5, max_tokens=10)
    step(world, 4)
    assert lengths(world, ids) == [4, 4, 0, 0, 0]
    assert world.manager.waits_for(world.manager.get(ids[2])) == "budget"
    if death == "core":
        world.kill_core()
    elif death == "front":
        world.kill_front(0)
    assert world.manager.budgets.get(budget.id).places == 2
    for _ in range(20):
        step(world, 1)
        found = lengths(world, ids)
        assert found == sorted(found, reverse=True)
        assert sum(0 < length < 10 for length in found) <= 2
    rest(world)
    assert lengths(world, ids) == [10] * 5
    assert world.do(world.manager.budgets.close(budget.id)).used == 50


def test_places_are_those_of_the_open_budget(world):
    world.do(world.manager.budgets.open(POOL, 6, places=1))
    ids = ask(world, samples=3)
    rest(world)
    assert lengths(world, ids) == [6, 0, 0]
    opened(world, 9)
    rest(world)
    assert lengths(world, ids) == [9, 3, 3]


def test_a_metered_pool_stands_still_without_a_budget(world):
    closed = opened(world, 5)
    assert world.do(world.manager.budgets.close(closed)).used == 0
    ids = ask(world)
    rest(world)
    assert lengths(world, ids) == [0]
    world.kill_front(0)
    rest(world)
    assert lengths(world, ids) == [0]
    assert world.manager.waits_for(world.manager.get(ids[0])) == "budget"


def test_one_budget_is_open_at_a_time(world):
    budget = opened(world, 5)
    with pytest.raises(Conflict, match=f"{budget}, with 0 of 5 tokens used"):
        opened(world, 5)
    opened(world, 5, pool="code")
    world.do(world.manager.budgets.close(budget))
    opened(world, 6)
    assert [(b.pool, b.tokens) for b in world.manager.budgets.of()] == [
        (POOL, 5),
        ("code", 5),
        (POOL, 6),
    ]
    assert [b.tokens for b in world.manager.budgets.of(POOL)] == [5, 6]


@pytest.mark.parametrize(
    ("pool", "tokens", "places", "field"),
    [("", 5, 1, "pool"), (POOL, 0, 1, "tokens"), (POOL, 5, 0, "places")],
)
def test_what_is_no_budget_is_refused_and_nothing_changes(world, pool, tokens, places, field):
    with pytest.raises(InvalidRequest) as error:
        world.do(world.manager.budgets.open(pool, tokens, places=places))
    assert error.value.field == field
    assert world.manager.budgets.of() == []
    for call in (world.manager.budgets.close, world.manager.budgets.wait):
        with pytest.raises(UnknownBudget, match="bud-1"):
            world.do(call("bud-1"))


def test_a_key_gives_the_same_budget_also_after_a_kill(world):
    first = world.do(world.manager.budgets.open(POOL, 5, key()))
    assert world.do(world.manager.budgets.open(POOL, 5, key())) == first
    world.kill_front(0)
    again = world.do(world.manager.budgets.open(POOL, 5, key()))
    assert (again.id, again.used) == (first.id, 0)
    with pytest.raises(KeyReused):
        world.do(world.manager.budgets.open(POOL, 5, key(body="other")))


# --- what is in flight


def test_tokens_beyond_a_stop_string_are_given_to_the_core_again(world):
    # of every seed the front finds the stop string while the core runs ahead
    budget = opened(world, 30)
    ids = ask(world, samples=8, max_tokens=12, stop=("a", "b", "é"))
    world.run_ahead(4)
    world.backend.hear()
    rest(world)
    assert world.backend.core.scheduler._roster.meters._by_pool[POOL].drawn > 30 - 8
    ids += ask(world, samples=4)
    rest(world)
    assert state_of(world, budget) == (30, "spent")
    assert sum(lengths(world, ids)) == 30


def test_tokens_of_a_cancelled_rollout_that_were_on_their_way_do_not_count(world):
    budget = opened(world, 12)
    [one, two] = ask(world, samples=2)
    step(world, 2)
    world.run_ahead(3)
    world.do(world.manager.cancel([one]))
    assert state_of(world, budget)[0] == 4
    rest(world)
    assert lengths(world, [one, two]) == [2, 10]
    assert state_of(world, budget) == (12, "spent")


def test_what_a_dead_core_drew_unheard_is_drawn_by_the_next(world):
    budget = opened(world, 12)
    ids = ask(world, samples=2)
    step(world, 2)
    world.run_ahead(3)
    world.kill_core()
    assert state_of(world, budget)[0] == 4
    rest(world)
    assert state_of(world, budget) == (12, "spent")
    assert sum(lengths(world, ids)) == 12


def test_a_closed_budget_counts_what_was_on_its_way(world):
    budget = opened(world, 50)
    ids = ask(world, samples=2)
    step(world, 2)
    world.run_ahead(3)
    closed = world.do(world.manager.budgets.close(budget))
    assert (closed.used, closed.state) == (10, "closed")
    assert sum(lengths(world, ids)) == 10
    rest(world)
    assert sum(lengths(world, ids)) == 10
    assert world.do(world.manager.budgets.close(budget)) == closed


def test_a_budget_that_is_spent_while_it_is_closed_is_spent(world):
    budget = opened(world, 4)
    ask(world, samples=2)
    world.run_ahead(3)
    assert world.do(world.manager.budgets.close(budget)).state == "spent"


def test_the_first_budget_counts_nothing_that_was_drawn_before(world):
    ids = ask(world, samples=2)
    step(world, 2)
    world.run_ahead(3)
    budget = opened(world, 6)
    assert sum(lengths(world, ids)) == 10
    assert state_of(world, budget) == (0, "open")
    rest(world)
    assert sum(lengths(world, ids)) == 16
    assert state_of(world, budget) == (6, "spent")


# --- kills, a full disk, the user


def test_a_budget_goes_on_after_a_kill_with_what_the_journal_says(world):
    budget = opened(world, 30)
    ids = ask(world, samples=2)
    step(world, 2)
    # 2 steps are journaled, and nobody was told; 2 more are not journaled
    world.run_ahead(2)
    world.backend.hear()
    world.settle()
    world.journal.pump(2, is_told=False)
    world.run_ahead(2)
    world.kill_front(0)
    used, state = state_of(world, budget)
    assert state == "open"
    assert used == sum(lengths(world, ids)) == world.store.used[budget]
    rest(world)
    assert state_of(world, budget) == (30, "spent")
    assert sum(lengths(world, ids)) == 30


def test_while_the_disk_is_full_no_budget_is_opened_and_none_grows(world):
    budget = opened(world, 30)
    ids = ask(world, samples=2)
    step(world, 2)
    world.journal.stall("no space left")
    world.settle()
    used = state_of(world, budget)[0]
    world.step(3)
    assert state_of(world, budget)[0] == used
    for call in (world.manager.budgets.open("code", 5), world.manager.budgets.close(budget)):
        with pytest.raises(JournalFull):
            world.do(call)
    assert world.manager.budgets.of("code") == []
    world.journal.stall(None)
    world.settle()
    rest(world)
    assert state_of(world, budget) == (30, "spent")
    assert sum(lengths(world, ids)) == 30


def test_a_pool_whose_first_budget_could_not_be_opened_is_not_metered(world):
    ids = ask(world, samples=2)
    world.run_ahead(2)
    world.begin(world.manager.budgets.open(POOL, 5))
    # the core has been told to stop; before it is heard the disk is full
    world.journal.stall("no space left")
    world.backend.hear()
    world.settle()
    assert world.manager.budgets.of() == []
    world.journal.stall(None)
    world.settle()
    rest(world)
    assert lengths(world, ids) == [20, 20]


def test_what_the_user_paused_leaves_the_budget_to_the_others(world):
    [one, two] = ask(world, samples=2)
    world.do(world.manager.pause([one]))
    budget = opened(world, 10)
    rest(world)
    assert lengths(world, [one, two]) == [0, 10]
    assert world.manager.waits_for(world.manager.get(one)) == "resume"
    assert state_of(world, budget) == (10, "spent")
    # his resume is not a budget
    world.do(world.manager.resume())
    rest(world)
    assert lengths(world, [one, two]) == [0, 10]
    assert world.manager.waits_for(world.manager.get(one)) == "budget"


def test_forks_and_imports_count_only_what_they_grow_by(world):
    opened(world, 6)
    [one] = ask(world)
    rest(world)
    budget = opened(world, 7)
    world.do(world.manager.pause([one]))
    [fork] = world.do(world.manager.fork(one, 4, pool=POOL)).rollout_ids
    trajectory = world.do(world.manager.export(one))
    trajectory.id = "ro-imported"
    trajectory.state = RolloutState.QUEUED
    [copy] = world.do(world.manager.import_(trajectory)).rollout_ids
    rest(world)
    assert state_of(world, budget) == (7, "spent")
    assert sum(lengths(world, [fork, copy])) == 4 + 6 + 7


def test_a_fork_counts_on_no_budget_unless_it_is_named(world):
    budget = opened(world, 6)
    [one] = ask(world)
    rest(world)
    [fork] = world.do(world.manager.fork(one, 4)).rollout_ids
    rest(world)
    assert len(world.do(world.manager.find(fork)).output_ids) > 6
    assert state_of(world, budget) == (6, "spent")


# --- waiting; without a journal


def test_who_waits_hears_of_the_end_of_the_time_and_of_the_server(world):
    budget = opened(world, 4)
    assert world.do(world.manager.budgets.wait(budget, 0.01)).state == "open"
    waiting = world.loop.create_task(world.manager.budgets.wait(budget))
    ask(world)
    rest(world)
    assert world.loop.run_until_complete(waiting).state == "spent"
    waiting = world.loop.create_task(world.manager.budgets.wait(opened(world, 4)))
    world.settle()
    world.manager.drain()
    with pytest.raises(Draining):
        world.loop.run_until_complete(waiting)
    with pytest.raises(Draining):
        opened(world, 4, pool="code")


@pytest.mark.timeout(60)
def test_a_server_ends_while_a_budget_is_being_closed(world):
    budget = opened(world, 50)
    ask(world)
    world.run_ahead(2)
    # the core has answered, and the front will not hear of it any more
    world.begin(world.manager.budgets.close(budget))
    world.close()
    # not closed in the journal, then: no token of it came in
    assert [b.state for b in world.store.recover().budgets] in (["open"], ["closed"])
    world.start()
    assert world.manager.budgets.get(budget).used == world.store.used[budget] == 0


def test_a_pool_holds_only_durable_rollouts_where_there_is_a_journal(world):
    work = Submission(prompt_ids=[0, 1], sampling=SamplingParams(max_tokens=4), pool=POOL)
    with pytest.raises(InvalidRequest) as error:
        world.manager.submit(work)
    assert error.value.field == "pool"


@contextlib.asynccontextmanager
async def unjournaled():
    backend = InlineBackend()
    manager = RolloutManager(backend, None)
    await manager.start()
    try:
        yield manager, backend
    finally:
        await manager.close()


def submitted(manager: RolloutManager, samples: int = 1, pool: str = POOL) -> list:
    sampling = SamplingParams(max_tokens=20)
    work = Submission(prompt_ids=[0, 1, 2], sampling=sampling, samples=samples, pool=pool)
    return manager.submit(work)


def test_budgets_work_without_a_journal():
    async def body() -> None:
        async with unjournaled() as (manager, backend):
            budget = await manager.budgets.open(POOL, 27, key())
            assert (await manager.budgets.open(POOL, 27, key())).id == budget.id
            rollouts, [chat] = submitted(manager, 3), submitted(manager, pool="")
            assert (await manager.budgets.wait(budget.id)).state == "spent"
            assert sum(len(one.output_ids) for one in rollouts) == 27
            assert len((await manager.wait(chat.id)).output_ids) == 20

            budget = await manager.budgets.open(POOL, 20)
            while manager.budgets.get(budget.id).used < 3:
                await asyncio.sleep(0)
            backend.die()
            assert (await manager.budgets.wait(budget.id)).used == 20
            assert sum(len(one.output_ids) for one in rollouts) == 47

            budget = await manager.budgets.open(POOL, 1000)
            while manager.budgets.get(budget.id).used < 3:
                await asyncio.sleep(0)
            closed = await manager.budgets.close(budget.id)
            assert (closed.state, closed.used) == ("closed", manager.budgets.get(budget.id).used)
            assert sum(len(one.output_ids) for one in rollouts) == 47 + closed.used

    asyncio.run(body())


def test_a_budget_may_be_opened_while_the_core_is_started_again():
    async def body() -> None:
        async with unjournaled() as (manager, backend):
            rollouts = submitted(manager, 2)
            backend.start_failures = 2
            backend.die()
            while manager._core._info is not None:
                await asyncio.sleep(0)
            before = sum(len(one.output_ids) for one in rollouts)
            budget = await manager.budgets.open(POOL, 9)
            assert (await manager.budgets.wait(budget.id)).used == 9
            assert sum(len(one.output_ids) for one in rollouts) == before + 9

    asyncio.run(body())
