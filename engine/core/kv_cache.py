"""Block tables of rollouts: prefix matches, growth, parking in host memory.

Content is known by chain hashes: hash(block) = blake2b(hash(previous) ‖ token ids), and the first
previous is a hash of the policy version. So a block is found only by a rollout with the same
tokens from position 0 on and under the same weights.

    positions of a table                         the block is
    0 … num_shared_blocks·S                      somebody else's, full, read by reference
    … num_computed_tokens // S · S               its own, full, registered
    … num_computed_tokens                        its own, being filled, findable up to there
    beyond                                       allocated for the step in hand
"""

import struct
import sys
from collections.abc import Sequence
from hashlib import blake2b

from msgspec import Struct

from ..config import ResolvedKV
from .block_pool import BlockPool, Content
from .plan import Copy, Park, Unpark

NEVER = sys.maxsize


class RolloutKV:
    """What one rollout has in the KV cache. Written by `KVCacheManager` alone.

    `ids` is the scheduler's list of prompt and output (append only), shared and never copied.
    Blocks are replaced, not emptied, when they are given up: a step in flight may read the list.
    """

    __slots__ = (
        "blocks",
        "epoch",
        "hashes",
        "ids",
        "next_registration",
        "num_missing_tokens",
        "num_parked_blocks",
        "num_registered",
        "num_shared_blocks",
        "parking_key",
    )

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.blocks: list[int] = []
        self.num_missing_tokens = len(ids)
        """Tokens of `ids` that are not computed: 1, from step to step, as long as it decodes."""
        self.num_shared_blocks = 0
        self.hashes: list[bytes] = []
        """Chain hashes of the full blocks of `ids`, as far as they were needed."""
        self.epoch = -1
        """Count of version changes when its first token was computed."""
        self.num_registered = 0
        self.next_registration = NEVER
        """num_computed_tokens from which the index has something to learn."""
        self.parking_key: str | None = None
        self.num_parked_blocks = 0

    @property
    def num_computed_tokens(self) -> int:
        return len(self.ids) - self.num_missing_tokens

    @num_computed_tokens.setter
    def num_computed_tokens(self, count: int) -> None:
        self.num_missing_tokens = len(self.ids) - count


class Match(Struct, frozen=True):
    """A computed prefix: whole blocks to share, then a part of `source` to copy."""

    blocks: list[int]
    num_tokens: int
    parent: bytes = b""
    """Chain hash after the whole blocks."""
    source: int | None = None
    num_copied_tokens: int = 0

    def without_copy(self) -> "Match":
        return Match(self.blocks, self.num_tokens - self.num_copied_tokens, self.parent)


NO_MATCH = Match([], 0)


