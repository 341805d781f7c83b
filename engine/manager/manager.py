"""RolloutManager: what faces call to submit, read and control rollouts.

It checks what comes in and owns what lives: `Holdings`. `Collector` (engine/manager/collector.py) speaks
with the core: whatever a core knows it could be told again from here, so a core that dies costs
time. `Keeper` (engine/manager/keeping.py) speaks with the journal: what is durable outlives this process.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

from ..backend import Backend
from ..checkpoint.manifest import Version
from ..config import RestartConfig
from ..errors import (
    Conflict,
    Draining,
    EngineDied,
    EngineUnavailable,
    EverstepError,
    IllegalState,
    InvalidRequest,
    JournalError,
    Overloaded,
    UnknownRollout,
)
from ..journal.ops import Budget, Query, RequestKey
from ..journal.thread import JournalThread
from ..messages import Flipped, KVPolicy, Pause, Priority, Ready, Staged, Stats
from ..metrics import Counter, Gauge, Histogram, Registry
from ..rollout import Rollout, RolloutState
from ..tokenizer import Tokenizer
from ..trajectory import Trajectory
from .budgets import Budgets
from .collector import Collector
from .growth import Growth, durable_growth
from .holdings import Holdings
from .intake import Accepted, Submission
from .keeping import Ids, Keeper, Page, ids_of
from .readers import Delta, deltas, until
from .recovery import bring_back
from .transfer import export_of, forks_of, imported
from .versions import Versions

__all__ = ["Delta", "RolloutManager"]

Rollouts = list[Rollout]
Growths = list[Growth]
Metrics = list[Counter | Gauge | Histogram]
BudgetList = list[Budget]


class RolloutManager:
    """Owns every rollout: checks, submits, collects tokens, finds stop strings, ends.

    journal        what makes rollouts durable (`accept` …); it is closed with the manager
    retain_keys_s  how long an Idempotency-Key is remembered, as the journal does
    model_path     the folder that the backend was made with: a journal that was begun with another
                   does not bring its weights back
    allow_other_weights  whether journaled rollouts go on under weights that they were not begun with
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        run_seed: int = 0,
        max_live: int = 65536,
        restarts: RestartConfig = RestartConfig(),
        journal: JournalThread | None = None,
        retain_keys_s: float = 86400.0,
        allow_other_weights: bool = False,
        model_path: str = "",
        metrics: Registry | None = None,
    ) -> None:
        self.metrics = metrics or Registry()
        self._tokenizer = tokenizer
        self.run_seed = run_seed
        self._max_live = max_live
        self._num_submitted = 0
        self._allow_other_weights = allow_other_weights
        self.num_recovered = 0
        """Live rollouts that the journal brought back at the start."""
        self._is_recovered = False
        self._is_draining = False
        self._holdings = Holdings(self.metrics)
        self._versions = Versions(base=model_path, metrics=self.metrics)
        self._keeper: Keeper | None = None
        if journal is not None:
            self._keeper = Keeper(journal, self._holdings, retain_keys_s=retain_keys_s)
        self._budgets = Budgets(self._keeper, retain_keys_s=retain_keys_s, metrics=self.metrics)
        self._budgets.why_not_here = self._why_not_here
        self._core = Collector(
            backend,
            self._holdings,
            tokenizer,
            keeper=self._keeper,
            budgets=self._budgets,
            versions=self._versions,
            restarts=restarts,
            metrics=self.metrics,
        )
        # a pause is in force before it is journaled and a resume after: two at once would leave
        # the journal with one of them and the engine with the other
        self._pausing = asyncio.Lock()
        if self._keeper is not None:
            self._keeper.on_change = self._on_journal
            self._versions.journal = self._keeper.journal.commit

    @property
    def info(self) -> Ready:
        """What the core said when it was ready; raises EngineUnavailable before."""
        return self._core.info

    @property
    def known_info(self) -> Ready:
        """As `info`; while a core is started again, what the last one said."""
        return self._core.known_info

    @property
    def stats(self) -> Stats | None:
        """The core's latest."""
        return self._core.stats

    @property
    def is_healthy(self) -> bool:
        """False once the core has died for good."""
        return self._core.failure is None

    @property
    def journal_trouble(self) -> str | None:
        """Why nothing durable is taken now, or None."""
        return None if self._keeper is None else self._keeper.trouble

    def current_metrics(self) -> Metrics:
        """All that this process counts, as it is now."""
        self._holdings.count_states()
        self._budgets.count()
        return self.metrics.metrics

    @property
    def num_live(self) -> int:
        """Rollouts that have not ended."""
        return self._holdings.num_live

    async def start(self) -> None:
        """Start the backend, bring back what the journal holds, and collect.

        Raises what the backend raises; JournalError; ConfigError for a journal of other weights.
        """
        recovered = None
        if self._keeper is not None:
            recovered = await self._keeper.recover()
            self._budgets.restore(recovered.budgets)
            self._versions.restore(recovered.flips, recovered.flip)
        info = await self._core.start()
        if recovered is not None:
            self.num_recovered = bring_back(
                recovered,
                self._core,
                self._holdings,
                self._tokenizer,
                allow_other_weights=self._allow_other_weights,
            )
        self._versions.note_start(info, self._core.missing)
        self._is_recovered = True
        self._core.collect()

    def drain(self) -> None:
        """Take nothing new, and let the readers of durable rollouts go: those outlive this."""
        self._is_draining = True
        for growth in self._holdings:
            if growth.rollout.is_durable:
                growth.publish()
        self._budgets.publish()

    async def close(self) -> None:
        """Abort what is live and not durable, end the backend, write the journal and close it."""
        self.drain()
        live = self._holdings.live()
        self._core.cancel([growth for growth in live if not growth.rollout.is_durable])
        await self._core.close()
        if self._keeper is not None:
            await self._keeper.close()

    # --- submissions -------------------------------------------------------------------

    def submit(self, submission: Submission) -> Rollouts:
        """Check and queue; returns the rollouts, in sample order, before any token exists.

        Raises InvalidRequest (ContextTooLong), Overloaded, EngineUnavailable, Draining.
        """
        max_tokens = self._check(submission, self.info)
        if submission.pool and self._keeper is not None:
            raise InvalidRequest(
                f"pool: {submission.pool!r} may have token budgets, which outlive this process as "
                "the journal does; what it counts must be durable (`accept`)",
                field="pool",
            )
        self._check_room(submission.samples)
        self._num_submitted += 1
        source = ("rollout", self.run_seed, self._num_submitted)
        rollouts = submission.make(*source, max_tokens=max_tokens)
        self._holdings.num_live += len(rollouts)
        self._core.add([Growth(rollout, self._tokenizer) for rollout in rollouts])
        return rollouts

    async def accept(
        self, submissions: Submission | Sequence[Submission], key: RequestKey | None = None
    ) -> Accepted:
        """Make durable rollouts: on return they are in the journal, all of them or none.

        The same key with the same body gives the same ids, whatever came between. Raises as
        `submit` does, and KeyReused, JournalFull, JournalError. Goes on while a core is restarted.
        """
        many = [submissions] if isinstance(submissions, Submission) else list(submissions)

        async def make() -> Rollouts:
            info = self._core.known_info
            lengths = [self._check(submission, info) for submission in many]
            source = ("durable", self.run_seed, self._journaled.next_number())
            return [
                rollout
                for i, (submission, max_tokens) in enumerate(zip(many, lengths, strict=True))
                for rollout in submission.make(*source, i, max_tokens=max_tokens)
            ]

        return await self._accept(key, make)

    async def fork(
        self,
        rollout_id: str,
        at: int,
        *,
        samples: int = 1,
        seed: int | None = None,
        key: RequestKey | None = None,
    ) -> Accepted:
        """New durable rollouts that keep the first `at` output tokens of one that is there.

        One sample without a seed has the same noise, so it continues to the bit as its parent did
        or will. Raises as `accept` does, UnknownRollout, InvalidRequest naming `at` or `samples`.
        """

        async def make() -> Rollouts:
            parent, info = await self.find(rollout_id), self._core.known_info
            number = self._journaled.next_number()
            return forks_of(parent, at, samples=samples, seed=seed, number=number, info=info)

        return await self._accept(key, make)

    async def export(self, rollout_id: str) -> Trajectory:
        """A copy of what is published of it; the rollout itself stays. Raises UnknownRollout."""
        return export_of(await self.find(rollout_id), self._core.known_info, self._tokenizer)

    async def import_(
        self,
        trajectory: Trajectory,
        *,
        allow_other_weights: bool = False,
        key: RequestKey | None = None,
    ) -> Accepted:
        """Take in an exported rollout, under its id, to go on here; an ended one is kept.

        Raises as `accept` does, InvalidTrajectory naming the field, Conflict if the id is known.
        """

        async def make() -> Rollouts:
            if self._holdings.get(trajectory.id) is not None:
                raise Conflict(f"a rollout with the id {trajectory.id!r} is here already")
            info, tokenizer = self._core.known_info, self._tokenizer
            return [imported(trajectory, info, tokenizer, allow_other_weights=allow_other_weights)]

        return await self._accept(key, make)

    async def _accept(
        self, key: RequestKey | None, make: Callable[[], Awaitable[Rollouts]]
    ) -> Accepted:
        async def growths() -> Growths:
            rollouts = await make()
            self._check_room(len(rollouts))
            return [durable_growth(r, self._tokenizer, self._core.stop_ids(r)) for r in rollouts]

        return await self._journaled.accept(key, growths, self._core.add)

    @property
    def _kept(self) -> Keeper | None:
        """The keeper, once what its journal holds is here.

        Raises EngineUnavailable before: whoever read a live rollout then would wait for news of a
        copy, and a key that is in the journal would be taken for a new one.
        """
        if self._keeper is not None and not self._is_recovered:
            raise EngineUnavailable("the engine is loading, and the journal is not read yet")
        return self._keeper

    @property
    def _journaled(self) -> Keeper:
        keeper = self._kept
        if keeper is None:
            raise JournalError(
                "this server keeps no journal, so it takes no durable rollouts; "
                "start it with --journal PATH"
            )
        return keeper

    def check(self, submission: Submission) -> int:
        """The resolved max_tokens. Raises InvalidRequest where it can never run here."""
        return self._check(submission, self._core.known_info)

    def _check(self, submission: Submission, info: Ready) -> int:
        """The resolved max_tokens, or the error that says why it cannot run."""
        return submission.check(
            info, eos_ids=self._core.eos_ids, has_tokenizer=self._tokenizer is not None
        )

    def _check_room(self, count: int) -> None:
        if self._is_draining:
            raise Draining("the server is shutting down; send this elsewhere")
        if self.num_live + count > self._max_live:
            raise Overloaded(
                f"{self.num_live} rollouts are waiting or running, the limit is "
                f"{self._max_live}; try again later",
                retry_after_s=1.0,
            )

    # --- readers -----------------------------------------------------------------------

    def get(self, rollout_id: str) -> Rollout:
        """A rollout that is in memory; raises UnknownRollout."""
        growth = self._holdings.get(rollout_id)
        if growth is None:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        return growth.rollout

    def waits_for(self, rollout: Rollout) -> Literal["resume", "budget", "disk", "weights"] | None:
        """What a paused one stands still for."""
        if rollout.state is not RolloutState.PAUSED:
            return None
        if rollout.id in self._holdings.paused:
            return "resume"
        if rollout.is_durable and self.journal_trouble is not None:
            return "disk"
        if self._versions.waiting_for is not None:
            return "weights"
        return "budget" if self._budgets.is_metered(rollout.pool) else "resume"

    async def find(self, rollout_id: str) -> Rollout:
        """A rollout, live or ended, from memory or from the journal; raises UnknownRollout."""
        return (await self._growth(rollout_id)).rollout

    async def list(self, query: Query) -> Page:
        """Durable rollouts in order of acceptance."""
        return await self._journaled.list(query)

    async def stream(self, rollout_id: str, *, after: int = 0) -> AsyncIterator[Delta]:
        """Deltas from token `after` on until the last; any number of readers, each sees all of it.

        Raises UnknownRollout; InvalidRequest where it ends before token `after`; and, of a durable
        rollout that goes on elsewhere or later, Draining, EngineDied or JournalError.
        """
        growth = await self._growth(rollout_id)
        with self._holdings.reading(growth):
            async for delta in deltas(growth, after, self._tokenizer, self._why_not_here):
                yield delta

    async def wait(
        self, rollout_id: str, *, after: int | None = None, timeout_s: float | None = None
    ) -> Rollout:
        """The rollout once it has ended, or has more than `after` tokens, or the time is up.

        Raises as `stream` does.
        """
        growth = await self._growth(rollout_id)
        with self._holdings.reading(growth):
            await until(growth, after, timeout_s, self._why_not_here)
        return growth.rollout

    async def _growth(self, rollout_id: str) -> Growth:
        keeper, growth = self._kept, self._holdings.get(rollout_id)
        if growth is not None:
            return growth
        if keeper is None:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        found = await keeper.find(rollout_id)
        # it may have come in meanwhile: then news come to that one
        return self._holdings.get(rollout_id) or Growth(found, None)

    def _why_not_here(self) -> EverstepError | None:
        """Why durable rollouts, which live on, have no more news in this process."""
        if self._is_draining:
            return Draining(
                "the server is shutting down; the rollout is in its journal and goes on when it "
                "is started again"
            )
        if self._core.failure is not None:
            return EngineDied(f"{self._core.failure}; the rollout stays in the journal")
        if self._keeper is not None and self._keeper.failure is not None:
            return JournalError(self._keeper.failure)
        return None

    # --- control -----------------------------------------------------------------------

    async def pause(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """Stop these where they are (both None: all, and whatever comes until resume).

        Returns the ids it applied to; ended ones are left alone. Raises UnknownRollout, and then
        nothing was done.
        """
        async with self._pausing:
            growths = await self._named(ids, group)
            is_all = ids is None and group is None
            self._holdings.pause(growths, is_all=is_all)
            names = ids_of(growths)
            # by name: what is accepted from here on is paused when the core is told of it
            self._core.tell(Pause(names))
            if self._keeper is not None:
                await self._keeper.pause(growths, is_all=is_all)
        return names

    async def resume(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """Go on exactly where they stopped. Raises IllegalState where a named one has ended."""
        async with self._pausing:
            growths = await self._named(ids, group)
            names = ids_of(growths)
            ended = [rollout_id for rollout_id in ids or () if rollout_id not in names]
            if ended:
                raise IllegalState(f"rollout {ended[0]} has ended: it cannot be resumed")
            is_all = ids is None and group is None
            if self._keeper is not None:
                await self._keeper.resume(growths, is_all=is_all)
            if is_all:
                # those too that were accepted, and so paused, while this was journaled
                growths = self._holdings.live()
            self._holdings.resume(growths, is_all=is_all)
            self._core.resume(growths)
        return ids_of(growths)

    async def cancel(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """End these (state aborted). Ended ones are left as they are."""
        growths = await self._named(ids, group)
        self._core.cancel(growths)
        if self._keeper is not None:
            await self._keeper.flush()
        return ids_of(growths)

    async def acknowledge(
        self, ids: Sequence[str] | None = None, *, group: str | None = None
    ) -> Ids:
        """Their reader has them: only their names are kept for a while (both None: all ended).

        Raises IllegalState where one that is named has not ended; twice does no harm.
        """
        return await self._journaled.acknowledge(ids, group)

    def drop(self, rollout_ids: Sequence[str]) -> None:
        """Nobody reads these any more: what runs is cancelled, all is forgotten. Durable ones are
        left alone."""
        live = self._holdings.live(rollout_ids)
        self._core.cancel([growth for growth in live if not growth.rollout.is_durable])
        for rollout_id in rollout_ids:
            growth = self._holdings.get(rollout_id)
            if growth is not None and not growth.rollout.is_durable:
                self._holdings.forget(rollout_id)

    # --- token budgets of pools ----------------------------------------------------------

    async def open_budget(
        self, pool: str, tokens: int, key: RequestKey | None = None, *, places: int | None = None
    ) -> Budget:
        """Let the rollouts of a pool grow by so many tokens in all, then stand still; the same key
        gives the same budget. From its first one on a pool grows under an open budget only.

        places  how many of them run at once, the first that came; the others stand by (None: any
                number)

        Raises InvalidRequest naming the field, Conflict where it has an open one, KeyReused,
        Draining, EngineUnavailable, JournalFull, JournalError.
        """
        self._check_room(0)
        return await self._told_budgets.open(pool, tokens, key, places=places)

    async def close_budget(self, budget_id: str) -> Budget:
        """End it; what was in flight is counted. Raises UnknownBudget, JournalFull, JournalError."""
        return await self._told_budgets.close(budget_id)

    async def wait_budget(self, budget_id: str, timeout_s: float | None = None) -> Budget:
        """It once it is spent or closed, or the time is up. Raises UnknownBudget, and as `wait`."""
        return await self._told_budgets.wait(budget_id, timeout_s)

    def budget(self, budget_id: str) -> Budget:
        """It as it is now; raises UnknownBudget."""
        return self._told_budgets.get(budget_id)

    def budgets(self, pool: str | None = None) -> BudgetList:
        """In order of opening, as they are now."""
        return self._told_budgets.of(pool)

    @property
    def _told_budgets(self) -> Budgets:
        """Those of the journal among them; raises EngineUnavailable before."""
        self._kept  # noqa: B018
        return self._budgets

    # --- weights -----------------------------------------------------------------------

    @property
    def version(self) -> Version:
        """That which serves, or which rollouts wait for. Raises EngineUnavailable before."""
        current = self._versions.current
        if current is None:
            raise EngineUnavailable(self._core.failure or "the engine is loading")
        return current

    @property
    def versions(self) -> Versions:
        """All that is known of weights: what served, what is staged and how far it is."""
        return self._versions

    async def stage(
        self, path: str, priority: Priority = "background", *, rollback: int | None = None
    ) -> Staged:
        """Load a version's folder beside what serves, and check it; returns once it can be flipped
        to. Another one that is staged, or being staged, is given up.

        priority  beside generation (`messages.Stage`)
        rollback  the version's number, where the flip is to be a `rollback` to it

        Raises WeightsRefused, naming the tensor or the first layer that differs; CheckpointError;
        StaleVersion where its number or lineage is not to come; EngineUnavailable. Whatever is
        raised, what serves goes on serving.
        """
        return await self._weights.stage(path, priority, rollback=rollback)

    async def flip(self, version: int, kv: KVPolicy = "keep") -> Flipped:
        """Serve the staged version from the next step on; returns once that is journaled.

        kv  what becomes of the KV of live rollouts (`messages.Flip`)

        No rollout ends by it. Raises IllegalState unless that version is staged; EngineUnavailable.
        """
        return await self._weights.flip(version, kv)

    async def update_weights(
        self, path: str, kv: KVPolicy = "keep", priority: Priority = "background"
    ) -> tuple[Staged, Flipped]:
        """`stage`, then `flip`."""
        staged = await self.stage(path, priority)
        return staged, await self.flip(staged.version, kv)

    async def unstage(self) -> None:
        """Give up what is staged or being staged, if anything is."""
        await self._weights.unstage()

    async def rollback(
        self,
        version: int,
        *,
        path: str | None = None,
        kv: KVPolicy = "keep",
        priority: Priority = "background",
    ) -> Flipped:
        """Serve a version again by its name; a new lineage begins (`self.version.lineage`), and
        versions of the old one are refused from then on.

        path  its folder, where it never served here or its files are elsewhere now
        """
        return await self._weights.roll_back(version, path, kv, priority)

    @property
    def _weights(self) -> Versions:
        """Raises EngineUnavailable while no core could be told."""
        _ = self._core.info
        return self._versions

    async def _named(self, ids: Sequence[str] | None, group: str | None) -> Growths:
        """The live ones that are meant; raises UnknownRollout where one was never here."""
        keeper, holdings = self._kept, self._holdings
        if group is not None:
            found = [g for g in holdings.live() if g.rollout.group_id == group]
            if not found and not (keeper and await keeper.has_group(group)):
                raise UnknownRollout(f"no group has the id {group!r}")
            return found
        for rollout_id in ids or ():
            is_here = holdings.get(rollout_id) is not None
            if not is_here and not (keeper and await keeper.is_known(rollout_id)):
                raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        return holdings.live(None if ids is None else dict.fromkeys(ids))

    def _on_journal(self) -> None:
        """Its journal has stalled, goes on, or has failed."""
        self._core.hold()
        if self._keeper is not None and self._keeper.failure is not None:
            for growth in self._holdings:
                growth.publish()
            self._budgets.publish()
