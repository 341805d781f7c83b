"""C3PO++ over a front: the real state machine, driven over the network, beside all other traffic.

What it has saved outlives it: the machine's snapshot, and where its samples are. It saves before it
does what cannot be undone, and now and then; when it is started again, it tells the machine what
happened since by reading its rollouts again.
"""

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from everstep.trainer_bridge.c3po.c3po import C3po
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.words import (
    Abandoned,
    C3poState,
    Command,
    Purge,
    Sample,
    Submit,
    Train,
)

from .history import History
from .language import VOCAB
from .loop import Process, SimLoop
from .network import Network, NoAnswer, Refused

POOL = "run"
UNBOUNDED = 100_000
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(C3poState).decode


class C3poSettings(Struct, frozen=True):
    config: C3poConfig
    front: str
    num_prompts: int
    meddles: bool


class Place(Struct):
    """A sample at the front. told: tokens that the machine knows of; final: once it has ended."""

    key: str
    id: str | None = None
    told: int = 0
    final: dict[str, Any] | None = None
    is_leaving: bool = False


class Saved(Struct):
    machine: bytes
    places: dict[Sample, Place]
    gone: list[str]
    opened: tuple[int, str] | None
    told: int
    num_prompts: int


class Controller:
    def __init__(
        self,
        loop: SimLoop,
        network: Network,
        history: History,
        settings: C3poSettings,
        rng: random.Random,
    ) -> None:
        self._loop, self._network, self._history = loop, network, history
        self._settings, self._rng = settings, rng
        self.process: Process | None = None
        self.is_calm = self.is_done = False
        self._saved = Saved(_encode(C3po(settings.config).snapshot()), {}, [], None, 0, 0)

    # --- life ----------------------------------------------------------------------------

    def start(self) -> None:
        if not self.is_done and (self.process is None or self.process.is_dead):
            saved = self._saved
            self._machine = C3po.restore(_decode(saved.machine))
            self._places = {sample: replace(place) for sample, place in saved.places.items()}
            self._gone = list(saved.gone)
            """Ids of rollouts that nobody waits for any more."""
            self._opened, self._told = saved.opened, saved.told
            self._num_prompts = saved.num_prompts
            self._exporting: set[str] = set()
            self.process = Process(self._loop, "c3po")
            self.process.spawn(self._run())
            self.process.spawn(self._meddle())

    def crash(self) -> None:
        if self.process is not None and not self.process.is_dead and not self.is_done:
            self._history.sometimes("controller crash")
            self._history.sometimes(
                "controller crash with an open budget", self._machine.phase == "open"
            )
            self._history.sometimes(
                "controller crash while groups are handed over", self._machine.phase == "training"
            )
            self._history.note("c3po", "crash", phase=self._machine.phase)
            self.process.kill()
            self._loop.outside(0.1 + self._rng.random() * 0.2, self.start)

    def _save(self) -> None:
        self._history.note("c3po", "saved")
        places = {sample: replace(place) for sample, place in self._places.items()}
        machine = _encode(self._machine.snapshot())
        self._saved = Saved(
            machine, places, list(self._gone), self._opened, self._told, self._num_prompts
        )

    # --- the run -------------------------------------------------------------------------

    async def _run(self) -> None:
        machine = self._machine
        self._history.note("c3po", "start", phase=machine.phase, iteration=machine.iteration)
        self._carry_out(machine.outstanding())
        while machine.phase != "done":
            self._feed()
            if machine.phase == "idle":
                self._told = 0
                self._carry_out(machine.begin())
                self._save()
            elif machine.phase == "training":
                await self._train()
            else:
                await self._iterate()
        for rollout_id in list(self._gone):
            await self._let_go(rollout_id)
        self.is_done = True
        self._history.note("c3po", "done")

    def _feed(self) -> None:
        machine = self._machine
        while (wanted := machine.wants_prompts) and self._num_prompts < self._settings.num_prompts:
            last = min(self._num_prompts + wanted, self._settings.num_prompts)
            names = [f"p{number}" for number in range(self._num_prompts, last)]
            self._num_prompts = last
            self._carry_out(machine.extend(names))
        if self._num_prompts == self._settings.num_prompts:
            self._carry_out(machine.end_stream())

    def _carry_out(self, commands: Sequence[Command]) -> None:
        """Note what is to be done; it is done by whoever goes through the places."""
        for command in commands:
            match command:
                case Submit(sample):
                    self._places.setdefault(sample, Place(f"c3po/{sample}"))
                case Purge(sample, reason):
                    self._history.note("c3po", "purges", sample=str(sample), reason=reason)
                    place = self._places.get(sample)
                    if place is not None:
                        place.is_leaving = True
                case Abandoned(prompt, _, reason):
                    self._history.note("c3po", "abandons", prompt=prompt, reason=reason)

    async def _iterate(self) -> None:
        """Budget, purges, submissions, reading; until the budget is over and all of it was told."""
        machine, config = self._machine, self._settings.config
        await asyncio.gather(*(self._leave(s) for s, p in self._places.items() if p.is_leaving))
        number = machine.iteration
        if self._opened is None or self._opened[0] != number:
            tokens = config.budget if config.mode == "generated" else UNBOUNDED
            budget = await self._insist("open_budget", pool=POOL, tokens=tokens, key=f"b{number}")
            self._opened = (number, budget["id"])
            self._history.note("c3po", "opened", iteration=number, id=budget["id"], tokens=tokens)
        budget_id = self._opened[1]
        is_over = False
        while machine.phase in ("open", "stopping"):
            self._feed()
            if machine.phase == "stopping" or not machine.pool:
                await self._insist("close_budget", id=budget_id)
                machine_waits = False
            else:
                machine_waits = True
            budget = await self._insist("budget", id=budget_id, wait_s=0.0)
            is_over = budget["state"] != "open"
            await asyncio.gather(*(self._see_to(sample) for sample in list(self._places)))
            if is_over and self._told == budget["used"]:
                self._settle(budget)
            elif machine_waits or is_over:
                await asyncio.sleep(0.02 + 0.05 * self._rng.random())

    def _settle(self, budget: dict[str, Any]) -> None:
        machine = self._machine
        self._history.note(
            "c3po",
            "settled",
            iteration=machine.iteration,
            used=budget["used"],
            tokens=budget["tokens"],
            state=budget["state"],
            # nobody is left to run; an admission bound may keep some waiting
            is_short=not machine.pool
            and (not machine.stream or self._settings.config.consumer_batch is not None),
        )
        self._carry_out(machine.settled())
        self._save()

    async def _see_to(self, sample: Sample) -> None:
        """Submit it, or read what is new of it."""
        place = self._places[sample]
        try:
            if place.id is None:
                place.id = await self._submit(sample, place.key)
            if place.final is None:
                found = await self._call("wait", 0.6, id=place.id, after=place.told, wait_s=0.1)
                self._history.note("c3po", "seen", front=self._settings.front, **found)
                self._tell(sample, place, found)
        except (NoAnswer, Refused) as error:
            self._history.note("c3po", "no answer", sample=str(sample), why=str(error))
            if isinstance(error, Refused) and error.code == "rollout_not_found":
                self._history.note(
                    "c3po", "lost", front=self._settings.front, id=place.id, why=str(error)
                )

    async def _submit(self, sample: Sample, key: str) -> str:
        rng = random.Random(f"{sample}")
        length = min(int(2 ** rng.uniform(0.0, 4.7)), 25)
        request = {
            "prompt": (*range(1, 2 + int(sample.prompt[1:]) % 8), int(sample.prompt[1:]) % VOCAB),
            "max_tokens": length,
            "seed": rng.randrange(2**60),
            "stops": (),
            "samples": 1,
            "priority": 0,
            "pool": POOL,
            "attempt": sample.attempt,
        }
        self._history.note(
            "c3po", "asks", key=key, front=self._settings.front, method="submit", request=request
        )
        group, ids, is_replay = await self._call("submit", 0.5, key=key, request=request)
        self._history.note(
            "c3po",
            "accepted",
            key=key,
            front=self._settings.front,
            group=group,
            ids=ids,
            replay=is_replay,
        )
        return ids[0]

    def _tell(self, sample: Sample, place: Place, found: dict[str, Any]) -> None:
        """What is new of it, to the machine: runs of tokens, then its ending."""
        machine = self._machine
        versions = found["versions"][place.told :]
        while versions:
            count = next((i for i, v in enumerate(versions) if v != versions[0]), len(versions))
            self._history.note("c3po", "told", sample=str(sample), count=count, version=versions[0])
            self._carry_out(machine.grew(sample, count, versions[0]))
            place.told += count
            self._told += count
            versions = versions[count:]
        if found["finish"] is not None and place.final is None and len(found["ids"]) == place.told:
            place.final = found
            self._history.look(found)
            reason = found["finish"][0]
            self._history.note(
                "c3po", "ended", sample=str(sample), reason=reason, length=place.told
            )
            if reason not in ("stop", "length"):
                assert place.id is not None
                self._gone.append(place.id)
                del self._places[sample]
            self._carry_out(machine.ended(sample, reason, place.told))
        if self._rng.random() < 0.2:
            self._save()

    async def _leave(self, sample: Sample) -> None:
        """Purged: it is ended at the front, and forgotten here. All of it was told before."""
        place = self._places[sample]
        if place.id is None:
            place.id = await self._insist_submitted(sample, place.key)
        front, rollout_id = self._settings.front, place.id
        if self._settings.meddles and self._rng.random() < 0.5:
            self._me().spawn(self._export(rollout_id))
            await asyncio.sleep(0.003 * self._rng.random())
        self._history.sometimes("purge")
        self._history.sometimes("purge while exported", rollout_id in self._exporting)
        self._history.note("c3po", "cancels", front=front, id=rollout_id)
        await self._insist("cancel", ids=[rollout_id])
        found = await self._insist("get", id=rollout_id)
        self._history.note("c3po", "seen", front=front, **found)
        # nothing can have come since it was told, without a budget; but if it did, it counts
        for version in found["versions"][place.told :]:
            self._history.note("c3po", "told", sample=str(sample), count=1, version=version)
            self._machine.grew(sample, 1, version)
            self._told += 1
        self._gone.append(rollout_id)
        del self._places[sample]

    async def _insist_submitted(self, sample: Sample, key: str) -> str:
        while True:
            try:
                return await self._submit(sample, key)
            except (NoAnswer, Refused):
                await asyncio.sleep(0.1)

    async def _train(self) -> None:
        """Hand the complete groups over, see the next weights serve, then close the books."""
        machine = self._machine
        train = next(command for command in machine.outstanding() if isinstance(command, Train))
        for group in train.groups:
            members = [self._places[member.sample] for member in group.samples]
            rollouts = {place.key: place.final for place in members}
            while not await self._insist_at(
                "trainer", "offer", group=group.prompt, rollouts=rollouts
            ):
                await asyncio.sleep(0.05 + 0.1 * self._rng.random())
        version = await self._insist("version")
        version = max(version, machine.version or 0)
        self._carry_out(machine.trained(version))
        books = machine.last_books
        self._history.note(
            "c3po",
            "closed",
            iteration=train.iteration,
            groups=tuple(
                (group.prompt, tuple(str(member.sample) for member in group.samples))
                for group in train.groups
            ),
            books=None if books is None else msgspec.structs.asdict(books),
        )
        for group in train.groups:
            for member in group.samples:
                place = self._places.pop(member.sample)
                assert place.id is not None
                self._gone.append(place.id)
        self._save()
        for rollout_id in list(self._gone):
            await self._let_go(rollout_id)

    async def _let_go(self, rollout_id: str) -> None:
        try:
            await self._insist("acknowledge", ids=[rollout_id])
        except Refused as refusal:
            # heard before, and forgotten since
            if refusal.code != "rollout_not_found":
                raise
        self._history.note("c3po", "acked", front=self._settings.front, id=rollout_id)
        self._gone.remove(rollout_id)

    async def _meddle(self) -> None:
        """Somebody pauses and cancels rollouts of the run, maybe; in the end all go on."""
        rng = self._rng
        while not self.is_calm:
            await asyncio.sleep(rng.expovariate(1.0) * 0.2)
            ids = [place.id for place in self._places.values() if place.id and place.final is None]
            if not ids or self.is_calm or not self._settings.meddles:
                continue
            rollout_id = rng.choice(ids)
            verb = rng.choice(["pause", "resume", "resume", "cancel"])
            if verb == "cancel":
                self._history.note("c3po", "cancels", front=self._settings.front, id=rollout_id)
            with contextlib.suppress(NoAnswer, Refused):
                await self._call(verb, 0.5, ids=[rollout_id])
        while not self.is_done:
            await asyncio.sleep(0.3)
            with contextlib.suppress(NoAnswer, Refused):
                await self._call("resume", 0.5, ids=None)

    async def _export(self, rollout_id: str) -> None:
        """Somebody takes a copy of it, just now."""
        self._exporting.add(rollout_id)
        with contextlib.suppress(NoAnswer, Refused):
            await self._call("export", 0.5, id=rollout_id)
        self._exporting.discard(rollout_id)

    # --- calls ---------------------------------------------------------------------------

    def _me(self) -> Process:
        assert self.process is not None
        return self.process

    async def _call(self, method: str, timeout_s: float, **values: Any) -> Any:
        return await self._network.call(
            self._me(), self._settings.front, method, timeout_s, **values
        )

    async def _insist(self, method: str, **values: Any) -> Any:
        return await self._insist_at(self._settings.front, method, **values)

    async def _insist_at(self, server: str, method: str, **values: Any) -> Any:
        """Until there is an answer; raises Refused where it is a definite no."""
        while True:
            try:
                return await self._network.call(self._me(), server, method, 0.5, **values)
            except NoAnswer:
                pass
            except Refused as refusal:
                if not refusal.is_retryable:
                    raise
                await asyncio.sleep(0.05 + 0.05 * self._rng.random())
