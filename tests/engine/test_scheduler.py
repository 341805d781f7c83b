"""The scheduler's claims, one by one, over the fake runner that checks every read."""

from collections import Counter

import pytest

from everstep.engine.core.plan import RowResult, StepPlan
from everstep.engine.errors import ContextTooLong, InvalidRequest
from everstep.engine.messages import Tokens
from everstep.engine.rollout import SamplingParams

from .arena import Arena, make_batch, make_kv

PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
OTHER = [5, 4, 3, 2, 1, 0, 5, 4, 3, 2]


def make_arena(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    **kv_settings: int | bool,
) -> Arena:
    batch = make_batch(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return Arena(make_kv(**kv_settings), batch)


def rows(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """rollout → positions of its row."""
    return {row.rollout_id: (row.start, row.start + len(row.token_ids)) for row in plan.rows}


# one path for prompt, chunk and decode


def test_prompt_is_computed_in_chunks_then_decoded_one_by_one():
    arena = make_arena(max_num_batched_tokens=4)
    a = arena.ask(PROMPT, max_tokens=3)
    arena.run()
    spans = [rows(plan)[a] for plan in arena.plans if plan.rows]
    assert spans == [(0, 4), (4, 8), (8, 10), (10, 11), (11, 12)]
    assert [row.samples for plan in arena.plans for row in plan.rows] == [False, False, *[True] * 3]
    assert [row.position for plan in arena.plans for row in plan.rows if row.samples] == [0, 1, 2]


def test_decode_rows_come_before_the_chunk_of_a_long_prompt():
    arena = make_arena(max_num_batched_tokens=4, prefix_caching=False)
    a = arena.ask([1], max_tokens=12)
    b = arena.ask([2], max_tokens=12)
    arena.step()
    c = arena.ask(OTHER * 3, max_tokens=1)
    for step in range(10):
        plan = arena.step()
        assert [row.rollout_id for row in plan.rows] == [a, b, c]
        assert rows(plan)[c] == (2 * step, 2 * step + 2)


def test_last_token_is_never_computed_and_needs_no_block():
    arena = make_arena(num_blocks=2, max_model_len=5)
    arena.ask([1], max_tokens=4)
    arena.run()
    assert arena.runner.num_computed_tokens == 4


def test_rows_show_the_live_lists_without_copying_them():
    arena = make_arena()
    arena.ask(PROMPT, max_tokens=3)
    first, second = arena.step().rows[0], arena.step().rows[0]
    assert first.all_ids is second.all_ids
    assert first.block_table is second.block_table


def test_stop_ids_are_banned_until_min_tokens():
    arena = make_arena()
    sampling = SamplingParams(min_tokens=2)
    arena.ask(PROMPT, max_tokens=3, sampling=sampling, stop_ids=[0, 1, 2, 3, 4])
    banned = [plan.rows[0].banned_ids for plan in [arena.step(), arena.step(), arena.step()]]
    assert banned == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], []]


# endings


def test_stop_id_ends_a_rollout_and_is_named():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=40, stop_ids=[0, 3])
    arena.run()
    finish = arena.rollout(a).finish_reason
    assert finish.type == "stop"
    assert finish.matched == arena.rollout(a).output_ids[-1]
    assert len(arena.rollout(a).output_ids) < 40


def test_id_that_is_no_stop_id_does_not_end_a_rollout():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=40)
    arena.run()
    assert arena.rollout(a).finish_reason.type == "length"
    assert len(arena.rollout(a).output_ids) == 40


def test_nonfinite_row_fails_its_rollout_alone_and_its_blocks_are_shared_with_nobody():
    arena = make_arena()
    a = arena.ask(PROMPT)
    b = arena.ask(OTHER)
    arena.step(2)
    arena.runner.nonfinite.add(a)
    arena.step()
    assert arena.state(a) == "failed"
    assert arena.rollout(a).finish_reason.type == "error"
    assert arena.rollout(a).finish_reason.detail.startswith("nonfinite: step 3")
    assert len(arena.rollout(a).output_ids) == 2
    c = arena.ask(PROMPT)
    arena.run()
    assert arena.rollout(c).num_cached_tokens == 0
    assert [arena.state(r) for r in (b, c)] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("add", "error", "match"),
    [
        ({"prompt_ids": [1] * 10, "max_tokens": 55}, ContextTooLong, "65 tokens.*holds 64.*54"),
        ({"prompt_ids": [1] * 10, "max_tokens": 40}, ContextTooLong, "13 KV blocks.*are 8"),
        ({"prompt_ids": [], "max_tokens": 4}, InvalidRequest, "empty"),
        ({"prompt_ids": [1], "max_tokens": 2, "output_ids": [5, 5]}, InvalidRequest, "ended"),
        (
            {"prompt_ids": [1], "max_tokens": 9, "output_ids": [5], "stop_ids": [5]},
            InvalidRequest,
            "ended",
        ),
    ],
)
def test_rollout_that_can_never_run_is_refused_with_its_figures(add, error, match):
    arena = make_arena(num_blocks=9)
    with pytest.raises(error, match=match):
        arena.ask(**add)
    assert arena.scheduler.stats().num_waiting == 0


