"""What delivered samples earn: the configured reward over each, in worker processes."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from ..rewards.rewards import RewardConfig, reward_sample
from ..rewards.workers import RewardPool
from .parts import Delivered, Groups


class Scorer:
    """Scores groups. on_note: told of samples that could not be scored, a line for each."""

    def __init__(self, config: RewardConfig, on_note: Callable[[str], None]) -> None:
        self._pool, self._note = RewardPool(config), on_note

    async def start(self) -> None:
        """Raises ConfigError where the reward cannot be used."""
        await self._pool.start()

    async def score(self, groups: Groups) -> Groups:
        """The same groups with rewards; a sample that cannot be scored has none."""
        return await asyncio.gather(*map(self._group, groups))

    async def close(self) -> None:
        await self._pool.close()

    async def _group(self, members: Sequence[Delivered]) -> Sequence[Delivered]:
        outcomes = await self._pool.score_all(
            [reward_sample(member.rollout, prompt=_text(member.prompt.raw)) for member in members]
        )
        for outcome in outcomes:
            if outcome.failure is not None:
                self._note(outcome.failure)
        pairs = zip(members, outcomes, strict=True)
        return [replace(member, reward=outcome.reward) for member, outcome in pairs]


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
