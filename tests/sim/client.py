"""A client: it submits groups, reads them, meddles with them, hands them over, acknowledges.

What it has written down outlives it. Calls with an unknown outcome are made again, under the same
key, until the outcome is known.
"""

import asyncio
import random
from typing import Any

from msgspec import Struct, field

from .history import History
from .language import VOCAB
from .loop import Process, SimLoop
from .network import Network, NoAnswer, Refused
from .profile import Profile

FRONTS = ("A", "B")


class Move(Struct):
    """A rollout on its way to another front. data: what was exported."""

    to: str
    key: str
    data: bytes | None = None
    is_imported: bool = False


class Job(Struct):
    """A group, from the wish to have it until it was acknowledged."""

    key: str
    front: str
    method: str
    values: dict[str, Any]
    ids: tuple[str, ...] | None = None
    group: str = ""
    where: dict[str, str] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)
    moves: dict[str, Move] = field(default_factory=dict)
    let_go: set[tuple[str, str]] = field(default_factory=set)
    """Acknowledged, at a front, at least once."""
    is_delivered: bool = False
    is_done: bool = False

    @property
    def open_ids(self) -> list[str]:
        return [rollout_id for rollout_id in self.ids or () if rollout_id not in self.finals]


class Client:
    def __init__(
        self,
        loop: SimLoop,
        network: Network,
        history: History,
        profile: Profile,
        rng: random.Random,
    ) -> None:
        self._loop, self._network, self._history = loop, network, history
        self._profile, self._rng = profile, rng
        self.process: Process | None = None
        self.is_calm = False
        """There are no more faults: what was paused is to go on."""
        self.jobs: dict[str, Job] = {}
        self._num_keys = 0
        self._num_wanted = profile.num_jobs

    @property
    def is_done(self) -> bool:
        return self._num_wanted == 0 and all(job.is_done for job in self.jobs.values())

    def start(self) -> None:
        if self.process is None or self.process.is_dead:
            self.process = Process(self._loop, "client")
            self.process.spawn(self._submit_all())
            self.process.spawn(self._meddle())
            for job in self.jobs.values():
                self._work(job)

    def crash(self) -> None:
        if self.process is not None and not self.process.is_dead:
            self._history.sometimes("client crash")
            self._history.sometimes(
                "client crash in a move", any(j.moves for j in self.jobs.values())
            )
            self._history.note("client", "crash")
            self.process.kill()
            self._loop.outside(0.2, self.start)

    # --- groups --------------------------------------------------------------------------

    async def _submit_all(self) -> None:
        rng = self._rng
        while self._num_wanted:
            prompt = (*range(1, rng.randint(2, 9)), rng.randrange(VOCAB))
            request = {
                "prompt": prompt,
                "max_tokens": min(rng.choice([1, 3, 6, 10, 24]), 39 - len(prompt)),
                "seed": rng.choice([None, None, rng.randrange(100)]),
                "stops": (rng.randrange(VOCAB),) if rng.random() < 0.2 else (),
                "samples": rng.randint(1, 3),
                "priority": rng.choice([0, 0, 1]),
            }
            self._want("submit", self._front(), request=request)
            self._num_wanted -= 1
            await asyncio.sleep(rng.expovariate(1.0) * self._profile.span_s / 10)

    def _front(self) -> str:
        return self._rng.choice("AAAB")

    def _want(self, method: str, front: str, **values: Any) -> None:
        self._num_keys += 1
        key = f"k{self._num_keys}"
        self.jobs[key] = Job(key, front, method, values)
        self._history.note("client", "asks", key=key, front=front, method=method, **values)
        self._work(self.jobs[key])

    def _work(self, job: Job) -> None:
        assert self.process is not None
        if not job.is_done:
            self.process.spawn(self._see_through(job))

    async def _see_through(self, job: Job) -> None:
        if job.ids is None and not await self._ask(job):
            return
        assert self.process is not None
        for rollout_id, move in list(job.moves.items()):
            self.process.spawn(self._move(job, rollout_id, move))
        await asyncio.gather(*(self._follow(job, rollout_id) for rollout_id in job.open_ids))
        if not job.is_delivered:
            await self._deliver(job)
        for rollout_id in job.ids or ():
            await self._let_go(job, job.where[rollout_id], rollout_id)
            if self._rng.random() < 0.3:
                await self._probe(job.where[rollout_id], rollout_id)
        job.is_done = True

    async def _ask(self, job: Job) -> bool:
        """Until the outcome is known; False: it was refused."""
        try:
            answer = await self._insist(job.front, job.method, key=job.key, **job.values)
        except Refused as refusal:
            self._history.note(
                "client", "refused", key=job.key, code=refusal.code, why=str(refusal)
            )
            job.is_done = True
            return False
        group, ids, is_replay = answer
        self._history.note(
            "client",
            "accepted",
            key=job.key,
            front=job.front,
            group=group,
            ids=ids,
            replay=is_replay,
        )
        self._history.sometimes("the same key again", is_replay)
        job.where = dict.fromkeys(ids, job.front)
        job.group, job.ids = group, ids
        return True

    async def _deliver(self, job: Job) -> None:
        """To the trainer, again and again until it says that it will not forget the group."""
        values = {"group": job.key, "rollouts": dict(job.finals)}
        while not await self._insist("trainer", "offer", **values):
            await asyncio.sleep(0.1 + self._rng.random() * 0.2)
        job.is_delivered = True

    async def _let_go(self, job: Job, front: str, rollout_id: str) -> None:
        """Acknowledge it. Names of those that were acknowledged are kept for a while only, so an
        answer that says it is unknown may mean that an earlier call was heard."""
        is_again = (front, rollout_id) in job.let_go
        job.let_go.add((front, rollout_id))
        try:
            await self._insist(front, "acknowledge", ids=[rollout_id])
        except Refused as refusal:
            if not is_again or refusal.code != "rollout_not_found":
                raise
        self._history.note("client", "acked", front=front, id=rollout_id)

    async def _probe(self, front: str, rollout_id: str) -> None:
        """What was acknowledged is not given again."""
        try:
            await self._network.call(self._me(), front, "get", 0.5, id=rollout_id)
            self._history.note("client", "probed", front=front, id=rollout_id, is_known=True)
        except (NoAnswer, Refused):
            pass

    async def _follow(self, job: Job, rollout_id: str) -> None:
        """Read it until it has ended, wherever it goes."""
        while rollout_id not in job.finals:
            front = job.where[rollout_id]
            after = job.seen.get(rollout_id, 0)
            try:
                if self._rng.random() < 0.15:
                    found = await self._network.call(self._me(), front, "get", 0.5, id=rollout_id)
                else:
                    found = await self._network.call(
                        self._me(), front, "wait", 0.6, id=rollout_id, after=after, wait_s=0.3
                    )
            except NoAnswer:
                continue
            except Refused as refusal:
                if refusal.code == "rollout_not_found" and job.where[rollout_id] == front:
                    self._history.note(
                        "client", "lost", front=front, id=rollout_id, why=str(refusal)
                    )
                await self._pause()
                continue
            self._saw(front, found)
            if job.where[rollout_id] != front:
                continue
            job.seen[rollout_id] = len(found["ids"])
            if found["finish"] is None:
                if found["state"] == "paused":
                    await self._resume(job, rollout_id)
            elif rollout_id in job.moves:
                await self._pause()
            else:
                job.finals[rollout_id] = found
                self._history.look(found)

    def _saw(self, front: str, found: dict[str, Any]) -> None:
        self._history.note("client", "seen", front=front, **found)

    # --- meddling ------------------------------------------------------------------------

    async def _meddle(self) -> None:
        rng = self._rng
        while self._profile.wishes and not self.is_calm:
            await asyncio.sleep(rng.expovariate(1.0) * self._profile.wish_s)
            open_jobs = [job for job in self.jobs.values() if job.open_ids]
            if open_jobs and not self.is_calm:
                job = rng.choice(open_jobs)
                rollout_id = rng.choice(job.open_ids)
                await self._wish(rng.choice(self._profile.wishes), job, rollout_id)

    async def _wish(self, wish: str, job: Job, rollout_id: str) -> None:
        front = job.where[rollout_id]
        match wish:
            case "pause":
                await self._try(front, "pause", ids=[rollout_id])
            case "pause all":
                await self._try(front, "pause", ids=None)
            case "cancel":
                self._history.note("client", "cancels", front=front, id=rollout_id)
                self._history.sometimes("cancel of one that is moving", rollout_id in job.moves)
                await self._try(front, "cancel", ids=[rollout_id])
            case "fork" if len(self.jobs) < 20:
                at = self._rng.randint(0, job.seen.get(rollout_id, 0))
                samples = self._rng.choice([1, 1, 2])
                self._want("fork", front, id=rollout_id, at=at, samples=samples)
            case "move" if rollout_id not in job.moves and front == job.front:
                other = FRONTS[front == FRONTS[0]]
                self._num_keys += 1
                move = job.moves[rollout_id] = Move(other, f"m{self._num_keys}")
                self._me().spawn(self._move(job, rollout_id, move))

    async def _move(self, job: Job, rollout_id: str, move: Move) -> None:
        """Pause it here, take it there, end it here; each step is written down."""
        source = job.where[rollout_id] if not move.is_imported else job.front
        if not move.is_imported:
            try:
                if move.data is None:
                    await self._insist(source, "pause", ids=[rollout_id])
                    move.data = await self._insist(source, "export", id=rollout_id)
                    self._history.note("client", "exported", front=source, id=rollout_id)
                await self._insist(move.to, "import", key=move.key, data=move.data)
            except Refused as refusal:
                # made by other weights than are there by now, say: it stays
                self._history.note("client", "move refused", id=rollout_id, why=str(refusal))
                self._history.sometimes("an import was refused")
                del job.moves[rollout_id]
                await self._resume(job, rollout_id, is_sure=True)
                return
            self._history.note("client", "imported", front=move.to, id=rollout_id)
            self._history.sometimes("a rollout moved")
            move.is_imported = True
            job.where[rollout_id] = move.to
        if (source, rollout_id) not in job.let_go:
            self._history.note("client", "cancels", front=source, id=rollout_id)
            await self._insist(source, "cancel", ids=[rollout_id])
        await self._let_go(job, source, rollout_id)
        del job.moves[rollout_id]
        await self._resume(job, rollout_id, is_sure=True)

    async def _resume(self, job: Job, rollout_id: str, *, is_sure: bool = False) -> None:
        """What this client paused goes on in the end."""
        if rollout_id in job.moves:
            await self._pause()
        elif is_sure or self.is_calm or self._rng.random() < 0.1:
            is_all = self.is_calm and self._rng.random() < 0.3
            ids = None if is_all else [rollout_id]
            await self._try(job.where[rollout_id], "resume", ids=ids)

    # --- calls ---------------------------------------------------------------------------

    def _me(self) -> Process:
        assert self.process is not None
        return self.process

    async def _pause(self) -> None:
        await asyncio.sleep(0.05 + 0.1 * self._rng.random())

    async def _try(self, server: str, method: str, **values: Any) -> None:
        """Once; whatever comes of it."""
        try:
            await self._network.call(self._me(), server, method, 0.5, **values)
            outcome = "done"
        except NoAnswer:
            outcome = "unknown"
        except Refused as refusal:
            outcome = refusal.code
        self._history.note("client", method, front=server, outcome=outcome, **values)

    async def _insist(self, server: str, method: str, **values: Any) -> Any:
        """Until there is an answer; raises Refused where it is a definite no."""
        is_again = False
        while True:
            try:
                return await self._network.call(self._me(), server, method, 0.5, **values)
            except NoAnswer:
                self._history.note("client", "unknown", server=server, method=method)
                is_again = True
            except Refused as refusal:
                if is_again and method == "acknowledge" and refusal.code == "rollout_not_found":
                    return None
                if not refusal.is_retryable:
                    raise
                self._history.sometimes("disk full during accept", refusal.code == "journal_full")
                await self._pause()
