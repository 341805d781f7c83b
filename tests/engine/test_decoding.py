"""What is known of rollouts that decode: rows that stay, days, columns of a step."""

import random

import pytest

from everstep.engine.messages import Tokens
from everstep.engine.rollout import SamplingParams

from .arena import Arena, make_batch, make_kv

PROMPT = [1, 2, 3, 4, 5]


def make_arena(**kv_settings: int | bool) -> Arena:
    return Arena(make_kv(**kv_settings), make_batch())


def step(arena: Arena) -> tuple[list, Tokens]:
    """One step as a core does it: the plan's own rows, and what the front is told."""
    plan = arena.scheduler.schedule()
    messages = arena.scheduler.commit(plan, arena.runner.run(plan))
    arena.front.receive(messages)
    arena.scheduler.check_invariants()
    return plan.rows, next(m for m in messages if isinstance(m, Tokens))


def test_row_of_a_rollout_is_the_same_object_as_long_as_it_decodes():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=20)
    arena.step()
    [first], _ = step(arena)
    [second], _ = step(arena)
    assert second is first
    arena.scheduler.pause([a])
    arena.scheduler.resume([a])
    arena.step()
    [third], _ = step(arena)
    assert third is not first
    assert third.start == first.start


def test_rows_that_decode_come_before_chunks_and_show_the_newest_token():
    arena = Arena(make_kv(), make_batch(max_num_batched_tokens=6))
    a = arena.ask(PROMPT, max_tokens=20)
    arena.step(2)
    b = arena.ask([7] * 12, max_tokens=20)
    rows, _ = step(arena)
    assert [row.rollout_id for row in rows] == [a, b]
    plan = arena.scheduler.schedule()
    assert plan.rows[0].token_ids == [arena.rollout(a).output_ids[-1]]
    assert plan.rows[0].position == len(arena.rollout(a).output_ids)
    assert plan.rows[0].samples
    arena.front.receive(arena.scheduler.commit(plan, arena.runner.run(plan)))
    arena.finish()


def test_plain_tokens_come_as_columns_and_all_else_by_itself():
    arena = make_arena(prefix_caching=False)
    plain = [arena.ask(PROMPT, seed=seed, max_tokens=20) for seed in range(3)]
    detailed = arena.ask(PROMPT, max_tokens=20, sampling=SamplingParams(record=("lp_raw",)))
    short = arena.ask(PROMPT, seed=9, max_tokens=3)
    arena.step(2)
    _, tokens = step(arena)
    assert sorted(tokens.plain.rollout_ids) == plain
    assert sorted(t.rollout_id for t in tokens.rollouts) == [detailed, short]
    assert next(t.finish.type for t in tokens.rollouts if t.rollout_id == short) == "length"
    assert tokens.plain.starts == [2, 2, 2]
    ids = dict(zip(tokens.plain.rollout_ids, tokens.plain.draws.token_ids, strict=True))
    assert ids == {name: arena.rollout(name).output_ids[-1] for name in plain}
    arena.finish()


def test_steady_steps_hand_the_runners_columns_through():
    arena = make_arena()
    arena.ask(PROMPT, max_tokens=20)
    arena.step(2)
    plan = arena.scheduler.schedule()
    result = arena.runner.run(plan)
    [tokens] = arena.scheduler.commit(plan, result)
    assert tokens.plain.draws is result.draws


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("num_prompt", [1, 2, 3, 4, 5])
def test_blocks_bans_and_ends_fall_on_their_steps(block_size, num_prompt):
    arena = make_arena(block_size=block_size, num_blocks=200)
    a = arena.ask(
        PROMPT[:num_prompt],
        max_tokens=19,
        sampling=SamplingParams(min_tokens=11),
        stop_ids=[0, 1],
        seed=3,
    )
    arena.run()
    for plan in arena.plans[:-1]:
        [row] = plan.rows
        assert bool(row.banned_ids) == (row.position < 11)
    # the arena has compared the tokens, and the ending, with those of the rollout alone
    assert arena.state(a) == "finished"
    assert arena.scheduler.stats().num_blocks_used == 0


@pytest.mark.parametrize("call", ["cancel", "pause"])
def test_call_between_plan_and_result_finds_the_columns_in_order(call):
    rng = random.Random(5)
    arena = make_arena(num_blocks=200)
    names = [arena.ask(PROMPT, seed=seed, max_tokens=30) for seed in range(6)]
    arena.step(2)
    for _ in range(4):
        some = rng.sample(names, 1)
        act = arena.cancel if call == "cancel" else arena.scheduler.pause
        arena.step(in_flight=lambda some=some, act=act: act(some))
    arena.step()
    arena.finish()


def test_result_with_columns_of_another_length_is_caught():
    arena = make_arena()
    arena.ask(PROMPT, max_tokens=20)
    arena.step(2)
    plan = arena.scheduler.schedule()
    result = arena.runner.run(plan)
    result.draws.flags.append(1)
    with pytest.raises(AssertionError, match="columns"):
        arena.scheduler.commit(plan, result)


def test_client_is_charged_for_each_of_its_rollouts_that_decode():
    arena = Arena(make_kv(prefix_caching=False), make_batch(max_num_seqs=3))
    for _ in range(2):
        arena.ask([1], client="ann", max_tokens=30)
    arena.ask([1, 2, 3, 4, 5, 6], client="bob", max_tokens=10)
    arena.step(3)
    later = [arena.ask([1], client=client, max_tokens=2) for client in ("ann", "bob")]
    while arena.state(later[0]) == arena.state(later[1]) == "queued":
        arena.step()
    # 2 prompt tokens and 2 a step for ann, 6 and 1 a step for bob
    assert [arena.state(name) for name in later] == ["queued", "running"]


def test_client_is_not_charged_for_a_row_that_gave_way():
    arena = Arena(make_kv(prefix_caching=False), make_batch(max_num_seqs=2))
    arena.ask([1], client="ann", max_tokens=30)
    bobs = arena.ask([1], client="bob", max_tokens=30)
    arena.step(5)
    arena.ask([1], client="vip", priority=1, max_tokens=1)
    # as much served as the least served: bob
    cats = arena.ask([1], client="cat", max_tokens=30)
    arena.step()
    assert arena.state(bobs) == "preempted"
    arena.step()
    assert (arena.state(bobs), arena.state(cats)) == ("running", "queued")
