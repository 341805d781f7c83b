"""How a rollout is read while it grows: by deltas, or by waiting for its news."""

import asyncio
from collections.abc import AsyncIterator, Callable

from msgspec import Struct

from ..errors import EverstepError, InvalidRequest
from ..rollout import Rollout
from ..tokenizer import Tokenizer
from .growth import Growth, text_at

WhyNotHere = Callable[[], EverstepError | None]
"""Why a durable rollout that is live has no more news in this process; None: it has."""


class Delta(Struct):
    """News of one rollout: its tokens [start, end) and the text that became final with them.

    The per-token values are read from the rollout itself: `rollout.output_ids[start:end]` ….
    Text may lag behind tokens (half a UTF-8 character, the beginning of a stop string).
    """

    rollout: Rollout
    start: int
    end: int
    text: str
    is_last: bool


async def deltas(
    growth: Growth, after: int, tokenizer: Tokenizer | None, why_not_here: WhyNotHere
) -> AsyncIterator[Delta]:
    """Deltas from token `after` on until the last.

    Raises InvalidRequest where it ends before token `after`, and what `why_not_here` says.
    """
    rollout = growth.rollout
    while len(rollout.output_ids) < after:
        if not growth.is_live:
            raise InvalidRequest(
                f"after: {rollout.id} ended with {len(rollout.output_ids)} tokens, got {after}",
                field="after",
            )
        await _news(growth, why_not_here)
    start, text = after, text_at(rollout, after, tokenizer) if after else 0
    while True:
        news = growth.news
        end, is_last = len(rollout.output_ids), rollout.state.is_ended
        new = rollout.text[text:]
        if end > start or new or is_last:
            yield Delta(rollout, start, end, new, is_last)
            # while the reader took its time the rollout went on: count what was given
            start, text = end, text + len(new)
        if is_last:
            return
        if growth.news is news:
            await _news(growth, why_not_here)


async def until(
    growth: Growth, after: int | None, timeout_s: float | None, why_not_here: WhyNotHere
) -> None:
    """Return once it has ended, or has more than `after` tokens, or the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            while growth.is_live and (after is None or len(growth.rollout.output_ids) <= after):
                await _news(growth, why_not_here)
    except TimeoutError:
        return


async def _news(growth: Growth, why_not_here: WhyNotHere) -> None:
    if growth.rollout.is_durable and growth.is_live:
        error = why_not_here()
        if error is not None:
            raise error
    await growth.news.wait()
