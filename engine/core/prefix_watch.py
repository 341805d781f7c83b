"""Who is computing which prefix right now, and who had better wait for it.

A group's rollouts arrive at once with one prompt. The first is admitted; the others would compute
the same tokens in the same steps. They follow it instead, outside of the queue, until the common
part is computed (and found in the prefix cache) or the leader stops for whatever reason.
A leader is always running, so it moves on or stops: nobody waits for ever.
"""

from .admission import LiveRollout
from .kv_cache import KVCacheManager, Match, common_prefix


class PrefixWatch:
    """Leaders by the chain hash of the full blocks that they have computed, and their followers."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self._leaders: dict[bytes, dict[LiveRollout, None]] = {}
        self.num_followers = 0

    def begin(self, rollout: LiveRollout) -> None:
        """A running rollout has a gap to close that others may find useful."""
        if self._kv.is_sharing(rollout.kv):
            self._list(rollout)

    def advance(self, rollout: LiveRollout, *, is_done: bool) -> list[LiveRollout]:
        """It has computed more; returns the followers that need not wait any longer."""
        if is_done:
            return self.end(rollout)
        self._unlist(rollout)
        self._list(rollout)
        reached = rollout.kv.num_computed_tokens
        return self._free([f for f, until in rollout.followers.items() if until <= reached])

    def end(self, rollout: LiveRollout) -> list[LiveRollout]:
        """It computes no more (done, preempted, paused, ended); returns its followers."""
        if rollout.parent_hash is not None:
            self._unlist(rollout)
        return self._free(list(rollout.followers))

    def clear(self) -> list[LiveRollout]:
        """Nothing that is being computed will be shared; returns all followers."""
        leaders = [leader for group in self._leaders.values() for leader in group]
        return [follower for leader in leaders for follower in self.end(leader)]

    def follow(self, rollout: LiveRollout, match: Match, limit: int) -> bool:
        """Let a rollout wait for who computes what it needs; False if it should go ahead.

        Worth a wait: a block, or half of what is left to compute. Never for somebody of lower
        priority, who may be held up by others.
        """
        remaining = limit - match.num_tokens
        if remaining <= 0:
            return False
        best, until = None, 0
        start = len(match.blocks) * self._kv.block_size
        for leader in self._leaders.get(match.parent, ()):
            is_related = leader.ids[start : start + 1] == rollout.ids[start : start + 1]
            if not is_related or leader.add.priority < rollout.add.priority:
                continue
            common = common_prefix(leader.ids, rollout.ids, start, limit)
            gain = common - match.num_tokens
            if common > until and (gain >= self._kv.block_size or 2 * gain >= remaining):
                best, until = leader, common
        if best is None:
            return False
        best.followers[rollout] = until
        rollout.follows = best
        self.num_followers += 1
        return True

    def unfollow(self, rollout: LiveRollout) -> None:
        assert rollout.follows is not None
        del rollout.follows.followers[rollout]
        rollout.follows = None
        self.num_followers -= 1

    def _free(self, followers: list[LiveRollout]) -> list[LiveRollout]:
        for follower in followers:
            self.unfollow(follower)
        return followers

    def _list(self, rollout: LiveRollout) -> None:
        rollout.parent_hash = self._kv.parent_hash(rollout.kv)
        self._leaders.setdefault(rollout.parent_hash, {})[rollout] = None

    def _unlist(self, rollout: LiveRollout) -> None:
        assert rollout.parent_hash is not None
        group = self._leaders[rollout.parent_hash]
        del group[rollout]
        if not group:
            del self._leaders[rollout.parent_hash]
        rollout.parent_hash = None

    def check_invariants(self) -> None:
        """Raise AssertionError unless leaders run and followers and leaders agree."""
        num_followers = 0
        for parent_hash, group in self._leaders.items():
            for leader in group:
                assert leader.state == "running", f"{leader.id} leads and is {leader.state}"
                assert leader.parent_hash == parent_hash == self._kv.parent_hash(leader.kv)
                num_followers += len(leader.followers)
                for follower in leader.followers:
                    assert follower.follows is leader
        assert num_followers == self.num_followers
