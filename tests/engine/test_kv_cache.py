"""Block tables: what is found, what is copied, what is never shared, what is parked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.core.kv_cache import KVCacheManager, Match, RolloutKV, common_prefix
from everstep.engine.core.plan import Copy

from .arena import make_kv

PROMPT = list(range(10, 20))


def make_manager(**settings: int | bool) -> KVCacheManager:
    manager = KVCacheManager(make_kv(**settings))
    manager.set_version("v1")
    return manager


def start(manager: KVCacheManager, ids: list[int], limit: int | None = None) -> RolloutKV:
    """A table for `ids` with what is found, blocks for all of them, nothing computed."""
    kv = manager.open(list(ids))
    match = manager.match(kv, len(ids) - 1 if limit is None else limit)
    manager.hold(match)
    manager.adopt(kv, match)
    manager.grow(kv, len(ids))
    return kv


def compute(manager: KVCacheManager, ids: list[int]) -> RolloutKV:
    """A table for `ids`, all of them computed."""
    kv = start(manager, ids)
    manager.book(kv, len(ids))
    manager.end_step()
    manager.check_invariants()
    return kv


def find(manager: KVCacheManager, ids: list[int]) -> Match:
    kv = manager.open(list(ids))
    match = manager.match(kv, len(ids) - 1)
    manager.close(kv)
    return match


def test_full_blocks_are_shared_and_the_rest_is_copied():
    manager = make_manager()
    first = compute(manager, PROMPT)
    second = manager.open([*PROMPT, 99])
    match = manager.match(second, 10)
    assert match.blocks == first.blocks[:2]
    assert (match.num_tokens, match.source) == (10, first.blocks[2])
    manager.hold(match)
    copy = manager.adopt(second, match)
    assert copy == Copy(first.blocks[2], second.blocks[2])
    assert second.blocks[2] not in first.blocks
    assert second.num_computed_tokens == 10
    manager.check_invariants()


def test_hit_leaves_the_last_token_to_compute():
    manager = make_manager()
    first = compute(manager, PROMPT[:8])
    match = find(manager, PROMPT[:8])
    assert match.num_tokens == 7
    assert match.blocks == first.blocks[:1]
    assert match.source == first.blocks[1]


def test_partial_match_takes_the_longest_common_beginning():
    manager = make_manager()
    compute(manager, [1, 2, 3, 4, 5, 0, 0, 0])
    best = compute(manager, [1, 2, 3, 4, 5, 6, 7, 0])
    compute(manager, [1, 2, 3, 4, 5, 6, 0, 0])
    match = find(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    assert (match.num_tokens, match.source) == (7, best.blocks[1])


def test_only_computed_tokens_are_found():
    manager = make_manager()
    kv = start(manager, PROMPT)
    assert find(manager, PROMPT).num_tokens == 0
    manager.book(kv, 3)
    assert find(manager, PROMPT).num_tokens == 3
    manager.book(kv, 6)
    assert find(manager, PROMPT).num_tokens == 6
    assert find(manager, PROMPT).blocks == kv.blocks[:1]


def test_decoded_tokens_are_found_one_by_one():
    manager = make_manager()
    kv = compute(manager, PROMPT)
    for count in range(11, 20):
        kv.ids.append(count)
        manager.grow(kv, count)
        manager.book(kv, count)
        assert find(manager, [*kv.ids, 0]).num_tokens == count


def test_freed_blocks_stay_findable_until_handed_out():
    manager = make_manager(num_blocks=7)
    manager.close(compute(manager, PROMPT))
    assert manager.num_used == 0
    assert find(manager, [*PROMPT, 0]).num_tokens == 10
    # the three empty blocks go first, then the tail of what is cached
    compute(manager, [0] * 13)
    assert find(manager, [*PROMPT, 0]).num_tokens == 8


def test_block_is_found_by_its_whole_chain_not_by_its_tokens():
    manager = make_manager()
    compute(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    assert find(manager, [9, 9, 9, 9, 5, 6, 7, 8, 0]).num_tokens == 0
    assert find(manager, [5, 6, 7, 8, 0]).num_tokens == 0


def test_other_version_shares_nothing_and_the_old_one_comes_back():
    manager = make_manager()
    compute(manager, PROMPT)
    manager.set_version("v2")
    assert find(manager, [*PROMPT, 0]).num_tokens == 0
    manager.set_version("v1")
    # the unfinished block went with the flip: its writer is live and goes on under other weights
    assert find(manager, [*PROMPT, 0]).num_tokens == 8


@pytest.mark.parametrize("is_parked", [False, True])
def test_what_stands_on_another_versions_context_is_never_registered(is_parked):
    manager = make_manager(num_parking_blocks=8)
    kv = start(manager, PROMPT)
    manager.book(kv, 5)
    manager.set_version("v2")
    manager.book(kv, 10)
    if is_parked:
        manager.park(kv)
        manager.unpark(kv)
    assert find(manager, [*PROMPT, 0]).num_tokens == 0
    manager.set_version("v1")
    kv.ids += [1, 2]
    manager.grow(kv, 12)
    manager.book(kv, 12)
    assert find(manager, [*PROMPT, 0]).num_tokens == 4
    manager.check_invariants()


def test_table_parked_across_two_flips_is_not_registered_again():
    manager = make_manager(num_parking_blocks=8)
    kv = start(manager, PROMPT)
    manager.set_version("v2")
    manager.book(kv, 10)
    manager.park(kv)
    manager.set_version("v1")
    manager.unpark(kv)
    kv.ids.append(1)
    manager.grow(kv, 11)
    manager.book(kv, 11)
    assert find(manager, [*PROMPT, 0]).num_tokens == 0


def test_rollout_that_lost_its_kv_shares_again_under_the_new_version():
    manager = make_manager()
    kv = compute(manager, PROMPT)
    manager.set_version("v2")
    manager.drop(kv)
    match = manager.match(kv, 9)
    assert match.num_tokens == 0
    manager.hold(match)
    manager.adopt(kv, match)
    manager.grow(kv, 10)
    manager.book(kv, 10)
    assert find(manager, [*PROMPT, 0]).num_tokens == 10


def test_poisoned_blocks_are_forgotten_and_those_it_shared_are_not():
    manager = make_manager()
    manager.close(compute(manager, PROMPT[:8]))
    bad = compute(manager, [*PROMPT, 5, 6, 7, 8])
    assert find(manager, [*PROMPT, 5, 6, 7, 8, 0]).num_tokens == 14
    manager.close(bad, is_poisoned=True)
    assert find(manager, [*PROMPT, 5, 6, 7, 8, 0]).num_tokens == 8
    assert manager.num_used == 0
    manager.check_invariants()


def test_without_prefix_caching_nothing_is_found():
    manager = make_manager(prefix_caching=False)
    compute(manager, PROMPT)
    assert find(manager, PROMPT).num_tokens == 0


def test_block_copied_from_is_not_handed_out_in_the_same_plan():
    manager = make_manager(num_blocks=7)
    manager.close(compute(manager, PROMPT[:3]))
    source = find(manager, PROMPT[:4]).source
    kv = start(manager, PROMPT[:4])
    others = manager.open([0] * 16)
    manager.grow(others, 4 * manager.num_free)
    assert source not in others.blocks + kv.blocks
    assert manager.num_free == 0
    manager.check_invariants()
    manager.end_step()
    assert manager.num_free == 1
    manager.check_invariants()


def test_source_whose_writer_ends_in_the_same_plan_keeps_its_tokens():
    manager = make_manager()
    writer = compute(manager, PROMPT[:3])
    start(manager, PROMPT[:4])
    manager.close(writer)
    manager.check_invariants()
    manager.end_step()
    manager.check_invariants()
    assert find(manager, PROMPT[:4]).num_tokens == 3


def test_parking_is_refused_beyond_its_room():
    manager = make_manager(num_parking_blocks=4)
    first, second = compute(manager, PROMPT), compute(manager, [0] * 10)
    blocks = list(first.blocks)
    park = manager.park(first)
    assert park is not None
    assert park.blocks == blocks
    assert not first.blocks
    assert manager.park(second) is None
    assert second.blocks
    manager.check_invariants()


def test_room_that_a_plan_frees_in_host_memory_is_free_for_the_next():
    manager = make_manager(num_parking_blocks=3)
    first, second = compute(manager, PROMPT), compute(manager, [0] * 10)
    park = manager.park(first)
    assert park is not None
    unpark = manager.unpark(first)
    assert unpark.key == park.key
    assert manager.park(second) is None
    manager.check_invariants()
    manager.end_plan()
    assert manager.park(second) is not None
    manager.check_invariants()


def test_ending_a_parked_rollout_returns_its_key():
    manager = make_manager(num_parking_blocks=3)
    kv = compute(manager, PROMPT)
    park = manager.park(kv)
    assert park is not None
    assert manager.close(kv) == park.key
    manager.end_plan()
    other = compute(manager, PROMPT)
    assert manager.park(other) is not None
    assert manager.close(compute(manager, PROMPT)) is None


def test_unparked_blocks_are_findable_again():
    manager = make_manager(num_blocks=7, num_parking_blocks=3)
    kv = compute(manager, PROMPT)
    manager.park(kv)
    manager.close(compute(manager, [0] * 21))
    assert find(manager, [*PROMPT, 0]).num_tokens == 0
    manager.unpark(kv)
    kv.ids.append(1)
    manager.grow(kv, 11)
    manager.book(kv, 11)
    assert find(manager, [*PROMPT, 1, 0]).num_tokens == 11


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
@settings(derandomize=True, deadline=None)
def test_common_prefix_is_that_of_a_loop(left, right):
    expected = 0
    while expected < min(len(left), len(right), 9) and left[expected] == right[expected]:
        expected += 1
    assert common_prefix(left, right, 0, 9) == expected
