"""The front's side of changes of the weights: what serves, what is staged, what served before.

    stage   manifest read, number and lineage checked → core: loaded and checked beside generation
    flip    core: served from the next step on → here: current; journaled before its first tokens

A flip that nobody heard of (the core died first) never happened: the old version goes on. Numbers
never run backwards, unless a rollback names the version to go back to; a new lineage begins there,
and versions of the old one are refused from then on.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from .. import log
from ..checkpoint.manifest import Manifest, Version, read_manifest
from ..errors import CheckpointError, EngineDied, IllegalState, StaleVersion, WeightsRefused
from ..journal import ops
from ..messages import (
    Flip,
    Flipped,
    KVPolicy,
    Priority,
    Ready,
    Refused,
    Stage,
    Staged,
    StageReport,
    Staging,
    ToCore,
    Unstage,
)
from ..metrics import Registry
from .version_metrics import VersionMetrics

Asked = Literal["stage", "flip"]
Journal = Callable[[ops.Flip], asyncio.Future[None] | None]
NOTHING_DONE = StageReport(
    num_bytes=0, seconds=0.0, busy_seconds=0.0, slices=0, longest_slice_s=0.0
)


class _Asked(Struct):
    """Something asked of the core, and who waits for the answer. Of a kind, answers come in order."""

    kind: Asked
    version: Version
    future: "asyncio.Future[Any]"


class Versions:
    """What a manager knows of weights. Everything is called on its loop.

    check_core  raises EngineUnavailable while there is no core that could be told
    tell        sends to the core; raises as check_core
    journal     notes a flip, in order with the tokens; None: there is no journal
    on_change   called when what serves, or whether rollouts wait for weights, has changed
    base        the model that the server was started with; "": where the first core found it
    """

    def __init__(self, *, base: str, metrics: Registry) -> None:
        self.check_core: Callable[[], None] = lambda: None
        self.tell: Callable[[ToCore], None] = lambda _: None
        self.journal: Journal = lambda _: None
        self.on_change: Callable[[], None] = lambda: None
        self.history: list[Version] = []
        """All that served, in order."""
        self.staged: Version | None = None
        self.staging: Staging | None = None
        """How far the version that is being staged is."""
        self.last_staged: Staged | None = None
        self.last_flip: Flipped | None = None
        """What the last ones took."""
        self.waiting_for: str | None = None
        """Why all rollouts stand still, if they do: the weights that they go on with are missing."""
        self._base = base
        self._journaled: tuple[int, str] | None = None
        self._own_folders = {"", base}
        """Of the model that the server was started with."""
        self._asked: deque[_Asked] = deque()
        self._metrics = VersionMetrics(metrics)

    # --- what is known -----------------------------------------------------------------

    @property
    def current(self) -> Version | None:
        """That which serves, or which is waited for; None before there is any."""
        return self.history[-1] if self.history else None

    @property
    def to_start_with(self) -> Version | None:
        """What a core is to be started with; None: the model that the server was started with."""
        current = self.current
        if current is None or current.folder in self._own_folders:
            return None
        return current

    def restore(self, flips: Sequence[ops.Flip], last: tuple[int, str] | None) -> None:
        """What a journal brings back, unless the server was started with another model.

        last  number and digest of the latest, which every journal has
        """
        self._journaled = last
        if flips and flips[-1].folder and self._base in ("", flips[-1].base):
            self._base = flips[-1].base
            self._own_folders.add(self._base)
            self.history = [
                Version(
                    number=flip.version,
                    digest=flip.digest,
                    folder=flip.folder,
                    parent=flip.parent,
                    lineage=flip.lineage,
                )
                for flip in flips
            ]

    def note_start(self, info: Ready, missing: str | None) -> None:
        """A core runs. missing: why it does not have the weights that it should."""
        current = self.current
        if missing is not None or self.to_start_with is None:
            self._own_folders.add(info.path)
            self._base = self._base or info.path
        if missing is not None:
            assert current is not None
            self.waiting_for = f"waiting for the weights of {current.words}: {missing}"
            log.event("weights.missing", level="error", reason=self.waiting_for)
        elif current is None or current.digest != info.digest:
            version = Version(number=info.version, digest=info.digest, folder=info.path)
            if self._journaled == (info.version, info.digest):
                self.history.append(version)
            else:
                self._note(version)
        self._metrics.number.set(info.version)

    def note_death(self) -> None:
        """The core is gone, and with it what was staged."""
        self.staged = self.staging = None
        asked, self._asked = self._asked, deque()
        for one in asked:
            self._settle(
                one,
                error=EngineDied(
                    f"the core died before {one.version.words} was served: stage it again"
                ),
            )

    # --- what is asked for ---------------------------------------------------------------

    async def stage(
        self, path: str, priority: Priority = "background", *, rollback: int | None = None
    ) -> Staged:
        """Load a version's folder beside what serves, and check it; returns once it can be flipped
        to. Another one that is staged, or being staged, is given up.

        priority  beside generation (`messages.Stage`)
        rollback  the version's number, where the flip is to be a `roll_back` to it

        Raises WeightsRefused, naming the tensor or the first layer that differs; CheckpointError;
        StaleVersion where its number or lineage is not to come; EngineUnavailable. Whatever is
        raised, what serves goes on serving.
        """
        self.check_core()
        if rollback is not None:
            return await self._stage_back(await self._back_to(rollback, path), priority)
        manifest = await self._read(path)
        current = self.current
        assert current is not None
        version = _version_of(manifest, path)
        if version.number == current.number and version.digest == current.digest:
            if self.waiting_for is None:
                return Staged(version.number, version.digest, NOTHING_DONE)
        else:
            self._check_order(version, current)
        return await self._stage(version, priority)

    async def flip(self, number: int, kv: KVPolicy = "keep") -> Flipped:
        """Serve the staged version from the next step on; returns once that is journaled.

        kv  what becomes of the KV of live rollouts (`messages.Flip`)

        No rollout ends by it. Raises IllegalState unless that version is staged; WeightsRefused,
        EngineUnavailable; JournalError.
        """
        self.check_core()
        current, staged = self.current, self.staged
        assert current is not None
        if staged is None or staged.number != number:
            if number == current.number and self.waiting_for is None:
                return _nothing_to_flip(current, kv)
            what = "nothing is" if staged is None else f"{staged.words} is"
            raise IllegalState(f"version {number} is not staged, {what}: stage it first")
        return await self._flip_to(staged, kv)

    async def update(
        self, path: str, kv: KVPolicy = "keep", priority: Priority = "background"
    ) -> tuple[Staged, Flipped]:
        """`stage`, then `flip`."""
        staged = await self.stage(path, priority)
        return staged, await self.flip(staged.version, kv)

    async def unstage(self) -> None:
        """Give up what is staged or being staged, if anything is."""
        self.check_core()
        self._unstage()

    def _unstage(self) -> None:
        numbers = {one.version.number for one in self._asked}
        if self.staged is not None:
            numbers.add(self.staged.number)
        self.staged = None
        for number in numbers:
            self.tell(Unstage(number))

    async def roll_back(
        self,
        number: int,
        *,
        path: str | None = None,
        kv: KVPolicy = "keep",
        priority: Priority = "background",
    ) -> Flipped:
        """Serve a version again by its name; a new lineage begins, and versions of the old one are
        refused from then on. It is the one that the folder's manifest names, where that is new
        here, else one of our own.

        path  its folder, where it never served here or its files are elsewhere now

        Raises as `stage` and `flip`, IllegalState for one that never served.
        """
        self.check_core()
        target = await self._back_to(number, path)
        await self._stage_back(target, priority)
        return await self._flip_to(target, kv)

    async def _back_to(self, number: int, path: str | None) -> Version:
        """The version of this number, with a lineage that is new here."""
        if path is not None:
            target = _version_of(await self._read(path), path)
            if target.number != number:
                raise StaleVersion(
                    f"{path} holds version {target.number}, the rollback names {number}"
                )
        else:
            known = [one for one in self.history if one.number == number]
            if not known:
                numbers = ", ".join(str(one.number) for one in self.history[-8:])
                raise IllegalState(
                    f"version {number} never served here (lately did: {numbers}); name its folder"
                )
            target = known[-1]
        if not target.lineage or target.lineage in {one.lineage for one in self.history}:
            target = replace(target, lineage=uuid.uuid4().hex[:12])
        return target

    async def _stage_back(self, target: Version, priority: Priority) -> Staged:
        if self._serves(target):
            # the weights are these already: only what may follow them is another lineage
            self._unstage()
            self.staged = target
            return Staged(target.number, target.digest, NOTHING_DONE)
        return await self._stage(target, priority)

    def _serves(self, version: Version) -> bool:
        """Whether its number and its weights serve, in whatever lineage."""
        current = self.current
        assert current is not None
        is_same = (current.number, current.digest) == (version.number, version.digest)
        return is_same and self.waiting_for is None

    async def _read(self, path: str) -> Manifest:
        folder = Path(path)
        manifest = await asyncio.to_thread(read_manifest, folder)
        if manifest is None:
            what = "has no manifest.json" if folder.is_dir() else "is no folder"
            raise CheckpointError(f"{path} {what}: it is not a version of the weights")
        return manifest

    def _check_order(self, version: Version, current: Version) -> None:
        if current.lineage and version.lineage != current.lineage:
            raise StaleVersion(
                f"{version.words} is of lineage {version.lineage or '(none)'}, {current.words} of "
                f"{current.lineage}, which the last rollback began: what is published from here on "
                "has to name that one"
            )
        if version.number <= current.number:
            raise StaleVersion(
                f"{version.words} is not newer than {current.words}, which serves: numbers never "
                "run backwards; to go back on purpose, roll back by its name"
            )

    async def _stage(self, version: Version, priority: Priority) -> Staged:
        self.staged = None
        future: asyncio.Future[Staged] = asyncio.get_running_loop().create_future()
        self.tell(Stage(version.number, version.folder, version.digest, priority))
        self._asked.append(_Asked("stage", version, future))
        return await asyncio.shield(future)

    async def _flip_to(self, version: Version, kv: KVPolicy) -> Flipped:
        if not self._serves(version):
            return await self._flip(version, kv)
        self.staged = None
        if (journaled := self._note(version)) is not None:
            await asyncio.shield(journaled)
        return _nothing_to_flip(version, kv)

    async def _flip(self, version: Version, kv: KVPolicy) -> Flipped:
        future: asyncio.Future[tuple[Flipped, asyncio.Future[None] | None]]
        future = asyncio.get_running_loop().create_future()
        self.tell(Flip(version.number, version.digest, kv))
        self._asked.append(_Asked("flip", version, future))
        self.staged = None
        flipped, journaled = await asyncio.shield(future)
        if journaled is not None:
            await asyncio.shield(journaled)
        return flipped

    # --- what the core says ----------------------------------------------------------------

    def take(self, message: Staging | Staged | Refused | Flipped) -> None:
        """In the order in which they come."""
        match message:
            case Staging():
                self.staging = message
            case Staged():
                asked, self.staging = self._take_asked("stage"), None
                self.staged, self.last_staged = asked.version, message
                self._metrics.note_staged(message)
                self._settle(asked, message)
            case Refused():
                asked = self._take_asked(message.what)
                if asked.kind == "stage":
                    self.staging = None
                self._metrics.refused.add()
                error = WeightsRefused(message.message, tensor=message.tensor, layer=message.layer)
                self._settle(asked, error=error)
            case Flipped():
                asked, self.last_flip = self._take_asked("flip"), message
                self.waiting_for = None
                self._metrics.note_flipped(message)
                self._settle(asked, (message, self._note(asked.version)))

    def _take_asked(self, kind: Asked) -> _Asked:
        asked = next(one for one in self._asked if one.kind == kind)
        self._asked.remove(asked)
        return asked

    def _note(self, version: Version) -> "asyncio.Future[None] | None":
        """It serves from here on."""
        self.history.append(version)
        self._metrics.number.set(version.number)
        flip = ops.Flip(
            version.number,
            version.digest,
            version.folder,
            version.parent,
            version.lineage,
            self._base,
        )
        journaled = self.journal(flip)
        self.on_change()
        return journaled

    def _settle(self, asked: _Asked, result: object = None, error: Exception | None = None) -> None:
        if asked.future.done():
            return
        if error is None:
            asked.future.set_result(result)
        else:
            asked.future.set_exception(error)
            # whoever asked may be gone
            asked.future.exception()


def _version_of(manifest: Manifest, path: str) -> Version:
    return Version(
        number=manifest.version,
        digest=manifest.digest,
        folder=str(Path(path).absolute()),
        parent=manifest.parent or "",
        lineage=manifest.lineage,
    )


def _nothing_to_flip(version: Version, kv: KVPolicy) -> Flipped:
    """The answer to a flip to what serves already (asked again after an answer that was lost)."""
    return Flipped(
        version=version.number,
        digest=version.digest,
        kv=kv,
        stall_s=0.0,
        flip_s=0.0,
        steps_lost=0.0,
        kept_rollouts=0,
        dropped_tokens=0,
    )
