"""RolloutManager: what faces call to submit, read and control rollouts.

It checks what comes in and owns what lives (`Holdings`), and hands on what each of these does:

    Collector  speaks with the core: whatever a core knows it could be told again from here, so a
               core that dies costs time
    Keeper     speaks with the journal: what is durable outlives this process
    Control    pauses, resumes, cancels and acknowledges
    Budgets, Versions   of pools and of the weights: faces call them by `budgets` and `versions`
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

from ..backend import Backend
from ..checkpoint.manifest import Version
from ..config import RestartConfig
from ..errors import Conflict, EngineUnavailable, InvalidRequest, UnknownRollout
from ..journal.ops import Query, RequestKey
from ..journal.thread import JournalThread
from ..messages import Ready, Stats
from ..metrics import Counter, Gauge, Histogram, Registry
from ..rollout import Found, Rollout, RolloutState
from ..tokenizer import Tokenizer
from ..trajectory import Trajectory
from .budgets import Budgets
from .collector import Collector
from .control import Control
from .growth import Growth, durable_growth
from .holdings import Holdings
from .intake import Accepted, Submission
from .keeping import Ids, Keeper, Page
from .readers import Delta, deltas, several, until, until_any
from .recovery import bring_back
from .standing import Standing
from .transfer import export_of, forks_of, imported
from .versions import Versions

__all__ = ["Delta", "RolloutManager"]

ResultT = TypeVar("ResultT")
Rollouts = list[Rollout]
Growths = list[Growth]
Metrics = list[Counter | Gauge | Histogram]


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
        self.run_seed = run_seed
        self.num_recovered = 0
        """Live rollouts that the journal brought back at the start."""
        self._tokenizer = tokenizer
        self._num_submitted = 0
        self._allow_other_weights = allow_other_weights
        self._holdings = Holdings(self.metrics)
        self._keeper: Keeper | None = None
        if journal is not None:
            self._keeper = Keeper(journal, self._holdings, retain_keys_s=retain_keys_s)
        self._standing = Standing(self._holdings, self._keeper, max_live=max_live)
        self.versions = Versions(base=model_path, metrics=self.metrics)
        """Of the weights: what serves, what is staged, what served; they are changed here too."""
        self.budgets = Budgets(
            self._standing, self._keeper, retain_keys_s=retain_keys_s, metrics=self.metrics
        )
        """Of tokens, which pools may grow by."""
        self._core = Collector(
            backend,
            self._holdings,
            tokenizer,
            keeper=self._keeper,
            budgets=self.budgets,
            versions=self.versions,
            restarts=restarts,
            metrics=self.metrics,
        )
        self._standing.core_failure = lambda: self._core.failure
        self._control = Control(self._holdings, self._core, self._standing)
        if self._keeper is not None:
            self._keeper.on_change = self._on_journal
            self.versions.journal = self._keeper.journal.commit

    @property
    def info(self) -> Ready:
        """What the core said when it was ready; raises EngineUnavailable before."""
        return self._core.info

    @property
    def known_info(self) -> Ready:
        """As `info`; while a core is started again, what the last one said."""
        return self._core.known_info

    @property
    def version(self) -> Version:
        """That which serves, or which rollouts wait for. Raises EngineUnavailable before."""
        current = self.versions.current
        if current is None:
            raise EngineUnavailable(self._core.failure or "the engine is loading")
        return current

    @property
    def stats(self) -> Stats | None:
        """The core's latest."""
        return self._core.stats

    @property
    def is_healthy(self) -> bool:
        """False once the core has died for good."""
        return self._core.failure is None

    @property
    def is_draining(self) -> bool:
        """True once nothing new is taken."""
        return self._standing.is_draining

    @property
    def journal_trouble(self) -> str | None:
        """Why nothing durable is taken now, or None."""
        return None if self._keeper is None else self._keeper.trouble

    def current_metrics(self) -> Metrics:
        """All that this process counts, as it is now."""
        self._holdings.count_states()
        self.budgets.count()
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
            self.budgets.restore(recovered.budgets)
            self.versions.restore(recovered.flips, recovered.flip)
        info = await self._core.start()
        if recovered is not None:
            self.num_recovered = bring_back(
                recovered,
                self._core,
                self._holdings,
                self._tokenizer,
                allow_other_weights=self._allow_other_weights,
            )
        self.versions.note_start(info, self._core.missing)
        self._standing.is_recovered = True
        self._core.collect()

    def drain(self) -> None:
        """Take nothing new, and let the readers of durable rollouts go: those outlive this."""
        self._standing.is_draining = True
        for growth in self._holdings:
            if growth.rollout.is_durable:
                growth.publish()
        self.budgets.publish()

    async def close(self) -> None:
        """Abort what is live and not durable, end the backend, write the journal and close it."""
        self.drain()
        live = self._holdings.live()
        self._core.cancel([growth for growth in live if not growth.rollout.is_durable])
        await self._core.close()
        if self._keeper is not None:
            await self._keeper.close()

    def _on_journal(self) -> None:
        """Its journal has stalled, goes on, or has failed."""
        self._core.hold()
        if self._keeper is not None and self._keeper.failure is not None:
            for growth in self._holdings:
                growth.publish()
            self.budgets.publish()

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
        self._standing.check_room(submission.samples)
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
            source = ("durable", self.run_seed, self._standing.journaled.next_number())
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
        pool: str = "",
        key: RequestKey | None = None,
    ) -> Accepted:
        """New durable rollouts that keep the first `at` output tokens of one that is there.

        One sample without a seed has the same noise, so it continues to the bit as its parent did
        or will. They are of `pool`, not of their parent's, on whose budget nobody counts them.
        Raises as `accept` does, UnknownRollout, InvalidRequest naming `at` or `samples`.
        """

        async def make() -> Rollouts:
            parent, info = await self.find(rollout_id), self._core.known_info
            number = self._standing.journaled.next_number()
            return forks_of(
                parent, at, samples=samples, seed=seed, pool=pool, number=number, info=info
            )

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
            self._standing.check_room(len(rollouts))
            return [durable_growth(r, self._tokenizer, self._core.stop_ids(r)) for r in rollouts]

        return await self._standing.journaled.accept(key, growths, self._core.add)

    def check(self, submission: Submission) -> int:
        """The resolved max_tokens. Raises InvalidRequest where it can never run here."""
        return self._check(submission, self._core.known_info)

    def _check(self, submission: Submission, info: Ready) -> int:
        """The resolved max_tokens, or the error that says why it cannot run."""
        return submission.check(
            info, eos_ids=self._core.eos_ids, has_tokenizer=self._tokenizer is not None
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
        if self.versions.waiting_for is not None:
            return "weights"
        return "budget" if self.budgets.is_metered(rollout.pool) else "resume"

    async def find(self, rollout_id: str) -> Rollout:
        """A rollout, live or ended, from memory or from the journal; raises UnknownRollout."""
        return (await self._growth(rollout_id)).rollout

    async def list(self, query: Query) -> Page:
        """Durable rollouts in order of acceptance."""
        return await self._standing.journaled.list(query)

    async def stream(self, rollout_id: str, *, after: int = 0) -> AsyncIterator[Delta]:
        """Deltas from token `after` on until the last; any number of readers, each sees all of it.

        Raises UnknownRollout; InvalidRequest where it ends before token `after`; and, of a durable
        rollout that goes on elsewhere or later, Draining, EngineDied or JournalError.
        """
        growth = await self._growth(rollout_id)
        with self._holdings.reading(growth):
            async for delta in deltas(growth, after, self._tokenizer, self._standing.why_not_here):
                yield delta

    async def wait(
        self, rollout_id: str, *, after: int | None = None, timeout_s: float | None = None
    ) -> Rollout:
        """The rollout once it has ended, or has more than `after` tokens, or the time is up.

        Raises as `stream` does.
        """
        growth = await self._growth(rollout_id)
        with self._holdings.reading(growth):
            await until(growth, after, timeout_s, self._standing.why_not_here)
        return growth.rollout

    async def find_many(self, ids: Sequence[str], *, timeout_s: float | None = None) -> Found:
        """These as they are now; with a time, those that have ended, once one has or it is up.

        Ids that nobody knows are named, and waited for by nobody. Raises as `stream` does.
        """
        growths, unknown = await several(ids, self._holdings, self._standing.kept)
        if timeout_s is not None:
            if not unknown:
                with self._holdings.following(growths) as bell:
                    await until_any(growths, bell, timeout_s, self._standing.why_not_here)
            growths = [growth for growth in growths if not growth.is_live]
        return Found([growth.rollout for growth in growths], unknown)

    async def _growth(self, rollout_id: str) -> Growth:
        keeper, growth = self._standing.kept, self._holdings.get(rollout_id)
        if growth is not None:
            return growth
        if keeper is None:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        found = await keeper.find(rollout_id)
        # it may have come in meanwhile: then news come to that one
        return self._holdings.get(rollout_id) or Growth(found, None)

    # --- control -----------------------------------------------------------------------

    async def pause(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """Stop these where they are (both None: all, and whatever comes until resume).

        Returns the ids it applied to; ended ones are left alone. Raises UnknownRollout, and then
        nothing was done.
        """
        return await self._control.pause(ids, group)

    async def resume(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """Go on exactly where they stopped. Raises IllegalState where a named one has ended."""
        return await self._control.resume(ids, group)

    async def cancel(self, ids: Sequence[str] | None = None, *, group: str | None = None) -> Ids:
        """End these (state aborted). Ended ones are left as they are."""
        return await self._control.cancel(ids, group)

    async def acknowledge(
        self, ids: Sequence[str] | None = None, *, group: str | None = None
    ) -> Ids:
        """Their reader has them: only their names are kept for a while (both None: all ended).

        Raises IllegalState where one that is named has not ended; twice does no harm.
        """
        return await self._control.acknowledge(ids, group)

    async def unless_stalled(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of one of these, for one who does not wait for a full disk: JournalFull
        once the journal stalls. Then nothing was done, or it is done when there is room."""
        return await (work if self._keeper is None else self._keeper.unless_stalled(work))

    def drop(self, rollout_ids: Sequence[str]) -> None:
        """Nobody reads these any more: what runs is cancelled, all is forgotten. Durable ones are
        left alone."""
        self._control.drop(rollout_ids)
