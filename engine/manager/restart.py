"""A core that dies is started again, with growing delays, until that is given up."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

from .. import log
from ..config import RestartConfig
from ..errors import EngineDied, EngineUnavailable, EverstepError
from ..messages import Died, Ready


async def restart(
    start: Callable[[], Awaitable[Ready]], died: Died, deaths: int, config: RestartConfig
) -> Ready:
    """Start it until it runs.

    deaths  in a row, without a token in between

    Raises EngineDied with the last reason when the attempts are used up, or when the start fails
    for a reason that waiting does not mend (a checkpoint that is gone).
    """
    reason = died.message
    for attempt in count(deaths):
        if config.attempts is not None and attempt > config.attempts:
            break
        log.event("core.died", level="error", reason=reason, attempt=attempt)
        # the exponent is bounded: a float overflows long before somebody's patience ends
        delay_s = config.first_delay_s * 4 ** min(attempt - 1, 30)
        await asyncio.sleep(min(delay_s, config.max_delay_s))
        try:
            return await start()
        except EngineUnavailable as error:
            reason = str(error)
        except EverstepError as error:
            reason = str(error)
            break
    raise EngineDied(f"the engine died: {reason}")
