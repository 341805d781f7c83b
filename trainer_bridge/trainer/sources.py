"""Where a run's groups come from: files that are read whole, or an engine that goes on sampling."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, Protocol

import torch

from ...engine.checkpoint.ring_config import RingConfig
from ...engine.checkpoint.stored_format import StoredFormat
from ...engine.checkpoint.version_folders import find_versions
from ...engine.errors import BridgeError, ConfigError, InvalidRequest, PeerMissing
from ...engine.trajectory import unpack
from ..curve import read_keys
from ..protocol import Trained, TrajectoryGroup
from ..run.folders import hold, remove_versions, sizes_of
from ..trajectories.files import TrajectoryFiles
from ..trajectories.receiver import TrajectoryReceiver
from ..trajectories.samples import Group, Sample, sample_of
from ..weights.folder import default_root
from ..weights.pages import clean
from ..weights.sender import WeightSender
from ..weights.targets import Elsewhere, Here, Target
from .canaries import make_canaries, texts_of
from .config import TrainConfig
from .scoring import FileScorer
from .sharding import World
from .trainable import TrainableRing
from .trainer import Report, Trainer

Say = Callable[[str], None]
# an engine that is there answers at once
_SOON_S = 3.0


class Source(Protocol):
    """Iterations are numbered as the versions that they are trained on: from 0."""

    def share(self, iteration: int) -> Sequence[Group] | None:
        """This rank's groups of an iteration; None: there are no more."""

    def trained(self, report: Report, groups: Sequence[Group]) -> None:
        """These groups were trained, and `report.version` is in the weights."""

    def durable(self, checkpoint: Path, version: int, oldest: int) -> None:
        """A checkpoint holds this version; the run may go back to `oldest`, and not further."""

    @property
    def is_over(self) -> bool:
        """Whether it has said that nothing comes any more, to whoever asks again."""

    def finish(self) -> str:
        """Everything is trained: what nobody needs any more is removed. Returns a line about what
        is left, or nothing."""

    def close(self) -> None: ...


class FileSource:
    """Groups of files, again and again for some epochs."""

    def __init__(self, config: TrainConfig, world: World, ring: RingConfig, say: Say) -> None:
        """Raises ConfigError naming file, line and what is wrong, or a reward that is unusable."""
        self._config, self._world = config, world
        if config.reward is None:
            self._files = TrajectoryFiles.read(config, ring)
            return
        scorer = FileScorer(config.reward, world, config.timeout_s)
        self._files = TrajectoryFiles.read(config, ring, scorer)
        say(_scored(self._files, scorer, config.reward.name))

    def share(self, iteration: int) -> Sequence[Group] | None:
        size = self._config.batch.groups
        groups = self._files.batch(iteration, size, self._config.source)
        return None if groups is None else groups[self._world.rank :: self._world.size]

    def trained(self, report: Report, groups: Sequence[Group]) -> None:
        """Files need not know."""

    def durable(self, checkpoint: Path, version: int, oldest: int) -> None:
        """Files stay."""

    @property
    def is_over(self) -> bool:
        """Files can be read again, for more epochs say."""
        return False

    def finish(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing is open."""


class BridgeSource:
    """Groups that an engine deals to the ranks (protocol.py), once each; versions for it.

    checkpoint  that the trainer goes on from, None for the model that the run began with
    oldest      version that it may go back to one day, and not further

    A lineage is one life of the trainer: what the checkpoint does not hold is dealt anew.
    Raises PeerMissing, PeerRefused and ConfigError, in one line each.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path | None, oldest: int, say: Say) -> None:
        self._trainer = trainer
        with contextlib.ExitStack() as opened:
            self._connect(checkpoint, oldest, opened, say)
            self._opened = opened.pop_all()

    def _connect(
        self, checkpoint: Path | None, oldest: int, opened: contextlib.ExitStack, say: Say
    ) -> None:
        """Hold the folder of the versions, publish where this trainer stands, and say hello."""
        trainer, config = self._trainer, self._trainer.config
        world, source = trainer.world, config.source
        lineage = world.same(token_hex(8))
        self._root = None if config.publish.endpoints else _root(config).resolve()
        if self._root is not None and (held := _hold(self._root, world)) is not None:
            opened.enter_context(held)
        self._sender = WeightSender(
            trainer.ring,
            world,
            _target(config, world, lineage),
            source=trainer.folder,
            stored=stored_as(config, trainer.ring, trainer.dtype),
            lineage=lineage,
        )
        opened.callback(self._sender.close)
        begun = None
        if checkpoint is not None:
            # the engine may be ahead of it, and goes back to these weights
            first = self._sender.publish(trainer.version)
            trainer.published(first.digest)
            begun = Trained(trainer.version - 1, trainer.version, first.digest, first.path)
        self._receiver = TrajectoryReceiver(
            source.endpoint,
            run=source.run,
            lineage=lineage,
            rank=world.rank,
            world=world.size,
            checkpoint="" if checkpoint is None else checkpoint.name,
            done_through=trainer.version - 1,
            oldest_through=oldest - 1,
            begun=begun,
            base="" if checkpoint is not None else _base_of(trainer),
            keys=read_keys(Path(source.keys), "trainer") if source.keys else None,
        )
        opened.callback(self._receiver.close)
        self._meet(source.deadline_s, say)

    def _meet(self, deadline_s: float, say: Say) -> None:
        """Who waits for long is told for what."""
        if deadline_s > _SOON_S:
            with contextlib.suppress(PeerMissing):
                self._receiver.connect(_SOON_S)
                return
            say(f"waits for an engine at {self._receiver.endpoint}, {deadline_s:.0f} s at most")
        self._receiver.connect(deadline_s)

    def share(self, iteration: int) -> Sequence[Group] | None:
        self._receiver.doing = f"waits for iteration {iteration}"
        deadline_s = self._trainer.config.source.deadline_s
        found = self._receiver.next_iteration(deadline_s)
        if found is None:
            return None
        if found.number != iteration:
            raise BridgeError(
                f"the engine at {self._receiver.endpoint} goes on with iteration {found.number}, the "
                f"weights here hold those before {iteration}: what lies between is gone"
            )
        groups = [self._group(group) for group in found]
        self._receiver.doing = f"trains iteration {iteration}"
        return groups

    def trained(self, report: Report, groups: Sequence[Group]) -> None:
        trainer = self._trainer
        texts = texts_of(groups, trainer.config.publish.canaries)
        canaries = make_canaries(trainer.ring, trainer.world, texts, self._sender.layout)
        published = self._sender.publish(report.version, canaries)
        trainer.published(published.digest)
        self._receiver.trained(report.version - 1, report.version, published.digest, published.path)

    def durable(self, checkpoint: Path, version: int, oldest: int) -> None:
        self._receiver.durable(checkpoint.name, version - 1, oldest - 1)

    @property
    def is_over(self) -> bool:
        return self._receiver.ended is not None and self._receiver.ended.is_over

    def finish(self) -> str:
        """Versions that an engine serves, or may start with again, stay; where that is not known,
        all do."""
        if self._root is None or not self._trainer.world.is_first:
            return ""
        ended = self._receiver.ended
        if ended is not None and ended.needs is not None:
            remove_versions(self._root, ended.needs)
        else:
            clean(self._root)
        found = sizes_of(self._root)
        if not found:
            return ""
        return (
            f"{', '.join(sorted(found))} of the weights stay in {self._root} "
            f"({sum(found.values()) / 1e6:.1f} MB): an engine may start with them again"
        )

    def close(self) -> None:
        self._opened.close()

    def _group(self, group: TrajectoryGroup) -> Group:
        """Responses of no tokens count in the group's baseline and in the batch."""
        samples: list[Sample] = []
        empty: list[float | None] = []
        try:
            for member in group.members:
                rollout = unpack(member.trajectory)
                if not rollout.output_ids:
                    empty.append(member.reward)
                    continue
                samples.append(
                    sample_of(
                        rollout,
                        self._trainer.ring.config,
                        replay=self._trainer.config.routing_replay,
                        reward=member.reward,
                        mask=member.mask,
                        digests=self._trainer.digests,
                    )
                )
            return Group.of(group.name, samples, self._trainer.config.advantage_std, empty=empty)
        except InvalidRequest as error:
            raise BridgeError(f"group {group.name}: {error}") from None


