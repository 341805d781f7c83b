"""What complete groups are for: a trainer at the other end of the bridge.

    rewards ▸ spool (durable) ▸ announced to the ranks ▸ trained ▸ the new version serves

All of it may be done twice: after a kill an iteration that is spooled is announced again, and one
that was trained is said again by the trainer. An engine that comes back with another version than
the rest is given theirs; a trainer that went back to an older checkpoint takes all of them with it.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from msgspec.structs import replace

from ...engine.checkpoint.manifest import Version
from ...engine.errors import CheckpointError
from ...engine.messages import KVPolicy
from ...engine.trajectory import pack
from ..protocol import Member, Trained, TrajectoryGroup
from ..trajectories.sender import TrajectorySender
from ..trajectories.spool import Serving, Spool
from . import hosts
from .folders import remove_versions
from .hosts import Host, Served
from .parts import Delivered, Groups, Taught
from .scoring import Scorer

# for the ranks to save what they have
FINISH_S = 60.0
_NONE = Version(number=0, digest="", folder="")


class BridgeLearner:
    """Sends groups to a trainer, and serves what it makes of them.

    scorer      gives each sample its reward
    kv          what becomes of the KV of unfinished rollouts at a new version
    deadline_s  for an iteration to be trained
    outlives    whether engines may start again, with what serves, when the run is over
    root        where a receiver of ours puts versions; None: that is the trainer's
    on_note     said to the user, one line
    """

    def __init__(
        self,
        sender: TrajectorySender,
        spool: Spool,
        scorer: Scorer,
        engines: Sequence[Host],
        *,
        kv: KVPolicy,
        deadline_s: float,
        outlives: bool,
        root: Path | None = None,
        on_note: Callable[[str], None],
    ) -> None:
        self._sender, self._spool, self._scorer = sender, spool, scorer
        self._hosts = {host.name: host for host in engines}
        self._kv, self._deadline_s, self._outlives = kv, deadline_s, outlives
        self._note, self._root = on_note, root
        self._given: dict[str, Serving] = {}
        """Engine → the version that it was given last."""
        self._kept_lineage = ""
        """A lineage whose first version cannot be had: the next one that it trains is waited for."""
        # one change of weights after the other
        self._changing = asyncio.Lock()

    async def start(self, engines: Collection[str], served: str) -> dict[str, str]:
        """Begin, with these engines serving the same. Returns who stays away, and why.

        served  digest of that; "" where a trainer has given them others

        Raises ConfigError where the address cannot be used; WeightsRefused and CheckpointError of an
        engine that cannot have what the others serve.
        """
        self._sender.dealer.serving = "" if self._spool.serving is not None else served
        self._note(f"waits for a trainer at {await self._sender.start()}")
        for earlier in self._spool.iterations:
            self._sender.announce(earlier)
        async with self._changing:
            return await self._catch_up(engines)

    async def score(self, iteration: int, groups: Groups) -> Groups:
        """With rewards; those of an iteration that is spooled are what they were."""
        if iteration not in self._spool.iterations:
            return await self._scorer.score(groups)
        kept = [
            await self._spool.load(iteration, index)
            for index in range(len(self._spool.sizes(iteration)))
        ]
        return [
            [replace(m, reward=k.reward) for m, k in zip(members, group.members, strict=True)]
            for members, group in zip(groups, kept, strict=True)
        ]

    async def train(self, iteration: int, groups: Groups, engines: Collection[str]) -> Taught:
        """Raises PeerMissing naming who does not answer; WeightsRefused for a version that is not
        what its trainer meant."""
        if iteration not in self._spool.iterations and iteration > self._sender.dealer.acked:
            await asyncio.to_thread(self._spool.add, iteration, [_group(one) for one in groups])
        self._sender.announce(iteration)
        trained = await self._sender.trained(iteration, self._deadline_s)
        lineage, before = self._sender.dealer.lineage, self._spool.serving
        async with self._changing:
            served = await self._serve(trained, lineage, engines)
        is_turned = before is not None and before.lineage != lineage
        return Taught(trained.version, served.away, is_turned)

    # engines that are behind, trainers that went back ----------------------------------------------

    def is_behind(self, engine: str) -> bool:
        """Whether the others have been given a version since it was given one."""
        serving = self._spool.serving
        return serving is not None and self._given.get(engine) != serving

    async def catch_up(self, engine: str) -> None:
        """Have an engine that is back serve what the others do. Raises EngineUnavailable."""
        async with self._changing:
            await self._catch_up([engine])

    async def turned(self) -> None:
        """Return once the trainer has gone back to a version that is not after what serves."""
        await self._sender.changed(lambda: self.back is not None)

    @property
    def back(self) -> int | None:
        """The version that the trainer went back to, until it serves."""
        trained = self._back
        return None if trained is None else trained.version

    async def go_back(self, engines: Collection[str]) -> dict[str, str]:
        """Serve it, in the new lineage. Returns who stays away, and why."""
        async with self._changing:
            trained, lineage = self._back, self._sender.dealer.lineage
            if trained is None:
                return {}
            try:
                return (await self._serve(trained, lineage, engines)).away
            except CheckpointError as error:
                # its trainer went on meanwhile, and took its folder away
                self._kept_lineage = lineage
                self._note(f"{error}; the next version that is trained is waited for")
                return {}

    @property
    def _back(self) -> Trained | None:
        dealer, serving = self._sender.dealer, self._spool.serving
        if serving is None or dealer.lineage in ("", serving.lineage, self._kept_lineage):
            return None
        begun = dealer.begun
        return begun if begun is not None and begun.version <= serving.version else None

    async def _serve(self, trained: Trained, lineage: str, engines: Collection[str]) -> Served:
        serving = Serving(trained.version, trained.digest, trained.path, lineage)

        async def note() -> None:
            await asyncio.to_thread(self._spool.serve, serving)

        self._sender.dealer.serving = ""
        served = await self._give(serving, engines, note)
        if self._spool.serving != serving:
            await note()
        return served

    async def _catch_up(self, engines: Collection[str]) -> dict[str, str]:
        serving = self._spool.serving
        if serving is None:
            # who cannot be asked cannot be given anything: said before anything is sampled
            await asyncio.gather(*(self._hosts[name].serves(_NONE) for name in engines))
            return {}
        try:
            return (await self._give(serving, engines)).away
        except CheckpointError as error:
            if any([await self._hosts[name].serves(_version(serving)) for name in engines]):
                raise
            # memory of a machine that was started again, say
            self._note(f"{error}; waits for the trainer to publish its weights again")
            return {}

    async def _give(
        self, serving: Serving, engines: Collection[str], on_staged: hosts.OnStaged | None = None
    ) -> Served:
        chosen = [host for name, host in self._hosts.items() if name in engines]
        served = await hosts.serve(chosen, _version(serving), self._kv, on_staged)
        for host in chosen:
            if host.name not in served.away:
                self._given[host.name] = serving
        if served.note:
            self._note(served.note)
        return served

    # the end ---------------------------------------------------------------------------------------

    async def finish(self, reason: str, *, is_over: bool) -> None:
        """No more iterations come from this process; is_over: nor from another."""
        given = self._given.values() if self._outlives or not is_over else ()
        needs = sorted({serving.path for serving in given})
        await self._sender.finish(reason, FINISH_S, needs=needs, is_over=is_over)
        if self._root is not None:
            await asyncio.to_thread(remove_versions, self._root, needs)
        if is_over:
            self._spool.remove()

    async def close(self) -> None:
        await self._sender.close()


def _version(serving: Serving) -> Version:
    return Version(number=serving.version, digest=serving.digest, folder=serving.path)


def _group(members: Sequence[Delivered]) -> TrajectoryGroup:
    return TrajectoryGroup(
        name=members[0].sample.prompt,
        members=[
            Member(trajectory=pack(member.rollout), reward=member.reward) for member in members
        ],
    )
