"""Idempotency-Keys: what is sent twice under one key is done once.

The journal keeps a key with the rollouts that were accepted under it, in one transaction; this
table answers, and makes those who come while the first is at work wait for it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from msgspec.structs import replace

from ..errors import KeyReused
from ..journal.ops import RequestKey

Make = Callable[[RequestKey | None], Awaitable[list[str]]]


class RequestKeys:
    """Keys of the last `retain_s` seconds, in order of their first use."""

    def __init__(self, retain_s: float, *, clock: Callable[[], float] = time.time) -> None:
        self._retain_s = retain_s
        self._clock = clock
        self._known: dict[tuple[str, str, str], tuple[RequestKey, asyncio.Future[list[str]]]] = {}

    def restore(self, keys: Iterable[tuple[RequestKey, list[str]]]) -> None:
        """Take over what a journal has."""
        for key, rollout_ids in sorted(keys, key=lambda item: item[0].created_s):
            done: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
            done.set_result(rollout_ids)
            self._known[key.name] = (key, done)

    async def once(self, key: RequestKey | None, make: Make) -> tuple[list[str], bool]:
        """(rollout ids, whether they were there already). `make` gets the key to be journaled.

        Raises KeyReused where the key came with another body. What `make` raises is raised to all
        who wait for it, and the key is free again.
        """
        if key is None:
            return await make(None), False
        self._expire()
        name = key.name
        known = self._known.get(name)
        if known is not None:
            first, done = known
            check_same_body(key, first.body_digest)
            return await asyncio.shield(done), True
        key = replace(key, created_s=self._clock())
        done = asyncio.get_running_loop().create_future()
        self._known[name] = (key, done)
        try:
            rollout_ids = await make(key)
        except BaseException as error:
            del self._known[name]
            if isinstance(error, Exception):
                done.set_exception(error)
                done.exception()  # whether somebody else waits or not, it has been seen
            else:
                done.cancel()
            raise
        done.set_result(rollout_ids)
        return rollout_ids, False

    def _expire(self) -> None:
        oldest_s = self._clock() - self._retain_s
        expired = []
        for name, (key, _) in self._known.items():
            if key.created_s > oldest_s:
                break
            expired.append(name)
        for name in expired:
            del self._known[name]


def check_same_body(key: RequestKey, first_digest: str | None) -> None:
    """Raise KeyReused unless it comes with the body that it was first used with."""
    if first_digest != key.body_digest:
        raise KeyReused(
            f"the Idempotency-Key {key.key!r} was used before on {key.route} with another "
            "body; repeat that body, or take a new key"
        )