def test_live_id_cannot_be_added_twice():
    arena = make_arena()
    arena.ask(PROMPT, "a")
    with pytest.raises(ValueError, match="live"):
        arena.ask(OTHER, "a")


# prefixes


def test_group_computes_its_prompt_once():
    arena = make_arena(max_num_batched_tokens=512)
    group = [arena.ask(PROMPT, seed=seed, max_tokens=3) for seed in range(8)]
    arena.run()
    # the prompt once, its last token for each of the others, two more tokens for each
    assert arena.runner.num_computed_tokens == 10 + 7 + 8 * 2
    assert [arena.rollout(r).num_cached_tokens for r in group] == [0, *[9] * 7]
    stats = arena.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (80, 63)
    assert stats.prompt_tokens_total == 80
    assert stats.generation_tokens_total == 24


def test_group_waits_for_a_prompt_that_takes_several_steps():
    arena = make_arena(max_num_batched_tokens=4)
    a, b = arena.ask(PROMPT, seed=0), arena.ask(PROMPT, seed=1)
    arena.step(3)
    assert all(list(rows(plan)) == [a] for plan in arena.plans)
    assert rows(arena.step()) == {a: (10, 11), b: (9, 10)}


@pytest.mark.parametrize("how", ["pause", "cancel"])
def test_group_goes_ahead_when_the_one_that_computes_its_prompt_stops(how):
    arena = make_arena(max_num_batched_tokens=4)
    a, b = arena.ask(PROMPT, seed=0), arena.ask(PROMPT, seed=1)
    arena.step()
    arena.scheduler.pause([a]) if how == "pause" else arena.cancel([a])
    assert rows(arena.step()) == {b: (4, 8)}
    arena.finish()


def test_unrelated_prompt_does_not_wait():
    arena = make_arena()
    a, b = arena.ask(PROMPT), arena.ask(OTHER)
    assert set(rows(arena.step())) == {a, b}


def test_prompt_with_little_in_common_does_not_wait():
    arena = make_arena()
    a, b = arena.ask(PROMPT), arena.ask([*PROMPT[:3], *OTHER])
    assert set(rows(arena.step())) == {a, b}


def test_more_important_rollout_does_not_wait_for_a_less_important_one():
    arena = make_arena(max_num_batched_tokens=4)
    arena.ask(PROMPT, priority=0)
    arena.step()
    b = arena.ask(PROMPT, priority=1)
    arena.step()
    assert arena.state(b) == "running"
    arena.finish()


def test_rollout_that_reports_every_row_reads_no_prefix_and_gives_one():
    for sampling in (SamplingParams(prompt_logprobs=0), SamplingParams(record=("routing",))):
        arena = make_arena()
        arena.ask(PROMPT)
        arena.run()
        b = arena.ask(PROMPT, sampling=sampling)
        assert rows(arena.step()) == {b: (0, 10)}
        arena.run()
        assert arena.rollout(b).num_cached_tokens == 0
        arena = make_arena()
        arena.ask(PROMPT, sampling=sampling)
        arena.run()
        c = arena.ask(PROMPT)
        assert rows(arena.step()) == {c: (9, 10)}


def test_without_prefix_caching_each_computes_its_prompt():
    arena = make_arena(prefix_caching=False)
    a, b = arena.ask(PROMPT), arena.ask(PROMPT)
    assert rows(arena.step()) == {a: (0, 10), b: (0, 10)}


