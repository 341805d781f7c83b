"""KV blocks: which are free, who holds them, and which known tokens they hold.

A block is free when nothing refers to it; free blocks that hold known tokens stay findable until
they are handed out again, in the order in which they were released.

    ref count   in free queue   in index     the block is
    0           yes             no           empty; handed out first
    0           yes             yes          cached: a hit takes it back, else evicted in LRU order
    ≥ 1         no              no           being written, or a copy of what the index has already
    ≥ 1         no              yes          in use and findable

Block 0 is the null block: never free, never handed out, never written.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from msgspec import Struct


class Filling(Protocol):
    """The writer of a block that is not full yet."""

    num_computed_tokens: int


class Content(Struct, eq=False):
    """Tokens that a block holds after those that `parent` stands for.

    A full block has a `key`, the hash of its whole chain. A block that is still being written has
    a `writer`: it holds as many of `ids` from `start` on as its writer has computed.
    """

    parent: bytes
    key: bytes | None
    ids: Sequence[int]
    start: int = 0
    writer: Filling | None = None

    @property
    def num_tokens(self) -> int:
        if self.writer is None:
            return len(self.ids)
        return self.writer.num_computed_tokens - self.start


class BlockPool:
    """Reference counts, the free queue in eviction order, and the index of contents; all O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._contents: dict[int, Content] = {}
        self._by_key: dict[bytes, int] = {}
        # children by parent and first token: only those can share a prefix with what is sought
        self._children: dict[tuple[bytes, int], dict[int, Content]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks, each with one reference; what they held is forgotten.

        The caller has checked `num_free`.
        """
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        return [self.allocate_one() for _ in range(count)]

    def allocate_one(self) -> int:
        """As `allocate`, a single block."""
        block, _ = self._free.popitem(last=False)
        if block in self._contents:
            self.forget(block)
        self._ref_counts[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, free (cached) or in use."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each; later ones of a table are evicted before earlier ones."""
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} is released more often than it is held"
            self._ref_counts[block] = count
            if count == 0:
                self._free[block] = None
                if block not in self._contents:
                    self._free.move_to_end(block, last=False)

    def find(self, key: bytes) -> int | None:
        """The full block whose chain hash is `key`."""
        return self._by_key.get(key)

    def children(self, parent: bytes, first_token: int) -> Collection[tuple[int, Content]]:
        """Blocks, full or not, that follow `parent` and begin with this token."""
        return self._children.get((parent, first_token), {}).items()

    def register(self, block: int, content: Content) -> bool:
        """Make a block findable; replaces what was known of it.

        False if another block holds the same full content: the index keeps one of each.
        """
        if block in self._contents:
            self.forget(block)
        if content.key is not None:
            if content.key in self._by_key:
                return False
            self._by_key[content.key] = block
        self._contents[block] = content
        place = (content.parent, content.ids[content.start])
        if place in self._children:
            self._children[place][block] = content
        else:
            self._children[place] = {block: content}
        return True

    def complete(self, block: int, key: bytes, tokens: Sequence[int]) -> bool:
        """A block that was being filled is full; False if the index has it not as such.

        Where another block holds the same full content, this one is forgotten.
        """
        content = self._contents.get(block)
        if content is None or content.writer is None:
            return False
        if key in self._by_key:
            self.forget(block)
        else:
            content.key, content.ids, content.start, content.writer = key, tokens, 0, None
            self._by_key[key] = block
        return True

    def freeze(self, block: int) -> None:
        """The writer of a block lets go of it: what it has computed so far stays findable."""
        content = self._contents.get(block)
        if content is not None and content.writer is not None:
            content.ids = content.ids[content.start : content.writer.num_computed_tokens]
            content.start, content.writer = 0, None

    def forget(self, block: int) -> None:
        """Take a block out of the index; it keeps its references."""
        content = self._contents.pop(block, None)
        if content is None:
            return
        if content.key is not None:
            del self._by_key[content.key]
        place = (content.parent, content.ids[content.start])
        siblings = self._children[place]
        del siblings[block]
        if not siblings:
            del self._children[place]

    def check_invariants(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless references are exactly `held` (with repetitions)."""
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the tables"
        assert counts[0] == 0, "the null block is in a table"
        free = {block for block in range(1, self.num_blocks) if counts[block] == 0}
        assert set(self._free) == free, "the free queue differs from the blocks without references"
        keys = {c.key: block for block, c in self._contents.items() if c.key is not None}
        assert keys == self._by_key, "two keys name one block, or a key names none"
        children = {
            (place, block): content
            for place, siblings in self._children.items()
            for block, content in siblings.items()
        }
        assert len(children) == len(self._contents)
        for (place, block), content in children.items():
            assert self._contents[block] is content
            assert place == (content.parent, content.ids[content.start])
            assert content.num_tokens > 0, f"block {block} is indexed and empty"
            assert content.writer is None or counts[block] > 0, f"block {block} is free and written"
