"""How a rollout is read while it grows: by deltas, or by waiting for its news."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from msgspec import Struct

from ..errors import EverstepError, InvalidRequest
from ..rollout import Rollout
from ..tokenizer import Tokenizer
from .growth import Growth, text_at
from .holdings import Holdings
from .keeping import Keeper

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


async def several(
    ids: Sequence[str], holdings: Holdings, keeper: Keeper | None
) -> tuple[list[Growth], dict[str, str]]:
    """Those that are here, from memory or from the journal, and why the others are not."""
    get = holdings.get
    here = {name: growth for name in ids if (growth := get(name)) is not None}
    missing = [name for name in dict.fromkeys(ids) if name not in here]
    if not missing:
        return list(here.values()), {}
    if keeper is None:
        return list(here.values()), {name: f"no rollout has the id {name!r}" for name in missing}
    found, unknown = await keeper.find_many(missing)
    # it may have come in meanwhile: then news come to that one
    there = [get(rollout.id) or Growth(rollout, None) for rollout in found]
    return [*here.values(), *there], unknown


async def until_any(
    growths: Sequence[Growth], bell: asyncio.Event, timeout_s: float, why_not_here: WhyNotHere
) -> None:
    """Return once one of them has ended, or the time is up. bell: rings with their news."""
    is_durable = any(growth.rollout.is_durable for growth in growths)
    try:
        async with asyncio.timeout(timeout_s):
            while all(growth.is_live for growth in growths):
                error = why_not_here() if is_durable else None
                if error is not None:
                    raise error
                await bell.wait()
                bell.clear()
    except TimeoutError:
        return


async def _news(growth: Growth, why_not_here: WhyNotHere) -> None:
    if growth.rollout.is_durable and growth.is_live:
        error = why_not_here()
        if error is not None:
            raise error
    await growth.news.wait()