def test_new_version_finds_nothing_of_the_old_one_and_live_rollouts_keep_their_kv():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=6)
    arena.step(2)
    arena.flip(2)
    b = arena.ask(PROMPT, max_tokens=2)
    plan = arena.step()
    assert rows(plan) == {a: (11, 12), b: (0, 10)}
    arena.run()
    assert arena.rollout(a).versions == [1, 1, 2, 2, 2, 2]
    assert arena.rollout(b).versions == [2, 2]


def test_rows_computed_under_other_weights_than_announced_are_shared_with_nobody():
    arena = make_arena()
    arena.runner.set_version(2, "v2")
    arena.ask(PROMPT)
    arena.run()
    b = arena.ask(PROMPT)
    arena.run()
    assert arena.rollout(b).num_cached_tokens == 0


def test_a_block_is_written_again_once_though_what_stands_before_it_has_copies():
    """Two that report every row compute the same blocks; of each the index keeps who came first,
    so a third shares the first block of the one and the second of the other."""
    arena = make_arena(max_num_batched_tokens=6)
    every_row = SamplingParams(prompt_logprobs=0)
    prompt = [*PROMPT[:9]]
    b = arena.ask(prompt, max_tokens=30, sampling=every_row)
    arena.step()
    c = arena.ask(prompt, max_tokens=30, seed=1, start_paused=True)
    a = arena.ask(prompt, max_tokens=30, priority=1, sampling=every_row)
    arena.step(8)
    arena.scheduler.resume([c])
    arena.step(2)
    tables = {row.rollout_id: row.block_table for row in arena.step().rows}
    assert (tables[c][0], tables[c][1]) == (tables[b][0], tables[a][1])
    assert tables[a][0] != tables[b][0]
    arena.flip(2, "recompute-prompt")
    written = Counter[tuple[int, int]]()
    for _ in range(20):
        for row in arena.step().rows:
            for position in range(row.start, min(row.start + len(row.token_ids), len(prompt))):
                written[row.block_table[position // 4], position % 4] += 1
    assert set(written.values()) == {1}
    # two of both full blocks, and each rollout's own last token
    assert len(written) == 4 * 4 + 3
    arena.run()


# resumed elsewhere


def test_rollout_with_tokens_continues_at_its_index_and_reports_from_position_0():
    sampling = SamplingParams(prompt_logprobs=0, record=("routing",))
    arena = make_arena()
    arena.ask(PROMPT, "a", max_tokens=6, sampling=sampling)
    arena.run()
    whole = arena.rollout("a")
    other = make_arena()
    other.ask(PROMPT, "a", max_tokens=6, sampling=sampling, output_ids=whole.output_ids[:4])
    plan = other.step()
    assert rows(plan) == {"a": (0, 14)}
    assert plan.rows[0].position == 4
    other.run()
    assert other.rollout("a").output_ids == whole.output_ids
    assert other.rollout("a").prompt_lp == whole.prompt_lp
    assert other.rollout("a").routing_ids == whole.routing_ids
    assert other.scheduler.stats().kv_resume_total == {"kept": 0, "host": 0, "recomputed": 1}


# preemption


def test_blocks_out_preempts_the_latest_admitted_and_nothing_is_lost():
    arena = make_arena(num_blocks=9, prefix_caching=False)
    a = arena.ask(PROMPT, max_tokens=20)
    b = arena.ask(OTHER, max_tokens=20)
    while arena.state(b) != "preempted":
        arena.step()
    assert arena.state(a) == "running"
    arena.run()
    assert (arena.state(a), arena.state(b)) == ("finished", "finished")
    stats = arena.scheduler.stats()
    assert stats.preemptions_total == 1
    assert stats.kv_resume_total == {"kept": 0, "host": 0, "recomputed": 1}


def test_preempted_kv_comes_back_from_host_memory_without_recomputing():
    arena = make_arena(num_blocks=9, prefix_caching=False, num_parking_blocks=8)
    arena.ask(PROMPT, max_tokens=20)
    arena.ask(OTHER, max_tokens=20)
    arena.run()
    assert arena.runner.num_computed_tokens == 2 * (10 + 19)
    assert arena.scheduler.stats().kv_resume_total == {"kept": 0, "host": 1, "recomputed": 0}
    assert sum(len(plan.parks) for plan in arena.plans) == 1
    assert sum(len(plan.unparks) for plan in arena.plans) == 1


def test_recomputed_rows_are_not_reported_twice():
    sampling = SamplingParams(prompt_logprobs=0, record=("routing",))
    arena = make_arena(num_blocks=9, max_num_batched_tokens=3)
    group = [arena.ask(PROMPT, seed=seed, max_tokens=14, sampling=sampling) for seed in range(3)]
    arena.run()
    assert arena.scheduler.stats().preemptions_total > 0
    for rollout_id in group:
        assert len(arena.rollout(rollout_id).prompt_lp) == 10
        assert len(arena.rollout(rollout_id).routing_ids) == 2 * 23


def test_cancelled_parked_rollout_drops_what_it_parked():
    arena = make_arena(num_blocks=9, prefix_caching=False, num_parking_blocks=8)
    arena.ask(PROMPT, max_tokens=20)
    b = arena.ask(OTHER, max_tokens=20)
    while arena.state(b) != "preempted":
        arena.step()
    (park,) = arena.plans[-1].parks
    assert arena.runner.num_parked_blocks == len(park.blocks)
    arena.cancel([b])
    assert arena.step().unpark_drops == [park.key]
    assert arena.runner.num_parked_blocks == 0
    arena.finish()


def test_preempted_rollout_goes_back_to_the_place_of_its_arrival():
    arena = make_arena(max_num_seqs=1)
    a = arena.ask(PROMPT, max_tokens=6)
    b = arena.ask(OTHER, max_tokens=6)
    arena.step()
    c = arena.ask([2, 2], max_tokens=2, priority=1)
    arena.run()
    order = [next(iter(rows(plan))) for plan in arena.plans if plan.rows]
    assert list(dict.fromkeys(order)) == [a, c, b]
    assert order == [a, c, c, a, a, a, a, a, *[b] * 6]


def test_tiny_pool_finishes_everybody_without_livelock():
    arena = make_arena(num_blocks=6, max_model_len=20, prefix_caching=False)
    for seed in range(12):
        arena.ask(PROMPT[: 1 + seed % 9], seed=seed, max_tokens=11)
    assert arena.run() < 400


def test_rollout_is_not_admitted_only_to_be_preempted_at_once():
    arena = make_arena(num_blocks=7, prefix_caching=False)
    a = arena.ask(PROMPT, max_tokens=14)
    arena.step(2)
    # three blocks are free, as many as it needs, but the running one will soon take another
    b = arena.ask(OTHER, max_tokens=12)
    arena.step()
    assert (arena.state(a), arena.state(b)) == ("running", "queued")
    arena.run()
    assert arena.scheduler.stats().preemptions_total == 0


def test_no_more_run_than_a_step_has_tokens():
    arena = make_arena(max_num_batched_tokens=2, prefix_caching=False)
    for priority in range(5):
        arena.ask(OTHER, max_tokens=4, priority=priority)
        arena.step()
        assert arena.scheduler.stats().num_running <= 2
    arena.run()


def test_budget_of_a_displaced_row_goes_to_who_displaced_it():
    arena = make_arena(max_num_seqs=1, max_num_batched_tokens=8)
    arena.ask([1], max_tokens=4)
    arena.step()
    high = arena.ask(OTHER, max_tokens=2, priority=1)
    assert rows(arena.step()) == {high: (0, 8)}
    arena.run()


# priorities


@pytest.mark.parametrize("num_parking_blocks", [0, 8])
def test_high_priority_displaces_low_and_low_continues_exactly(num_parking_blocks):
    """Both kinds of shortage: slots and blocks."""
    arena = make_arena(max_num_seqs=2, num_blocks=9, num_parking_blocks=num_parking_blocks)
    low = [arena.ask(PROMPT, max_tokens=14), arena.ask(OTHER, max_tokens=14)]
    arena.step(3)
    high = arena.ask([3] * 15, max_tokens=10, priority=5)
    plan = arena.step()
    assert high in rows(plan)
    assert arena.state(high) == "running"
    assert "preempted" in [arena.state(r) for r in low]
    arena.run()
    assert [arena.state(r) for r in (*low, high)] == ["finished"] * 3


def test_displaced_for_a_slot_keeps_its_kv():
    arena = make_arena(max_num_seqs=1)
    a = arena.ask(PROMPT, max_tokens=6)
    arena.step()
    arena.ask(OTHER, max_tokens=1, priority=1)
    arena.step()
    assert arena.state(a) == "preempted"
    assert rows(arena.step()) == {a: (10, 11)}
    assert arena.scheduler.stats().kv_resume_total == {"kept": 1, "host": 0, "recomputed": 0}


def test_equal_priority_displaces_nobody():
    arena = make_arena(max_num_seqs=1)
    a = arena.ask(PROMPT, max_tokens=4)
    arena.step()
    b = arena.ask(OTHER, max_tokens=1)
    arena.step(2)
    assert (arena.state(a), arena.state(b)) == ("running", "queued")


def test_larger_priority_is_admitted_first():
    arena = make_arena(max_num_seqs=1)
    names = [arena.ask([p], max_tokens=1, priority=p) for p in (0, 2, 1)]
    arena.run()
    order = [row.rollout_id for plan in arena.plans for row in plan.rows]
    assert order == [names[1], names[2], names[0]]


# fair queueing


def test_client_with_few_rollouts_is_not_held_up_by_one_with_many():
    arena = make_arena(max_num_seqs=1, prefix_caching=False)
    for seed in range(20):
        arena.ask(OTHER, seed=seed, max_tokens=2, client="many")
    arena.step(4)
    arena.ask(OTHER, "few", max_tokens=2, client="few")
    arena.step(4)
    assert arena.state("few") == "finished"


def test_clients_are_served_alike_in_tokens_not_in_rollouts():
    arena = make_arena(max_num_seqs=1, max_num_batched_tokens=512, prefix_caching=False)
    for _ in range(30):
        arena.ask(OTHER * 4, max_tokens=1, client="long")
        arena.ask(OTHER, max_tokens=1, client="short")
    arena.step(20)
    served = [arena.front.adds[row.rollout_id].client for p in arena.plans for row in p.rows]
    assert served.count("short") == 4 * served.count("long")


def test_client_that_was_away_has_saved_up_no_credit():
    arena = make_arena(max_num_seqs=1, prefix_caching=False)
    for _ in range(20):
        arena.ask(OTHER, max_tokens=1, client="old")
    arena.step(8)
    for _ in range(20):
        arena.ask(OTHER, max_tokens=1, client="new")
    arena.step(8)
    served = [arena.front.adds[row.rollout_id].client for p in arena.plans for row in p.rows]
    assert served[8:].count("new") == 4


# pause, resume, cancel


def test_paused_rollout_keeps_its_kv_and_goes_on_where_it_was():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=5)
    arena.step(2)
    arena.scheduler.pause([a])
    assert arena.state(a) == "paused"
    assert not arena.step().rows
    arena.scheduler.resume([a])
    assert arena.state(a) == "queued"
    assert rows(arena.step()) == {a: (11, 12)}
    assert arena.scheduler.stats().kv_resume_total == {"kept": 1, "host": 0, "recomputed": 0}


@pytest.mark.parametrize(("num_parking_blocks", "kind"), [(0, "recomputed"), (8, "host")])
def test_paused_rollout_loses_its_kv_before_anybody_running_is_preempted(num_parking_blocks, kind):
    arena = make_arena(num_blocks=9, prefix_caching=False, num_parking_blocks=num_parking_blocks)
    a = arena.ask(PROMPT, max_tokens=20)
    arena.step(2)
    arena.scheduler.pause([a])
    arena.ask(OTHER, max_tokens=22)
    arena.run()
    assert arena.scheduler.stats().preemptions_total == 0
    arena.finish()
    assert arena.scheduler.stats().kv_resume_total[kind] == 1


def test_paused_rollout_loses_its_kv_before_a_less_important_one_that_waits():
    arena = make_arena(num_blocks=9, max_num_seqs=1, prefix_caching=False)
    paused = arena.ask(PROMPT, max_tokens=10, priority=2)
    arena.step(2)
    arena.scheduler.pause([paused])
    displaced = arena.ask(OTHER, max_tokens=10)
    arena.step(2)
    # takes the slot at once, and its third block from one of the two
    arena.ask([3], max_tokens=10, priority=1)
    arena.run()
    assert arena.state(displaced) == "finished"
    assert arena.scheduler.stats().kv_resume_total == {"kept": 1, "host": 0, "recomputed": 0}
    arena.finish()
    assert arena.scheduler.stats().kv_resume_total == {"kept": 1, "host": 0, "recomputed": 1}


def test_rollout_short_of_blocks_does_not_give_up_its_own_to_be_admitted():
    arena = make_arena(num_blocks=9, prefix_caching=False)
    a = arena.ask(PROMPT, max_tokens=11)
    arena.step(3)
    arena.scheduler.pause([a])
    b = arena.ask(OTHER, max_tokens=6)
    arena.step(4)
    arena.scheduler.resume([a])
    arena.step()
    assert (arena.state(a), arena.state(b)) == ("queued", "running")
    arena.run()
    assert arena.scheduler.stats().kv_resume_total == {"kept": 1, "host": 0, "recomputed": 0}


def test_pause_of_all_holds_later_adds_until_resume_of_all():
    arena = make_arena()
    a = arena.ask(PROMPT)
    arena.step()
    arena.scheduler.pause()
    b = arena.ask(OTHER)
    arena.scheduler.resume([a])
    arena.run()
    assert (arena.state(a), arena.state(b)) == ("finished", "paused")
    arena.scheduler.resume()
    c = arena.ask(OTHER)
    arena.run()
    assert (arena.state(b), arena.state(c)) == ("finished", "finished")


def test_rollout_that_starts_paused_waits_for_its_resume():
    arena = make_arena()
    a = arena.ask(PROMPT, start_paused=True)
    arena.run()
    assert arena.state(a) == "paused"
    arena.scheduler.resume([a])
    arena.run()
    assert arena.state(a) == "finished"


def test_queued_rollout_can_be_paused():
    arena = make_arena(max_num_seqs=1)
    a, b, c = (arena.ask(OTHER, seed=seed, max_tokens=2) for seed in range(3))
    arena.step()
    arena.scheduler.pause([b])
    arena.run()
    assert [arena.state(r) for r in (a, b, c)] == ["finished", "paused", "finished"]
    arena.finish()


def test_token_in_flight_at_a_pause_is_kept():
    arena = make_arena()
    a = arena.ask(PROMPT, max_tokens=4)
    arena.step()
    arena.step(in_flight=lambda: arena.scheduler.pause([a]))
    assert len(arena.rollout(a).output_ids) == 2
    arena.finish()


def test_cancel_frees_at_once_and_its_row_in_flight_is_not_booked():
    arena = make_arena()
    a, b = arena.ask(PROMPT), arena.ask(OTHER)
    arena.step()
    used = arena.scheduler.stats().num_blocks_used

    def cancel() -> None:
        arena.cancel([a])
        assert arena.scheduler.stats().num_blocks_used < used

    arena.step(in_flight=cancel)
    assert len(arena.rollout(a).output_ids) == 1
    assert len(arena.rollout(b).output_ids) == 2
    a = arena.ask(PROMPT, a)
    arena.finish()


def test_calls_with_unknown_ids_are_ignored():
    arena = make_arena()
    arena.scheduler.cancel(["x"])
    arena.scheduler.pause(["x"])
    arena.scheduler.resume(["x"])
    assert not arena.scheduler.take_events()


# token limits of pools


def num_drawn(arena: Arena, *ids: str) -> list[int]:
    return [len(arena.rollout(rollout_id).output_ids) for rollout_id in ids]


def test_a_pool_draws_up_to_its_limit_and_no_further():
    arena = make_arena()
    ids = [arena.ask([1, 2, 3], max_tokens=20, seed=s, pool="math") for s in range(3)]
    arena.meter("math", 7)
    arena.run()
    # the last of a step's tokens goes by admission
    assert num_drawn(arena, *ids) == [3, 2, 2]
    assert [arena.state(i) for i in ids] == ["paused"] * 3
    arena.meter("math", 8)
    arena.run()
    assert num_drawn(arena, *ids) == [4, 2, 2]
    arena.meter("math", None)
    arena.run()
    assert num_drawn(arena, *ids) == [20, 20, 20]


def test_a_limit_below_what_was_drawn_stops_the_pool():
    arena = make_arena()
    a = arena.ask([1, 2, 3], max_tokens=20, pool="math")
    arena.step(5)
    arena.meter("math", 3)
    arena.run()
    assert num_drawn(arena, a) == [5]
    arena.meter("math", 6)
    arena.run()
    assert num_drawn(arena, a) == [6]


def test_a_pool_at_its_limit_leaves_slots_and_steps_to_others():
    arena = make_arena(max_num_seqs=2)
    held = [arena.ask([s], max_tokens=20, pool="math") for s in range(3)]
    arena.meter("math", 4)
    arena.step(2)
    others = [arena.ask([4, 2, s], max_tokens=5) for s in range(4)]
    arena.run()
    assert num_drawn(arena, *held) == [2, 2, 0]
    assert num_drawn(arena, *others) == [5] * 4


def test_a_rollout_of_a_pool_at_its_limit_waits_and_a_high_priority_comes_first():
    arena = make_arena()
    arena.meter("math", 0)
    low = arena.ask([1, 2, 3], max_tokens=4, pool="math")
    high = arena.ask([1, 2, 4], max_tokens=4, pool="math", priority=1)
    arena.run()
    assert [arena.state(low), arena.state(high)] == ["paused", "paused"]
    arena.meter("math", 1)
    arena.run()
    assert num_drawn(arena, low, high) == [0, 1]


def test_a_rollout_that_the_user_paused_stays_paused_when_its_pool_goes_on():
    arena = make_arena()
    a, b = (arena.ask([s], max_tokens=9, pool="math") for s in range(2))
    arena.meter("math", 2)
    arena.run()
    # held already: paused by the user all the same
    arena.scheduler.pause([a])
    arena.meter("math", 40)
    arena.run()
    assert num_drawn(arena, a, b) == [1, 9]
    assert arena.state(a) == "paused"
    arena.scheduler.resume([a])
    arena.run()
    assert num_drawn(arena, a, b) == [9, 9]


def test_the_users_resume_does_not_lift_a_limit():
    arena = make_arena()
    a = arena.ask([1, 2, 3], max_tokens=9, pool="math")
    arena.meter("math", 2)
    arena.run()
    arena.scheduler.resume()
    arena.run()
    arena.scheduler.pause([a])
    arena.scheduler.resume([a])
    arena.run()
    assert num_drawn(arena, a) == [2]


def test_tokens_that_are_not_booked_do_not_count():
    arena = make_arena()
    a, b, c = (arena.ask([s], max_tokens=9, pool="math") for s in range(3))
    arena.meter("math", 6)
    arena.step()
    arena.step(in_flight=lambda: arena.cancel([a]))
    arena.runner.nonfinite.add(b)
    arena.run()
    # 3 in the first step, 2 in the second; of the third only c's
    assert num_drawn(arena, a, b, c) == [1, 2, 3]


def rows_of(plan: StepPlan) -> list[str]:
    return sorted(row.rollout_id for row in plan.rows)


def test_who_stands_by_takes_a_free_place_in_the_next_step_in_order_of_arrival():
    arena = make_arena()
    arena.meter("math", 100, places=2)
    for name, length in (("a", 3), ("b", 5), ("c", 2), ("d", 1), ("e", 2)):
        arena.ask([ord(name[0]) % 8, 1, 2], name, max_tokens=length, pool="math")
    chat = arena.ask([7], "x", max_tokens=4)
    seen = [[name for name in rows_of(arena.step()) if name != chat] for _ in range(7)]
    assert seen == [*[["a", "b"]] * 3, *[["b", "c"]] * 2, *[["d", "e"]], ["e"]]
    # who comes while others stand by goes behind them
    for name in "fgh":
        arena.ask([ord(name[0]) % 8, 1, 2], name, max_tokens=1, pool="math")
        arena.step()
    assert num_drawn(arena, *"abcdefgh") == [3, 5, 2, 1, 2, 1, 1, 1]


def test_who_comes_while_a_place_is_free_does_not_overtake_who_stands_by():
    arena = make_arena()
    arena.meter("math", 100, places=1)
    for name in "abc":
        arena.ask([ord(name[0]) % 8, 1, 2], name, max_tokens=2, pool="math")
    arena.step(2)
    # a has ended, nobody has its place yet
    arena.ask([9, 2, 3], "late", max_tokens=1, pool="math")
    arena.ask([8, 2, 3], "urgent", max_tokens=1, pool="math", priority=1)
    seen = [rows_of(arena.step()) for _ in range(6)]
    assert seen == [["urgent"], ["b"], ["b"], ["c"], ["c"], ["late"]]


def test_the_last_tokens_of_a_limit_go_to_those_that_began():
    arena = make_arena()
    arena.meter("math", 7, places=2)
    ids = [arena.ask([n, 2, 3], max_tokens=2, pool="math") for n in range(5)]
    arena.run()
    assert num_drawn(arena, *ids) == [2, 2, 2, 1, 0]
    arena.meter("math", 9, places=1)
    arena.run()
    assert num_drawn(arena, *ids) == [2, 2, 2, 2, 1]
    arena.meter("math", 10)
    arena.run()
    assert num_drawn(arena, *ids) == [2] * 5


def test_only_metered_pools_are_told_of():
    arena = make_arena()
    arena.ask([3], max_tokens=2)
    arena.ask([4], max_tokens=2, pool="code")
    arena.ask([5], max_tokens=2, pool="math")
    arena.meter("math", 9)
    told = []
    while (plan := arena.scheduler.schedule()).has_work:
        messages = arena.scheduler.commit(plan, arena.runner.run(plan))
        told += [m.drawn for m in messages if isinstance(m, Tokens)]
    assert told == [{"math": 1}, {"math": 2}]


# what is told


def test_moves_come_in_order_and_before_the_tokens_of_their_step():
    arena = make_arena()
    arena.ask(PROMPT, "a", max_tokens=2)
    plan = arena.scheduler.schedule()
    moved, tokens = arena.scheduler.commit(plan, arena.runner.run(plan))
    assert moved.moves == [("a", "running")]
    assert isinstance(tokens, Tokens)
    assert (tokens.version, tokens.digest) == (1, "v1")
    arena.scheduler.pause()
    arena.scheduler.resume()
    (moved,) = arena.scheduler.take_events()
    assert moved.moves == [("a", "paused"), ("a", "queued")]


def test_chunk_without_news_is_not_reported():
    arena = make_arena(max_num_batched_tokens=4)
    arena.ask(PROMPT, "a")
    reports = []
    for _ in range(3):
        plan = arena.scheduler.schedule()
        messages = arena.scheduler.commit(plan, arena.runner.run(plan))
        reports.append(
            [t.num_cached_tokens for m in messages if isinstance(m, Tokens) for t in m.each()]
        )
    assert reports == [[0], [], [None]]


def test_records_asked_for_come_with_each_token():
    sampling = SamplingParams(record=("lp_raw", "entropy", "kept_ids"), top_logprobs=1)
    arena = make_arena()
    a = arena.ask(PROMPT, sampling=sampling)
    arena.run()
    rollout = arena.rollout(a)
    assert len(rollout.lp_raw) == len(rollout.entropy) == len(rollout.top) == 4


def test_prompt_logprobs_begin_with_none_and_are_cut_at_the_prompts_end():
    arena = make_arena(max_num_batched_tokens=4)
    a = arena.ask(PROMPT, sampling=SamplingParams(prompt_logprobs=1))
    b = arena.ask([3], sampling=SamplingParams(prompt_logprobs=1))
    arena.run()
    assert arena.rollout(a).prompt_lp[0] is None
    assert len(arena.rollout(a).prompt_lp) == len(arena.rollout(a).prompt_top) == 10
    assert arena.rollout(b).prompt_lp == [None]


def test_stats_count_places_and_blocks():
    arena = make_arena(max_num_seqs=1)
    arena.ask(PROMPT, max_tokens=4)
    arena.ask(PROMPT, max_tokens=4)
    arena.ask(OTHER, max_tokens=4, start_paused=True)
    arena.step()
    stats = arena.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_paused) == (1, 1, 1)
    assert (stats.num_blocks_used, stats.num_blocks) == (3, 32)
    assert stats.steps_total == 1