def common_prefix(left: Sequence[int], right: Sequence[int], start: int, end: int) -> int:
    """Length of the common prefix, known to be at least `start`, looked for up to `end`."""
    low, high = start, min(end, len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class KVCacheManager:
    """The only writer of block tables; `BlockPool` is its hand.

    Within one plan the moves are parks, unparks, copies, rows (plan.py): a block parked may be
    reused at once, a block copied from is held until `end_plan`, and host memory that an unpark
    or a drop frees counts as free from the next plan on.
    """

    def __init__(self, config: ResolvedKV) -> None:
        self.block_size = config.block_size
        self._pack = struct.Struct(f"{config.block_size}I").pack
        self._is_caching = config.prefix_caching
        self._num_parking_blocks = config.num_parking_blocks
        self._pool = BlockPool(config.num_blocks)
        self._tables: set[RolloutKV] = set()
        self._copied_from: list[int] = []
        self._num_parked_blocks = 0
        self._num_leaving_blocks = 0
        self._num_parks = 0
        self.version = ""
        self._epoch = 0
        self._root = self._root_hash()

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self._pool.num_used

    @property
    def num_blocks(self) -> int:
        """Blocks that can hold tokens: all but the null block."""
        return self._pool.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def set_version(self, version: str) -> None:
        """From now on blocks belong to these weights; tables of live rollouts stay valid.

        What a live rollout writes from here on stands on another version's context: it is never
        registered, even if the old version comes back.
        """
        if version == self.version:
            return
        self.version = version
        self._epoch += 1
        self._root = self._root_hash()
        for kv in self._tables:
            tail = kv.num_computed_tokens // self.block_size
            if kv.next_registration != NEVER and tail < len(kv.blocks):
                self._pool.forget(kv.blocks[tail])
            kv.next_registration = NEVER

    def is_sharing(self, kv: RolloutKV) -> bool:
        """Whether what this rollout computes becomes findable."""
        return self._is_caching and kv.epoch == self._epoch

    # a table's life

    def open(self, ids: list[int]) -> RolloutKV:
        kv = RolloutKV(ids)
        self._tables.add(kv)
        return kv

    def close(self, kv: RolloutKV, *, is_poisoned: bool = False) -> str | None:
        """Free what a rollout holds; returns the key of parked KV to drop, if any.

        Poisoned: what it wrote is forgotten, so that nobody ever shares it.
        """
        if is_poisoned:
            for block in kv.blocks[kv.num_shared_blocks :]:
                self._pool.forget(block)
        key = self.drop_all(kv)
        self._tables.remove(kv)
        return key

    def drop_all(self, kv: RolloutKV) -> str | None:
        """`drop`, whether it is here or parked; returns the key of parked KV to drop, if any."""
        key = kv.parking_key
        self._num_leaving_blocks += kv.num_parked_blocks
        self.drop(kv)
        return key

    def match(self, kv: RolloutKV, limit: int) -> Match:
        """The longest known prefix of at most `limit` tokens, for a rollout without KV."""
        if not self._is_caching:
            return NO_MATCH
        size = self.block_size
        blocks: list[int] = []
        parent = self._root
        self._renew(kv)
        for index in range(limit // size):
            key = self._hash(kv, index)
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
            parent = key
        start = len(blocks) * size
        best, source = 0, None
        wanted = kv.ids[start : min(start + size, limit)]
        for block, content in self._pool.children(parent, wanted[0]) if wanted else ():
            end = min(len(wanted), content.num_tokens)
            known = content.ids[content.start : content.start + end]
            length = common_prefix(known, wanted, 1, end)
            if length > best:
                best, source = length, block
                if best == len(wanted):
                    break
        return Match(blocks, start + best, parent, source, best)

    def hold(self, match: Match) -> None:
        """Keep the blocks of a match from being handed out, until `adopt` or `let_go`."""
        self._pool.share(match.blocks)
        if match.source is not None:
            self._pool.share([match.source])

    def let_go(self, match: Match) -> None:
        self._pool.release(match.blocks)
        if match.source is not None:
            self._pool.release([match.source])

    def adopt(self, kv: RolloutKV, match: Match) -> Copy | None:
        """Begin a table with a match that is held; returns the copy to be made, if any."""
        self._renew(kv)
        kv.blocks = list(match.blocks)
        kv.num_shared_blocks = kv.num_registered = len(match.blocks)
        kv.num_computed_tokens = match.num_tokens
        copy = None
        if match.source is not None:
            (target,) = self._pool.allocate(1)
            kv.blocks.append(target)
            self._copied_from.append(match.source)
            copy = Copy(match.source, target)
        if self._is_caching:
            kv.next_registration = match.num_tokens + 1
        return copy

    def missing_blocks(self, kv: RolloutKV, num_tokens: int) -> int:
        """Blocks that the table needs besides its own to cover so many tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(kv.blocks))

    def grow(self, kv: RolloutKV, num_tokens: int) -> None:
        """Cover so many tokens; the caller has checked `num_free`."""
        kv.blocks.extend(self._pool.allocate(self.missing_blocks(kv, num_tokens)))

    def grow_by_one(self, kv: RolloutKV) -> None:
        """Add a block; the caller has checked `num_free`."""
        kv.blocks.append(self._pool.allocate_one())

    def book(self, kv: RolloutKV, num_tokens: int) -> None:
        """The first `num_tokens` are computed now."""
        kv.num_computed_tokens = num_tokens
        self.register(kv)

    def register(self, kv: RolloutKV) -> None:
        """Tell the index what it has to learn of a table, if anything: of blocks that became full,
        and of the one being filled."""
        ids = kv.ids
        num_tokens = len(ids) - kv.num_missing_tokens
        if num_tokens < kv.next_registration:
            return
        size, pool, hashes = self.block_size, self._pool, kv.hashes
        num_full = num_tokens // size
        start = kv.num_registered * size
        for index in range(kv.num_registered, num_full):
            tokens = ids[start : start + size]
            is_next = index == len(hashes)
            key = self._extend_chain(hashes, tokens) if is_next else self._hash(kv, index)
            if not pool.complete(kv.blocks[index], key, tokens):
                parent = hashes[index - 1] if index else self._root
                pool.register(kv.blocks[index], Content(parent, key, tokens))
            start += size
        kv.num_registered = num_full
        if num_tokens == start:
            kv.next_registration = start + 1
        else:
            kv.next_registration = start + size
            parent = hashes[num_full - 1] if num_full else self._root
            pool.register(kv.blocks[num_full], Content(parent, None, ids, start, kv))

    def drop(self, kv: RolloutKV) -> None:
        """Give up the table; what it computed stays findable until its blocks are handed out."""
        tail = kv.num_computed_tokens // self.block_size
        if tail < len(kv.blocks):
            self._pool.freeze(kv.blocks[tail])
        self._pool.release(kv.blocks)
        kv.blocks = []
        kv.num_computed_tokens = kv.num_shared_blocks = kv.num_registered = 0
        kv.next_registration = NEVER
        kv.parking_key, kv.num_parked_blocks = None, 0

    def forget_prompt(self, kv: RolloutKV, num_prompt: int) -> None:
        """These positions are to be written again by other weights: nobody finds what they held,
        even if the old version comes back."""
        for block in kv.blocks[: self.blocks_for(num_prompt)]:
            self._pool.forget(block)

    # host memory

    def park(self, kv: RolloutKV) -> Park | None:
        """Move a table to host memory; None, and nothing done, if it has no room there."""
        count = self.blocks_for(kv.num_computed_tokens)
        if count == 0 or self._num_parked_blocks + count > self._num_parking_blocks:
            return None
        self._num_parks += 1
        key = f"park-{self._num_parks}"
        park = Park(key, kv.blocks[:count])
        num_computed_tokens = kv.num_computed_tokens
        self.drop(kv)
        kv.num_computed_tokens = num_computed_tokens
        kv.parking_key, kv.num_parked_blocks = key, count
        self._num_parked_blocks += count
        return park

    def unpark(self, kv: RolloutKV) -> Unpark:
        """Bring a table back from host memory; the caller has checked `num_free`."""
        assert kv.parking_key is not None
        unpark = Unpark(kv.parking_key, self._pool.allocate(kv.num_parked_blocks))
        kv.blocks = list(unpark.blocks)
        self._num_leaving_blocks += kv.num_parked_blocks
        kv.parking_key, kv.num_parked_blocks = None, 0
        if self.is_sharing(kv):
            kv.next_registration = kv.num_computed_tokens + 1
        return unpark

    def end_plan(self) -> None:
        """The plan in hand is complete: what it frees in host memory is free for the next."""
        self._num_parked_blocks -= self._num_leaving_blocks
        self._num_leaving_blocks = 0

    def end_step(self) -> None:
        """The plan was carried out: blocks copied from may be handed out again."""
        self._pool.release(self._copied_from)
        self._copied_from = []

    # the index

    def _root_hash(self) -> bytes:
        return blake2b(f"everstep kv {self.version}".encode(), digest_size=32).digest()

    def _renew(self, kv: RolloutKV) -> None:
        """An empty table belongs to the present version."""
        if kv.epoch != self._epoch:
            kv.epoch = self._epoch
            kv.hashes = []

    def _hash(self, kv: RolloutKV, index: int) -> bytes:
        """Chain hash of block `index` of the rollout's tokens, full by then."""
        hashes, size = kv.hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            self._extend_chain(hashes, kv.ids[start : start + size])
        return hashes[index]

    def _extend_chain(self, hashes: list[bytes], tokens: list[int]) -> bytes:
        """The hash of one more block."""
        parent = hashes[-1] if hashes else self._root
        key = blake2b(parent + self._pack(*tokens), digest_size=32).digest()
        hashes.append(key)
        return key

    def parent_hash(self, kv: RolloutKV) -> bytes:
        """Chain hash of the full blocks that are computed."""
        index = kv.num_computed_tokens // self.block_size
        return self._hash(kv, index - 1) if index else self._root

    def check_invariants(self) -> None:
        """Raise AssertionError if tables, references, host memory or the index disagree."""
        size = self.block_size
        held = [block for kv in self._tables for block in kv.blocks] + self._copied_from
        self._pool.check_invariants(held)
        parked = sum(kv.num_parked_blocks for kv in self._tables) + self._num_leaving_blocks
        assert parked == self._num_parked_blocks <= self._num_parking_blocks
        holders: dict[int, list[tuple[int, RolloutKV]]] = {}
        for kv in self._tables:
            covered = len(kv.blocks) if kv.parking_key is None else kv.num_parked_blocks
            assert covered * size >= kv.num_computed_tokens, "a table does not cover its tokens"
            assert kv.parking_key is None or not kv.blocks, "parked and in a table"
            assert kv.num_computed_tokens <= len(kv.ids)
            for index, block in enumerate(kv.blocks):
                holders.setdefault(block, []).append((index, kv))
        for block, users in holders.items():
            index, first = users[0]
            end = (index + 1) * size
            for other, kv in users[1:]:
                assert other == index, f"block {block} stands at two places"
                assert kv.ids[:end] == first.ids[:end], f"block {block} is shared by two contents"
                assert min(kv.num_computed_tokens, first.num_computed_tokens) >= end, (
                    f"block {block} is shared and may still be written"
                )
