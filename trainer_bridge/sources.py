"""Where a run's groups come from: files that are read whole, or an engine that goes on sampling."""

from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Protocol

import torch

from ..engine.errors import BridgeError, InvalidTrajectory
from ..engine.ring_config import RingConfig
from ..engine.stored_format import StoredFormat
from ..engine.trajectory import unpack
from .config import TrainConfig
from .curve import read_keys
from .protocol import TrajectoryGroup
from .samples import Group, Sample, sample_of
from .sharding import World
from .trainable import TrainableRing
from .trainer import Report, Trainer
from .trainer_canaries import make_canaries, texts_of
from .trajectory_files import TrajectoryFiles
from .trajectory_receiver import TrajectoryReceiver
from .weight_folder import default_root
from .weight_sender import WeightSender
from .weight_targets import Elsewhere, Here, Target


class Source(Protocol):
    """Iterations are numbered as the versions that they are trained on: from 0."""

    def share(self, iteration: int) -> Sequence[Group] | None:
        """This rank's groups of an iteration; None: there are no more."""

    def trained(self, report: Report, groups: Sequence[Group]) -> None:
        """These groups were trained, and `report.version` is in the weights."""

    def durable(self, checkpoint: Path, iteration: int) -> None:
        """A checkpoint holds the effect of everything up to this iteration."""

    def close(self) -> None: ...


class FileSource:
    """Groups of files, again and again for some epochs."""

    def __init__(self, config: TrainConfig, world: World, ring: RingConfig) -> None:
        self._config, self._world = config, world
        self._files = TrajectoryFiles.read(config, ring)

    def share(self, iteration: int) -> Sequence[Group] | None:
        size = self._config.batch.groups
        groups = self._files.batch(iteration, size, self._config.source.epochs)
        return None if groups is None else groups[self._world.rank :: self._world.size]

    def trained(self, report: Report, groups: Sequence[Group]) -> None:
        """Files need not know."""

    def durable(self, checkpoint: Path, iteration: int) -> None:
        """Files stay."""

    def close(self) -> None:
        """Nothing is open."""


class BridgeSource:
    """Groups that an engine deals to the ranks (protocol.py), once each; versions for it.

    checkpoint  that the trainer goes on from, None for the model that the run began with

    A lineage is one life of the trainer: what the checkpoint does not hold is dealt anew.
    Raises PeerMissing, PeerRefused and ConfigError, in one line each.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path | None) -> None:
        self._trainer, config = trainer, trainer.config
        world, source = trainer.world, config.source
        lineage = world.same(token_hex(8))
        self._sender = WeightSender(
            trainer.ring,
            world,
            _target(config, world, lineage),
            source=trainer.folder,
            stored=stored_as(config, trainer.ring, trainer.dtype),
            lineage=lineage,
        )
        if checkpoint is not None:
            # the engine may be ahead of it, and goes back to these weights
            self._sender.publish(trainer.version)
        self._receiver = TrajectoryReceiver(
            source.endpoint,
            run=source.run,
            lineage=lineage,
            rank=world.rank,
            world=world.size,
            checkpoint="" if checkpoint is None else checkpoint.name,
            done_through=trainer.version - 1,
            keys=read_keys(Path(source.keys), "trainer") if source.keys else None,
        )
        try:
            self._receiver.connect(source.deadline_s)
        except BaseException:
            self._receiver.close("it could not begin")
            self._sender.close()
            raise

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
        self._receiver.trained(report.version - 1, report.version, published.digest, published.path)

    def durable(self, checkpoint: Path, iteration: int) -> None:
        self._receiver.durable(checkpoint.name, iteration)

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()

    def _group(self, group: TrajectoryGroup) -> Group:
        """Responses of no tokens count in the group's baseline, and have nothing to train."""
        samples: list[Sample] = []
        others: list[float] = []
        try:
            for member in group.members:
                rollout = unpack(member.trajectory)
                if not rollout.output_ids:
                    others += [] if member.reward is None else [member.reward]
                    continue
                samples.append(
                    sample_of(
                        rollout,
                        self._trainer.ring.config,
                        replay=self._trainer.config.routing_replay,
                        reward=member.reward,
                        mask=member.mask,
                    )
                )
        except InvalidTrajectory as error:
            raise BridgeError(f"group {group.name}: {error}") from None
        return Group.of(group.name, samples, self._trainer.config.advantage_std, others=others)


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
