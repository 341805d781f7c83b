"""How a rollout is read while it grows: by deltas, or by waiting for its news."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from msgspec import Struct

from .errors import InvalidRequest
from .growth import Growth, text_at
from .rollout import Rollout
from .tokenizer import Tokenizer

WaitForNews = Callable[[Growth], Awaitable[None]]
"""Returns when there may be news of a live one; raises if none will come here."""


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
    growth: Growth, after: int, tokenizer: Tokenizer | None, wait_for_news: WaitForNews
) -> AsyncIterator[Delta]:
    """Deltas from token `after` on until the last.

    Raises InvalidRequest where it ends before token `after`, and what `wait_for_news` raises.
    """
    rollout = growth.rollout
    while len(rollout.output_ids) < after:
        if not growth.is_live:
            raise InvalidRequest(
                f"after: {rollout.id} ended with {len(rollout.output_ids)} tokens, got {after}",
                field="after",
            )
        await wait_for_news(growth)
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
            await wait_for_news(growth)


async def until(
    growth: Growth, after: int | None, timeout_s: float | None, wait_for_news: WaitForNews
) -> None:
    """Return once it has ended, or has more than `after` tokens, or the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            while growth.is_live and (after is None or len(growth.rollout.output_ids) <= after):
                await wait_for_news(growth)
    except TimeoutError:
        return
