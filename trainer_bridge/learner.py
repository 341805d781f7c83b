"""What complete groups are for: a trainer at the other end of the bridge, or nobody.

    rewards ▸ spool (durable) ▸ announced to the ranks ▸ trained ▸ the new version serves

All of it may be done twice: after a kill an iteration that is spooled is announced again, and one
that was trained is said again by the trainer.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ..engine.messages import KVPolicy
from ..engine.trajectory import pack
from .protocol import Member, TrajectoryGroup
from .reward_workers import RewardPool
from .rewards import reward_sample
from .rollout_driver import Delivered, Groups
from .spool import Spool
from .trajectory_sender import TrajectorySender

# for the ranks to save what they have
FINISH_S = 60.0


class Host(Protocol):
    """An engine that serves versions."""

    async def serve(self, version: int, path: str, kv: KVPolicy) -> str:
        """Serve the version in this folder from now on; returns a line about it.

        Raises WeightsRefused, CheckpointError, EngineUnavailable.
        """
        ...


class BridgeLearner:
    """Sends groups to a trainer, and serves what it makes of them.

    rewards     scores each sample
    kv          what becomes of the KV of unfinished rollouts at a new version
    deadline_s  for an iteration to be trained
    on_note     said to the user, one line
    """

    def __init__(
        self,
        sender: TrajectorySender,
        spool: Spool,
        rewards: RewardPool,
        hosts: Sequence[Host],
        *,
        kv: KVPolicy,
        deadline_s: float,
        on_note: Callable[[str], None],
    ) -> None:
        self._sender, self._spool, self._rewards = sender, spool, rewards
        self._hosts, self._kv = hosts, kv
        self._deadline_s, self._note = deadline_s, on_note

    async def start(self) -> None:
        """Raises ConfigError where the reward or the address cannot be used."""
        await self._rewards.start()
        self._note(f"waits for a trainer at {await self._sender.start()}")
        for earlier in self._spool.iterations:
            self._sender.announce(earlier)

    async def train(self, iteration: int, groups: Groups) -> int:
        """Raises PeerMissing naming who does not answer; WeightsRefused for a version that is not
        what its trainer meant."""
        if iteration not in self._spool.iterations and iteration > self._sender.dealer.acked:
            self._spool.add(iteration, await asyncio.gather(*map(self._group, groups)))
        self._sender.announce(iteration)
        trained = await self._sender.trained(iteration, self._deadline_s)
        asked = (host.serve(trained.version, trained.path, self._kv) for host in self._hosts)
        for note in await asyncio.gather(*asked):
            self._note(note)
        return trained.version

    async def finish(self, reason: str) -> None:
        await self._sender.finish(reason, FINISH_S)

    async def close(self) -> None:
        await self._sender.close()
        await self._rewards.close()

    async def _group(self, members: Sequence[Delivered]) -> TrajectoryGroup:
        outcomes = await self._rewards.score_all(
            [reward_sample(member.rollout, prompt=_text(member.prompt.raw)) for member in members]
        )
        for outcome in outcomes:
            if outcome.failure is not None:
                self._note(outcome.failure)
        return TrajectoryGroup(
            name=members[0].sample.prompt,
            members=[
                Member(trajectory=pack(member.rollout), reward=outcome.reward)
                for member, outcome in zip(members, outcomes, strict=True)
            ],
        )


class _Line(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict[str, object]] = []


def _text(raw: bytes) -> str:
    """What was asked, as far as a prompt's line has it as text: its prompt, or its last message."""
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except msgspec.MsgspecError:
        return ""
    last = line.messages[-1].get("content") if line.messages else None
    return line.prompt or (last if isinstance(last, str) else "")