def _scored(files: TrajectoryFiles, scorer: FileScorer, name: str) -> str:
    """What became of the lines, in one."""
    if not files.num_scored:
        return "every line has a reward: [reward] is not used; source.rescore = true scores them"
    failed = f", which failed for {scorer.num_failed}" if scorer.num_failed else ""
    return f"{files.num_scored} responses were scored by [reward] {name}{failed}"


def _target(config: TrainConfig, world: World, lineage: str) -> Target:
    """Raises ConfigError for endpoints or keys that cannot be used."""
    publish, source = config.publish, config.source
    if not publish.endpoints:
        return Here(world, _root(config), publish.keep)
    keys = publish.keys or source.keys
    return Elsewhere(
        world,
        publish.endpoints,
        run=source.run,
        lineage=lineage,
        keys=read_keys(Path(keys), "trainer") if keys else None,
        keep=publish.keep,
        deadline_s=publish.deadline_s,
    )


def _base_of(trainer: Trainer) -> str:
    """Digest of the model that it begins with, as engines say it; "" where they serve another form
    of it."""
    if trainer.config.publish.format != "model":
        return ""
    [digest] = find_versions([trainer.folder]) if trainer.world.is_first else [""]
    return trainer.world.same(digest)


def stored_as(config: TrainConfig, ring: TrainableRing, dtype: torch.dtype) -> StoredFormat:
    """In what form versions are published; dtype: of the model."""
    fp8 = None if config.publish.format == "model" else config.publish.format
    return StoredFormat(ring.config, dtype, fp8)


def where(config: TrainConfig) -> str:
    """Versions go there."""
    return ", ".join(config.publish.endpoints) or str(_root(config))


def _root(config: TrainConfig) -> Path:
    root = config.publish.root
    return Path(root) if root else default_root(config.source.run)


def _hold(root: Path, world: World) -> BinaryIO | None:
    """By the first rank, for all of them; all raise what it raises."""
    held, why = None, ""
    if world.is_first:
        try:
            held = hold(root, "source.run or publish.root")
        except ConfigError as error:
            why = str(error)
    if why := world.same(why):
        raise ConfigError(why)
    return held
