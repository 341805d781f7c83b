"""Jobs of a batch → ended rollouts: plain ones, or durable ones that a restart goes on with.

With a journal every line has a key of its own, made of its id and content: a run that comes after
a kill finds what the one before began, and goes on at the token where it was. A line's rollouts
are acknowledged when its record is on the disk, so between the two nothing is lost or done twice.
"""

import itertools
import time

import msgspec

from ...engine.errors import UnknownRollout
from ...engine.journal.ops import Query, RequestKey
from ...engine.manager.intake import Submission, digest_of
from ...engine.manager.manager import RolloutManager
from ...engine.rollout import Rollout, RolloutState
from .lines import Job

HOLDER = "batch"
PAGE = 1000


class Jobs:
    """Runs jobs one by one or many at once.

    scope     of the keys, and pool of the rollouts: one batch; None: nothing is journaled
    priority  of its rollouts
    """

    def __init__(self, manager: RolloutManager, scope: str | None, *, priority: int = 0) -> None:
        self._manager = manager
        self._scope = scope
        self._priority = priority
        self._written: list[str] = []

    async def run(self, job: Job) -> list[Rollout]:
        """The job's rollouts once all have ended.

        Raises InvalidRequest where it cannot run, and what `RolloutManager.accept` and `wait` do.
        """
        submissions = [
            Submission(
                prompt_ids=prompt,
                sampling=job.sampling_of(index),
                samples=job.n,
                priority=self._priority,
                client=self._scope or "",
                pool=self._scope or "",
            )
            for index, prompt in enumerate(job.prompts)
        ]
        if self._scope is None:
            return await self._run_plain(submissions)
        return await self._run_durable(self._scope, job.custom_id, submissions)

    def wrote(self, rollouts: list[Rollout]) -> None:
        """Their record is written, though maybe not on the disk yet."""
        if self._scope is not None:
            self._written += [rollout.id for rollout in rollouts]

    async def acknowledge(self) -> None:
        """All that was written is on the disk."""
        written, self._written = self._written, []
        if written:
            await self._manager.acknowledge(written)

    async def finish(self) -> None:
        """Leave nothing in the journal: also what no line of this run asked for any more."""
        await self.acknowledge()
        if self._scope is None:
            return
        query = Query(pool=self._scope, limit=PAGE)
        while page := await self._manager.list(query):
            left = [summary.id for summary in page if not summary.is_acked]
            if left:
                await self._manager.cancel(left)
                await self._manager.acknowledge(left)
            query = msgspec.structs.replace(query, after=page[-1].number)

    async def _run_plain(self, submissions: list[Submission]) -> list[Rollout]:
        rollouts: list[Rollout] = []
        try:
            for submission in submissions:
                rollouts += self._manager.submit(submission)
            for rollout in rollouts:
                await self._manager.wait(rollout.id)
        finally:
            self._manager.drop([rollout.id for rollout in rollouts])
        return rollouts

    async def _run_durable(
        self, scope: str, custom_id: str, submissions: list[Submission]
    ) -> list[Rollout]:
        digest = digest_of(submissions)
        for attempt in itertools.count():
            key = RequestKey(
                holder=HOLDER,
                route=scope,
                key=f"{custom_id}\n{digest}\n{attempt}",
                body_digest=digest,
                created_s=time.time(),
            )
            accepted = await self._manager.accept(submissions, key)
            try:
                rollouts = [await self._manager.wait(i) for i in accepted.rollout_ids]
            except UnknownRollout:
                # an earlier run had its record, and somebody took that away: do it again
                continue
            if not accepted.is_replay or all(r.state is RolloutState.FINISHED for r in rollouts):
                return rollouts
            # it failed in an earlier run, and is asked for again
            await self._manager.acknowledge(accepted.rollout_ids)
        raise AssertionError("unreachable")
