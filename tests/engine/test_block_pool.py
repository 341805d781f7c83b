"""Blocks: free queue, references, index."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from everstep.engine.core.block_pool import BlockPool, Content


def full(key: bytes, tokens=(1, 2), parent=b"root") -> Content:
    return Content(parent, key, list(tokens))


def test_null_block_is_never_handed_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_empty_blocks_are_handed_out_before_cached_ones():
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    pool.register(blocks[0], full(b"a"))
    pool.release(blocks)
    assert blocks[0] not in pool.allocate(3)
    assert pool.find(b"a") == blocks[0]


def test_cached_blocks_are_evicted_in_the_order_of_their_release():
    pool = BlockPool(4)
    first, second, third = pool.allocate(3)
    for block, key in ((first, b"a"), (second, b"b"), (third, b"c")):
        pool.register(block, full(key))
    for block in (second, third, first):
        pool.release([block])
    assert [pool.allocate(1) for _ in range(3)] == [[second], [third], [first]]
    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [None, None, None]


def test_tail_of_a_table_is_evicted_before_its_head():
    pool = BlockPool(4)
    table = pool.allocate(3)
    for block, key in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.register(block, full(key))
    pool.release(table)
    assert pool.allocate(3) == table[::-1]


def test_hit_takes_a_cached_block_out_of_the_free_queue():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, full(b"a"))
    pool.release([block])
    pool.share([block])
    assert pool.num_free == 1
    assert pool.allocate(1) != [block]
    assert pool.ref_count(block) == 1


def test_shared_block_is_free_after_its_last_release():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block])


def test_index_keeps_one_block_of_each_content():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    assert pool.register(first, full(b"a"))
    assert not pool.register(second, full(b"a"))
    assert pool.find(b"a") == first
    assert [block for block, _ in pool.children(b"root", 1)] == [first]


def test_children_are_found_by_parent_and_first_token():
    pool = BlockPool(5)
    blocks = pool.allocate(3)
    pool.register(blocks[0], full(b"a", (1, 2)))
    pool.register(blocks[1], full(b"b", (1, 3)))
    pool.register(blocks[2], full(b"c", (1, 3), parent=b"a"))
    assert {block for block, _ in pool.children(b"root", 1)} == set(blocks[:2])
    assert {block for block, _ in pool.children(b"a", 1)} == {blocks[2]}
    assert not pool.children(b"root", 2)


class Writer:
    num_computed_tokens = 6


def test_block_being_filled_shows_what_its_writer_has_computed():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    ids = [0, 1, 2, 3, 4, 5, 6, 7]
    writer = Writer()
    content = Content(b"root", None, ids, 4, writer)
    pool.register(block, content)
    assert content.num_tokens == 2
    writer.num_computed_tokens = 7
    assert content.num_tokens == 3
    pool.freeze(block)
    writer.num_computed_tokens = 0
    assert content.ids == [4, 5, 6]
    assert [found for found, _ in pool.children(b"root", 4)] == [block]


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model of plain sets: who holds what, and which key is where."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.tables: list[list[int]] = []
        self.keys: dict[bytes, int] = {}
        self.num_keys = 0

    @property
    def held(self) -> list[int]:
        return [block for table in self.tables for block in table]

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {*self.held, 0}
        self.keys = {key: block for key, block in self.keys.items() if block not in blocks}
        self.tables.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.tables:
            self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        if self.held:
            block = data.draw(st.sampled_from(self.held))
            self.num_keys += 1
            key = b"%d" % (self.num_keys if data.draw(st.booleans()) else max(1, self.num_keys - 2))
            self.keys = {k: b for k, b in self.keys.items() if b != block}
            is_new = key not in self.keys
            assert self.pool.register(block, full(key, [self.num_keys % 3])) == is_new
            if is_new:
                self.keys[key] = block

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        if self.keys:
            block = data.draw(st.sampled_from(sorted(self.keys.values())))
            self.pool.share([block])
            self.tables.append([block])

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(1, self.num_blocks - 1))
        self.pool.forget(block)
        self.keys = {key: b for key, b in self.keys.items() if b != block}

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants(self.held)
        assert self.pool.num_free == self.num_blocks - 1 - len(set(self.held))
        assert self.pool.num_used == len(set(self.held))
        for number in range(1, self.num_keys + 1):
            assert self.pool.find(b"%d" % number) == self.keys.get(b"%d" % number)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
