"""The load that `everstep chaos` runs beside the user's own, and what it has seen of it.

Groups with fixed seeds are submitted, streamed and acknowledged; what came over the streams is
compared with the whole rollout at its end. Those that a kill hit are generated a second time,
undisturbed, and compared to the bit.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from ..engine.errors import EngineUnavailable
from ..engine.rollout import Rollout, RolloutState

if TYPE_CHECKING:
    from ..clients.async_client import AsyncClient

POOL = "chaos"
SAMPLES = 2
# ids that every vocabulary has
_IDS = 200
_COLUMNS = ("output_ids", "lp_sampled", "lp_temp", "kept_mass")


class Seen(Struct):
    """One rollout by what its stream has shown."""

    prompt_ids: list[int]
    num_tokens: int = 0
    columns: dict[str, list[Any]] = field(default_factory=dict)
    has_ended: bool = False
    was_hit: bool = False
    """By a kill, between its first and its last token."""
    final: Rollout | None = None

    @property
    def is_in_mid_stream(self) -> bool:
        return self.num_tokens > 0 and not self.has_ended


class Load:
    """`width` groups at a time until `stop`; faults are sentences."""

    def __init__(self, client: "AsyncClient", *, width: int, max_tokens: int) -> None:
        self.seen: dict[str, Seen] = {}
        self.num_delivered = 0
        self.num_acknowledged = 0
        self.num_duplicates = 0
        self.num_identical_tokens = 0
        self.faults: list[str] = []
        self._client, self._width, self._max_tokens = client, width, max_tokens
        self._name = secrets.token_hex(4)
        self._is_stopped = False

    async def run(self) -> None:
        """Until `stop` was called and everything is delivered."""
        await asyncio.gather(*(self._work(number) for number in range(self._width)))

    def stop(self) -> None:
        self._is_stopped = True

    def hit(self) -> int:
        """A kill happens now: how many streams it finds between first and last token."""
        found = [seen for seen in self.seen.values() if seen.is_in_mid_stream]
        for seen in found:
            seen.was_hit = True
        return len(found)

    async def check_again(self) -> None:
        """Generate what was hit a second time; every token must be the same."""
        hit = [seen for seen in self.seen.values() if seen.was_hit and seen.final is not None]
        for start in range(0, len(hit), 16):
            await asyncio.gather(*(self._again(seen) for seen in hit[start : start + 16]))

    async def check_list(self) -> None:
        """Nothing that was acknowledged may wait for a reader again."""
        async for summary in self._client.list(pool=POOL):
            if summary.id in self.seen and not summary.is_acked:
                self.num_duplicates += 1
                self.faults.append(f"{summary.id} was acknowledged and is offered again")

    async def _work(self, number: int) -> None:
        rng = random.Random(f"{self._name}/{number}")
        count = 0
        while not self._is_stopped:
            count += 1
            prompt_ids = [rng.randrange(1, _IDS) for _ in range(rng.randrange(4, 24))]
            group = await self._client.submit(
                prompt_ids=prompt_ids,
                samples=SAMPLES,
                sampling=self._sampling(rng.getrandbits(62)),
                pool=POOL,
                idempotency_key=f"chaos-{self._name}-{number}-{count}",
            )
            if len(set(group.rollout_ids)) != SAMPLES or self.seen.keys() & group.rollout_ids:
                self.faults.append(f"{group.group_id}: ids {group.rollout_ids}")
            for rollout_id in group.rollout_ids:
                self.seen[rollout_id] = Seen(prompt_ids)
            await asyncio.gather(*(self._follow(rollout_id) for rollout_id in group.rollout_ids))
            await self._client.ack(group.rollout_ids)
            self.num_acknowledged += len(group.rollout_ids)

    def _sampling(self, seed: int) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens, "ignore_eos": True, "seed": seed}

    async def _follow(self, rollout_id: str) -> None:
        seen = self.seen[rollout_id]
        async for event in self._client.stream(rollout_id):
            if event.start != seen.num_tokens:
                self.faults.append(f"{rollout_id}: token {event.start} after {seen.num_tokens}")
            for name in _COLUMNS:
                seen.columns.setdefault(name, []).extend(getattr(event, name))
            seen.num_tokens = event.end
        seen.has_ended = True
        final = await self._client.get(rollout_id)
        self.num_delivered += 1
        if final.state is not RolloutState.FINISHED:
            self.faults.append(f"{rollout_id} ended as {final.state}: {final.finish_reason}")
        for name in _COLUMNS:
            if seen.columns.get(name, []) != getattr(final, name):
                self.faults.append(f"{rollout_id}: {name} were streamed otherwise than delivered")
        seen.columns.clear()
        # of the others nothing is compared any more
        seen.final = final if seen.was_hit else None

    async def _again(self, seen: Seen) -> None:
        final = seen.final
        assert final is not None
        group = await self._client.submit(
            prompt_ids=seen.prompt_ids, sampling=self._sampling(final.seed), pool=POOL
        )
        [twin_id] = group.rollout_ids
        twin = await self._client.wait(twin_id)
        await self._client.ack([twin_id])
        for name in _COLUMNS:
            if getattr(twin, name) != getattr(final, name):
                self.faults.append(f"{final.id}: {name} differ when it is generated again")
                return
        self.num_identical_tokens += len(twin.output_ids)


class Watch:
    """All rollouts of the server, looked at now and then: what none of them may ever do."""

    def __init__(self, client: "AsyncClient") -> None:
        self.faults: list[str] = []
        self.num_watched = 0
        self._client = client
        self._known: dict[str, tuple[RolloutState, int, bool]] = {}
        # rollouts that had tokens at a kill and had not ended: it hit them if they get more
        self._hit: list[dict[str, int]] = []

    async def look(self) -> None:
        """Compare with the last look. A rollout that was acknowledged may be forgotten."""
        now: dict[str, tuple[RolloutState, int, bool]] = {}
        async for summary in self._client.list():
            now[summary.id] = (summary.state, summary.num_output_tokens, summary.is_acked)
        for rollout_id, (state, num, is_acked) in self._known.items():
            found = now.get(rollout_id)
            if found is None:
                if not is_acked:
                    self.faults.append(f"{rollout_id} is not known any more")
                continue
            if is_acked and not found[2]:
                self.faults.append(f"{rollout_id} was acknowledged and is offered again")
            if state.is_ended and (found[0], found[1]) != (state, num) and not found[2]:
                self.faults.append(f"{rollout_id} had ended as {state} and is {found[0]}")
            if found[1] < num and not found[2]:
                self.faults.append(f"{rollout_id} had {num} tokens and has {found[1]}")
        self.num_watched += len(now.keys() - self._known.keys())
        self._known = now

    def hit(self) -> None:
        """A kill happens now."""
        live = {i: n for i, (state, n, _) in self._known.items() if n and not state.is_ended}
        self._hit.append(live)

    def num_hits(self) -> int:
        """Kills between the first and the last token of a rollout."""
        return sum(
            any(i in self._known and self._known[i][1] > n for i, n in live.items())
            for live in self._hit
        )


async def until_ready(url: str, timeout_s: float) -> float:
    """Wait until the server has a core that takes work; returns the seconds.

    Raises EngineUnavailable.
    """
    import httpx

    began = time.monotonic()
    async with httpx.AsyncClient() as http:
        while True:
            try:
                answer = await http.get(f"{url}/ready", timeout=5.0)
                if answer.status_code == 200:
                    return time.monotonic() - began
                said = f"{url}/ready says {answer.status_code}"
            except httpx.TransportError as error:
                said = f"no answer from {url}: {error or type(error).__name__}"
            if time.monotonic() - began > timeout_s:
                raise EngineUnavailable(said)
            await asyncio.sleep(0.05)


def summed(faults: Sequence[str], limit: int = 20) -> list[str]:
    more = [f"… and {len(faults) - limit} more"] if len(faults) > limit else []
    return [*faults[:limit], *more]
