"""The engine of this process, as a run of C3PO++ sees it: a manager with a journal."""

import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from ...engine.checkpoint.manifest import Version
from ...engine.errors import StaleVersion, UnknownRollout
from ...engine.journal.ops import Budget as EngineBudget
from ...engine.journal.ops import BudgetState, Query, RequestKey
from ...engine.manager.intake import Submission, digest_of
from ...engine.manager.manager import RolloutManager
from ...engine.messages import Flipped, KVPolicy, Priority
from ...engine.rollout import Rollout, RolloutState
from .engine import Budget, Facts, Prompt, Seen, Work
from .hosts import Prepared

HOLDER = "rollout"
PAGE = 1000
UNBOUNDED = 2**53


class ManagerEngine:
    """An `Engine` over a manager that has started; it is closed with it.

    encode    a prompt's ids; raises InvalidRequest
    priority  of staging a version, beside steps of generation
    """

    def __init__(
        self,
        name: str,
        manager: RolloutManager,
        encode: Callable[[Prompt], list[int]],
        *,
        priority: Priority = "background",
    ) -> None:
        self.name = name
        self._priority = priority
        self._manager = manager
        self._encode = encode

    async def start(self) -> Facts:
        info = self._manager.info
        return Facts(info.version, info.digest, info.numerics)

    async def prepare(self, prompt: Prompt) -> Prompt:
        prepared = prompt
        if prompt.prompt_ids is None:
            prepared = replace(prompt, prompt_ids=self._encode(prompt), prompt=None, messages=None)
        self._manager.check(_submission(prepared, "", "", 0))
        return prepared

    async def submit(self, work: Work) -> str:
        submission = _submission(work.prompt, work.group_id, work.pool, work.attempt)
        submission.sampling = work.sampling
        accepted = await self._manager.accept(submission, _key("submit", work.key, submission))
        [rollout_id] = accepted.rollout_ids
        return rollout_id

    async def ended(self, rollout_id: str) -> Rollout:
        return await self._manager.wait(rollout_id)

    async def read(self, rollout_id: str) -> Rollout:
        rollout = await self._manager.find(rollout_id)
        if rollout.state.is_ended:
            return rollout
        # as it is now, whatever comes
        lists = {
            name: value[:]
            for name in rollout.__struct_fields__
            if isinstance(value := getattr(rollout, name), list)
        }
        return replace(rollout, **lists)

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        await self._manager.unless_stalled(self._manager.cancel(rollout_ids))

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        await self._manager.unless_stalled(self._manager.acknowledge(rollout_ids))

    async def known(self, pool: str) -> list[Seen]:
        found: list[Seen] = []
        query = Query(pool=pool, limit=PAGE)
        while page := await self._manager.list(query):
            found += [
                Seen(s.id, s.state.is_ended, s.state is RolloutState.ABORTED, s.is_acked)
                for s in page
            ]
            query = replace(query, after=page[-1].number)
        return found

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        tokens = UNBOUNDED if tokens is None else tokens
        body = [pool, tokens] if places is None else [pool, tokens, places]
        request_key = _key("budget", key, body)
        return _seen(await self._manager.budgets.open(pool, tokens, request_key, places=places))

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        return _seen(await self._manager.budgets.wait(budget_id, wait_s))

    async def budgets(self, pool: str) -> list[Budget]:
        return [_seen(budget) for budget in self._manager.budgets.of(pool)]

    async def close_budget(self, budget_id: str) -> None:
        await self._manager.budgets.close(budget_id)

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        found = []
        for rollout_id in rollout_ids:
            try:
                rollout = self._manager.get(rollout_id)
            except UnknownRollout:
                continue
            if rollout.pool == pool:
                found.append(len(rollout.output_ids))
        return found

    # as `hosts.Host`

    async def serves(self, version: Version) -> bool:
        current, versions = self._manager.version, self._manager.versions
        return (current.number, current.digest) == (version.number, version.digest) and (
            versions.waiting_for is None
        )

    async def stage(self, version: Version) -> Prepared:
        try:
            staged = await self._manager.versions.stage(version.folder, self._priority)
        except StaleVersion:
            staged = await self._manager.versions.stage(
                version.folder, self._priority, rollback=version.number
            )
            return Prepared(staged.report, is_back=True)
        return Prepared(staged.report, is_back=False)

    async def flip(self, version: Version, kv: KVPolicy) -> Flipped:
        return await self._manager.versions.flip(version.number, kv)

    async def unstage(self) -> None:
        await self._manager.versions.unstage()

    async def close(self) -> None:
        await self._manager.close()


def _submission(prompt: Prompt, group_id: str, pool: str, attempt: int) -> Submission:
    assert prompt.prompt_ids is not None
    return Submission(
        prompt_ids=prompt.prompt_ids,
        sampling=prompt.sampling,
        group_id=group_id or None,
        pool=pool,
        attempt=attempt,
        metadata=prompt.metadata,
    )


def _key(route: str, key: str, body: object) -> RequestKey:
    return RequestKey(HOLDER, route, key, digest_of(body), created_s=time.time())


def _seen(budget: EngineBudget) -> Budget:
    return Budget(budget.id, budget.used, budget.state is BudgetState.OPEN)