def test_runner_that_draws_too_few_is_caught():
    arena = make_arena()
    arena.ask(PROMPT)
    plan = arena.scheduler.schedule()
    result = arena.runner.run(plan)
    result.rows = {0: RowResult()}
    with pytest.raises(AssertionError, match="a draw is missing"):
        arena.scheduler.commit(plan, result)


@pytest.mark.parametrize(
    ("on_pause", "room", "kind", "num_held"),
    [
        ("keep", 8, "kept", 2),
        ("park", 8, "host", 0),
        ("park", 1, "recomputed", 0),
        ("drop", 8, "recomputed", 0),
    ],
)
def test_what_becomes_of_paused_kv_is_a_setting(on_pause, room, kind, num_held):
    kv = make_kv(prefix_caching=False, num_parking_blocks=room, on_pause=on_pause)
    arena = Arena(kv, make_batch())
    first = arena.ask([1] * 5, max_tokens=12)
    arena.step(2)
    # a pause that comes while a row is in flight
    arena.step(in_flight=lambda: arena.scheduler.pause([first]))
    arena.step(in_flight=lambda: None)
    assert arena.scheduler.stats().num_blocks_used == num_held
    arena.scheduler.resume([first])
    arena.finish()
    assert arena.scheduler.stats().kv_resume_total[kind] == 1
