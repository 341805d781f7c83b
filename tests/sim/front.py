"""A front: the real manager, keeper and journal logic over simulated disk, core and network."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from everstep.engine.config import RestartConfig
from everstep.engine.errors import EngineUnavailable, EverstepError, StaleVersion, WeightsRefused
from everstep.engine.journal.ops import Budget, BudgetState, JournalStore, Query, RequestKey
from everstep.engine.journal.thread import JournalThread, _call_soon
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Flipped, KVPolicy
from everstep.engine.rollout import Rollout, RolloutState, SamplingParams
from everstep.engine.trajectory import encode, pack, seal, unseal

from .core import CoreSettings, SimBackend
from .disk import SimDisk
from .history import History
from .language import BASE, EOS, folder_of
from .loop import Process, SimLoop
from .network import Network

RESTARTS = RestartConfig(attempts=None, first_delay_s=0.02, max_delay_s=0.1)


class FrontSettings(Struct, frozen=True):
    """commit_s: what a commit takes; compact_s: how often the journal is compacted; kv_policy: what
    flips do with KV, None: now this, now that."""

    core: CoreSettings
    commit_s: float
    compact_s: float
    max_live: int
    kv_policy: KVPolicy | None


class LoopJournal(JournalThread):
    """The journal's thread as a task: all that it does is the thread's, but for how it waits."""

    def __init__(self, store: JournalStore, host: "FrontHost", **options: Any) -> None:
        self._host = host
        self.num_untold = 0
        """Commits that are done, and nobody knows of it."""
        super().__init__(store, **options)

    def _begin(self) -> None:
        self._work = self._bell = _Bell()  # type: ignore[assignment]
        self._task = asyncio.get_running_loop().create_task(self._drive())

    async def _ended(self) -> None:
        await self._task

    async def _drive(self) -> None:
        for timeout_s in self._all():
            if not self._items and not self._is_closing:
                self._bell.clear()
                await self._bell.wait(timeout_s)
            if self._items:
                await self._host.use_disk()

    def _try(self, batch: Any) -> EverstepError | None:
        error = super()._try(batch)
        has_ops = any(item.op is not None for item in batch)
        if self._host.doom is not None and has_ops and self._host.journal is self:
            # one that found the disk full has written nothing
            self._host.crash(is_power=self._host.doom, in_commit=error is None)
        return error

    def _settle(self, items: Any, *result: Any) -> None:
        self.num_untold += 1
        super()._settle(items, *result)
        _call_soon(asyncio.get_running_loop(), self._told)

    def _told(self) -> None:
        self.num_untold -= 1


class _Bell:
    """Stands for the thread's condition: there is one thread, so the lock is nobody's."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None

    def notify(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    async def wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            pass


class FrontHost:
    """A machine with a disk, on which a front is started again when it is dead."""

    def __init__(
        self,
        name: str,
        loop: SimLoop,
        network: Network,
        history: History,
        disk: SimDisk,
        settings: FrontSettings,
        rng: random.Random,
    ) -> None:
        self.name = name
        self._loop, self._network, self._history = loop, network, history
        self.disk, self._settings, self._rng = disk, settings, rng
        self.on_ready: Callable[[str], None] = lambda _: None
        self.on_crash: Callable[[bool], None] = lambda _: None
        """Whether the power went too."""
        self.process: Process | None = None
        self.manager: RolloutManager | None = None
        self.backend: SimBackend | None = None
        self.journal: LoopJournal | None = None
        self.slow = 1.0
        """How many times slower the disk is than usual."""
        self.doom: bool | None = None
        """Die in the middle of the next commit; True: the power goes too."""
        self.flipping = 0
        """Flips that are asked for and not answered."""

    @property
    def is_ready(self) -> bool:
        """It has brought back what its journal holds."""
        return self.manager is not None and self.manager._standing.is_recovered

    @property
    def is_up(self) -> bool:
        return self.process is not None and not self.process.is_dead

    def start(self) -> None:
        if not self.is_up:
            self.process = Process(self._loop, self.name)
            self.process.spawn(self._main(self.process))

    async def _main(self, process: Process) -> None:
        try:
            self.flipping = 0
            store = self.disk.open()
            self.journal = LoopJournal(store, self, compact_every_s=self._settings.compact_s)
            self.backend = SimBackend(
                f"core-{self.name}",
                self._settings.core,
                self._rng,
                lambda fault: self._history.note(self.name, "fault", what=fault),
            )
            self.manager = RolloutManager(
                self.backend,
                None,
                run_seed=ord(self.name),
                max_live=self._settings.max_live,
                restarts=RESTARTS,
                journal=self.journal,
                model_path=folder_of(BASE),
            )
            self._network.serve(self.name, process, self._handle)
            self._history.note(self.name, "start")
            while True:
                try:
                    await self.manager.start()
                    break
                except EngineUnavailable:
                    await asyncio.sleep(0.05)
            self._history.note(
                self.name,
                "ready",
                recovered=self.manager.num_recovered,
                version=self.manager.version.number,
            )
            self._note_weights()
            self.on_ready(self.name)
        except EverstepError as error:
            self._history.note(self.name, "broken", error=f"{type(error).__name__}: {error}")

    # --- what happens to the machine -----------------------------------------------------

    async def use_disk(self) -> None:
        """What the disk takes for the work that follows."""
        await asyncio.sleep(self._settings.commit_s * self.slow * (0.2 + self._rng.random()))

    def crash(self, *, is_power: bool, in_commit: bool = False, away_s: float = 0.0) -> None:
        """kill -9 of the front, and so of its core; is_power: the machine lost what is not synced;
        away_s: it is started again so much later than usual."""
        if self.process is None or self.process.is_dead:
            return
        self.doom = None
        self._note_moment(in_commit=in_commit)
        self.process.kill()
        self.manager = self.backend = self.journal = None
        self.disk.crash(is_power=is_power, in_commit=in_commit)
        self._history.note(
            self.name,
            "crash",
            is_power=is_power,
            in_commit=in_commit,
            is_safe=not is_power or self.disk.config.durability == "power",
            kept=self.disk.lengths(),
        )
        self.on_crash(is_power)
        self._loop.outside(away_s + 0.05 + self._rng.random() * 0.3, self.start)

    @property
    def _has_open_budget(self) -> bool:
        if not self.is_ready:
            return False
        assert self.manager is not None
        return any(budget.state is BudgetState.OPEN for budget in self.manager.budgets.of())

    def kill_core(self) -> None:
        if self.backend is not None and self.backend.process is not None:
            sometimes = self._history.sometimes
            sometimes("core crash")
            sometimes("core crash with an open budget", self._has_open_budget)
            sometimes("core crash during a flip", self.flipping > 0)
            self._history.note(self.name, "core crash")
            self.backend.process.kill()

    def _note_moment(self, *, in_commit: bool) -> None:
        """In which interesting moment it dies."""
        sometimes = self._history.sometimes
        sometimes("front crash")
        sometimes("front crash in the middle of a commit", in_commit)
        sometimes("front crash during a flip", self.flipping > 0)
        sometimes("front crash with an open budget", self._has_open_budget)
        if self.manager is None or self.journal is None:
            sometimes("front crash while it starts")
            return
        sometimes("front crash between journal and publish", self.journal.num_untold > 0)
        sometimes("front crash with a full disk", self.journal.stalled is not None)
        for growth in self.manager._holdings:
            if growth.rollout.state is RolloutState.PAUSED:
                sometimes("front crash with a paused rollout")
                break

    # --- what it answers -----------------------------------------------------------------

    async def _handle(self, method: str, values: dict[str, Any]) -> Any:
        manager = self.manager
        assert manager is not None
        match method:
            case "submit":
                request, key = values["request"], values["key"]
                submission = Submission(
                    prompt_ids=list(request["prompt"]),
                    sampling=SamplingParams(
                        max_tokens=request["max_tokens"],
                        seed=request["seed"],
                        stop_token_ids=request["stops"],
                    ),
                    samples=request["samples"],
                    priority=request["priority"],
                    pool=request.get("pool", ""),
                )
                accepted = await manager.accept(submission, _key("/rollouts", key, request))
                return accepted.group_id, tuple(accepted.rollout_ids), accepted.is_replay
            case "fork":
                accepted = await manager.fork(
                    values["id"],
                    values["at"],
                    samples=values["samples"],
                    pool=(await manager.find(values["id"])).pool,
                    key=_key("/fork", values["key"], ""),
                )
                return accepted.group_id, tuple(accepted.rollout_ids), accepted.is_replay
            case "export":
                return seal(await manager.export(values["id"]))
            case "import":
                accepted = await manager.import_(
                    unseal(values["data"]), key=_key("/import", values["key"], values["data"])
                )
                return accepted.group_id, tuple(accepted.rollout_ids), accepted.is_replay
            case "works":
                return await asyncio.gather(*(_work(manager, work) for work in values["works"]))
            case "get":
                return snapshot(await manager.find(values["id"]))
            case "rollouts":
                several = await manager.find_many(values["ids"], timeout_s=values["wait_s"])
                return [encode(pack(rollout)) for rollout in several.rollouts], several.unknown
            case "wait":
                rollout = await manager.wait(
                    values["id"], after=values["after"], timeout_s=values["wait_s"]
                )
                return snapshot(rollout)
            case "list":
                found = await manager.list(Query(limit=10_000))
                return tuple((s.id, str(s.state), s.num_output_tokens, s.is_acked) for s in found)
            case "summaries":
                return await manager.list(replace(values["query"], limit=10_000))
            case "pause" | "resume" | "cancel" | "acknowledge":
                return tuple(await getattr(manager, method)(values["ids"]))
            case "open_budget":
                pool, tokens, places = values["pool"], values["tokens"], values.get("places")
                key = _key("/rollouts/budget", values["key"], [tokens, places])
                return budget_of(await manager.budgets.open(pool, tokens, key, places=places))
            case "close_budget":
                return budget_of(await manager.budgets.close(values["id"]))
            case "budget":
                return budget_of(await manager.budgets.wait(values["id"], values["wait_s"]))
            case "budgets":
                return [budget_of(one) for one in manager.budgets.of(values["pool"])]
            case "update":
                return await self._update(values["version"])
            case "mend":
                # somebody brings the weights that it waits for
                return self._serving or await self._update(manager.version.number)
            case "ready":
                # as /ready says it
                info, waiting_for = manager.info, manager.versions.waiting_for
                return info.version, info.digest, info.numerics, waiting_for
            case "weights":
                return manager.version, manager.versions.waiting_for
            case "stage":
                path, priority = values["path"], values["priority"]
                return await manager.versions.stage(path, priority, rollback=values["rollback"])
            case "flip":
                return await self._flip(manager, values["version"], values["kv"])
            case "unstage":
                return await manager.versions.unstage()
            case "version":
                return self._serving
        raise AssertionError(method)

    async def _flip(self, manager: RolloutManager, version: int, kv: KVPolicy) -> Flipped:
        self.flipping += 1
        try:
            return await manager.versions.flip(version, kv)
        finally:
            self.flipping -= 1

    async def _update(self, version: int) -> int:
        """Have the weights of a version staged, and flip to them; returns which serve then."""
        manager = self.manager
        assert manager is not None
        kv = self._settings.kv_policy or self._rng.choice(["keep", "recompute", "recompute-prompt"])
        try:
            staged = await manager.versions.stage(folder_of(version))
            self.flipping += 1
            try:
                await manager.versions.flip(staged.version, kv)
            finally:
                self.flipping -= 1
            self._history.note(self.name, "serves", version=version, kv=kv)
        except StaleVersion:
            pass
        except WeightsRefused as error:
            self._history.note(self.name, "refuses", version=version, why=str(error))
            self._history.sometimes("weights refused")
            raise
        return self._serving

    @property
    def _serving(self) -> int:
        """0: rollouts wait for weights."""
        assert self.manager is not None
        versions = self.manager.versions
        return 0 if versions.waiting_for is not None else self.manager.version.number

    def _note_weights(self) -> None:
        self._history.sometimes("weights missing after a restart", self._serving == 0)


def budget_of(budget: Budget) -> dict[str, Any]:
    """What a reader of a budget is given."""
    return {
        "id": budget.id,
        "tokens": budget.tokens,
        "used": budget.used,
        "state": str(budget.state),
    }


async def _work(manager: RolloutManager, work: dict[str, Any]) -> list[str] | tuple[str, str]:
    """Rollouts of a run, as one of POST /rollouts/submit: ids, or what is its own fault."""
    fields = {name: value for name, value in work.items() if name != "idempotency_key"}
    wanted = {name: v for name, v in fields.items() if name not in ("messages", "prompt")}
    try:
        key = _key("/rollouts", work["idempotency_key"], fields)
        accepted = await manager.accept(Submission(**wanted), key)
    except EverstepError as error:
        if error.retryable or error.status >= 500:
            raise
        return error.code, str(error)
    return list(accepted.rollout_ids)


def _key(route: str, key: str, body: object) -> RequestKey:
    digest = hashlib.blake2b(repr(body).encode(), digest_size=8).hexdigest()
    return RequestKey(holder="", route=route, key=key, body_digest=digest)


def snapshot(rollout: Rollout) -> dict[str, Any]:
    """What a reader is given, as it is at this moment."""
    reason = rollout.finish_reason
    return {
        "id": rollout.id,
        "group": rollout.group_id,
        "index": rollout.index,
        "prompt": tuple(rollout.prompt_ids),
        "seed": rollout.seed,
        "max_tokens": rollout.max_tokens,
        "stops": tuple(sorted(rollout.sampling.ending_ids([EOS]))),
        "state": str(rollout.state),
        "ids": tuple(rollout.output_ids),
        "lps": tuple(rollout.lp_sampled),
        "versions": tuple(rollout.versions),
        "segments": tuple((s.start, s.version, s.digest, s.kv) for s in rollout.segments),
        "finish": None if reason is None else (reason.type, reason.matched, reason.detail),
        "forked_from": rollout.forked_from,
        "pool": rollout.pool,
        "attempt": rollout.attempt,
    }
