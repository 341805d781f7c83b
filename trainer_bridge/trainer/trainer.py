"""One rank of a trainer: batches of groups in, new weights out. What to train on, and when to save,
is for whoever drives it (fsdp_trainer.py has the loop over files).

An iteration trains the groups of all ranks once and makes the next version of the weights:

    score old policies      where the loss needs them, with the weights before the update
    for each update         microbatches: forward, loss over the whole update's denominators, backward
                            clip, AdamW

Ranks may hold different numbers of groups and tokens: they agree on the number of microbatches, and
those who have none left run an empty one, since the layers are gathered together.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct

from ..losses.losses import BatchSize, LossInputs, make_loss
from ..losses.metrics import LossMetrics
from ..trajectories.samples import Group
from .checkpointing import TrainerState, read_state, read_tensors
from .config import TrainConfig
from .fp8_operations import check_fp8
from .held_weights import HeldWeights
from .old_policy import REFERENCE, ExactPolicy, Item
from .optimiser import Optimiser
from .packing import PackedBatch, TrainSequence, pack, split
from .sharding import World, reshard, shard
from .trainable import Scores, TrainableRing, trainable_config

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Report(Struct, frozen=True, kw_only=True):
    """An iteration, over all ranks.

    version        of the weights that it made
    loss           its sum over the updates' mean
    samples        responses in the batch, those of no tokens too
    reward         mean over the responses that have one; None: none has
    grad_norm      of each update, before clipping
    metrics        of `loss_metrics`; empty for objective sft
    rows           tokens that went through the layers, forward and backward
    groups         in the batch; trained_groups: those that taught something
    reward_std     of the same rewards
    length_max     tokens of the longest response
    seconds        that `Trainer.step` took on the first rank
    spent          seconds by part, on the first rank: score (old and reference logprobs) and train
                   (the updates) are those of `step`; whoever drives it adds wait (for the groups),
                   publish (the version for engines) and save (the checkpoint before this iteration,
                   if there was one)
    time_s         Unix time at its end
    """

    version: int
    loss: float
    lr: float
    grad_norm: list[float]
    samples: int
    tokens: int
    rows: int
    groups: int
    trained_groups: int
    reward: float | None
    reward_std: float | None
    length_max: int
    seconds: float
    spent: dict[str, float]
    time_s: float
    metrics: dict[str, float]


class Trainer:
    """The model, its optimiser, and the versions that it made.

    folder  the checkpoint to begin with
    Raises CheckpointError for one that cannot be trained, ConfigError for contradicting settings.
    """

    def __init__(self, config: TrainConfig, world: World, folder: Path) -> None:
        config.check()
        self.config, self.world, self.folder = config, world, folder
        if config.numerics.fp8:
            check_fp8(world.device)
        self.ring, self.dtype = sharded(config, world, folder)
        self.ring.load(folder)
        named = dict(self.ring.named_parameters())
        self.optimiser = Optimiser(named, config.optim)
        self._held = HeldWeights(named)
        self._exact = ExactPolicy(self._held, world, config.hold_versions)
        self._loss = make_loss(config.loss)
        self.version = 0
        self.digests: dict[int, str] = {}
        """Of versions as they were published, where they were: those that can be held."""
        if self._has_reference:
            self._held.hold(REFERENCE)
        self._hold_version()

    # -- training

    def step(self, groups: Sequence[Group]) -> Report:
        """Train this rank's groups of one iteration; every rank must call, with groups or without."""
        began = time.perf_counter()
        rate = self.config.optim.rate(self.optimiser.num_updates)
        num = self.config.batch.updates
        # whole groups, in turn: each update has its share of them on every rank
        parts = [groups[n::num] for n in range(num)]
        items = [
            [Item(s) for group in part if self._takes_part(group) for s in group.samples]
            for part in parts
        ]
        if self.is_rl:
            self._score_before([item for part in items for item in part])
        tally = _Tally(score_s=time.perf_counter() - began)
        for part, own in zip(parts, items, strict=True):
            self._update(part, own, tally)
        self.version += 1
        self._hold_version()
        return self._report(groups, tally, rate, began)

    @torch.no_grad()
    def score(self, sequences: Sequence[TrainSequence]) -> list[torch.Tensor]:
        """Logprobs (scored tokens,) float32 of each sequence, as the weights are. Collective."""
        found = [torch.empty(0)] * len(sequences)
        for places in self._microbatches(sequences):
            batch = self._pack([sequences[n] for n in places])
            scores = self.ring(batch)
            if places:
                counts = torch.bincount(batch.responses[0], minlength=len(places)).tolist()
                for n, lp in zip(places, torch.split(scores.lp, counts), strict=True):
                    found[n] = lp
        # without a backward pass the outermost parameters would stay gathered, as they were
        reshard(self.ring)
        return found

    @property
    def is_rl(self) -> bool:
        return self.config.objective == "rl"

    @property
    def _has_reference(self) -> bool:
        return self.is_rl and self.config.loss.kl.coef > 0

    def _takes_part(self, group: Group) -> bool:
        """Whether a group is computed at all; one that teaches nothing is in denominators alone."""
        return not self.is_rl or group.teaches or self._has_reference

    def _update(self, groups: Sequence[Group], items: Sequence[Item], tally: "_Tally") -> None:
        """One update: `groups` are all of it, `items` what is computed."""
        sums = self.world.sums(
            sum(group.num_responses for group in groups), sum(group.num_tokens for group in groups)
        )
        size = BatchSize(sequences=int(sums[0]), tokens=int(sums[1]))
        is_any = False
        for places in self._microbatches([item.sample.sequence for item in items]):
            is_any = True
            picked = [items[n] for n in places]
            batch = self._pack([item.sample.sequence for item in picked])
            scores = self.ring(batch)
            loss = scores.lp.sum()  # of nothing, where none is picked
            if picked and self.is_rl:
                inputs = self._inputs(picked, batch, scores, size)
                output = self._loss(inputs)
                tally.metrics.add(inputs, output)
                loss = output.loss
            elif picked:
                loss = -loss / max(1, size.tokens)
            # the gradient is averaged over ranks, and each has its part of one sum
            (loss * self.world.size).backward()
            tally.loss += float(loss.detach())
            tally.rows += batch.num_rows if picked else 0
        if is_any:
            tally.norms.append(self.optimiser.step())

    def _inputs(
        self, items: Sequence[Item], batch: PackedBatch, scores: Scores, size: BatchSize
    ) -> LossInputs:
        """All sequences in one row: every token of it is a response token."""

        def row(columns: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(columns)).to(self.world.device)[None]

        samples = [item.sample for item in items]
        versions = row([s.scored(s.versions) for s in samples])
        proximal = _row([item.proximal for item in items])
        return LossInputs(
            lp_new=scores.lp[None],
            lp_infer=row([s.scored(s.lp_infer) for s in samples]),
            advantages=row([np.full(s.num_tokens, s.advantage, np.float32) for s in samples]),
            mask=torch.ones_like(scores.lp, dtype=torch.bool)[None],
            lp_old=_row([item.lp_old for item in items]),
            lp_ref=_row([item.lp_ref for item in items]),
            sequence_ids=batch.responses[0][None],
            lag=self.version - versions,
            entropy=scores.entropy[None],
            proximal=None if proximal is None else proximal.to(self.world.device),
            batch=size,
        )

    def _score_before(self, items: Sequence[Item]) -> None:
        """What the loss compares with, by the weights before the update, or by older ones."""
        if self._has_reference:
            with self._held.use(REFERENCE):
                for item, lp in zip(items, self._score(items), strict=True):
                    item.lp_ref = lp
        if self.config.loss.old_policy == "exact":
            self._exact.score(items, self.version, self._score)
        elif self.config.batch.updates > 1:
            for item, lp in zip(items, self._score(items), strict=True):
                item.lp_old = lp

    def _score(self, items: Sequence[Item]) -> list[torch.Tensor]:
        return self.score([item.sample.sequence for item in items])

    # -- batches

    def _microbatches(self, sequences: Sequence[TrainSequence]) -> Iterator[list[int]]:
        """Places into `sequences`; as many lists on every rank, the last ones empty."""
        groups = split([s.num_rows for s in sequences], self.config.batch.max_rows)
        for n in range(self.world.largest(len(groups))):
            yield groups[n] if n < len(groups) else []

    def _pack(self, sequences: Sequence[TrainSequence]) -> PackedBatch:
        return pack(sequences or [_NOTHING]).to(self.world.device)

    # -- weights and checkpoints

    def _hold_version(self) -> None:
        """Keep the newest weights, for tokens that they will sample."""
        if not self.is_rl or self.config.loss.old_policy != "exact":
            return
        self._held.hold(str(self.version))
        versions = [label for label in self._held.labels if label != REFERENCE]
        for label in versions[: -self.config.hold_versions]:
            self._held.drop(label)

    def published(self, digest: str) -> None:
        """The newest version was, with this digest: tokens say by it whether they are of it."""
        self.digests[self.version] = digest
        for version in sorted(self.digests)[: -self.config.hold_versions]:
            del self.digests[version]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, DTensor or tensor) in float32: what is sent to engines."""
        return self.ring.tensors()

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed run needs, by name; they alias what is in use."""
        return self._tensors_with(self._held.labels)

    def _tensors_with(self, labels: Sequence[str]) -> dict[str, torch.Tensor]:
        """Of a checkpoint that holds these weights beside the ones in training."""
        found = {f"model.{name}": tensor.detach() for name, tensor in self.ring.tensors()}
        found |= {f"optim.{name}": tensor for name, tensor in self.optimiser.state().items()}
        for label in labels:
            held = self._held.tensors(label)
            found |= {f"held.{label}.{name}": tensor for name, tensor in held.items()}
        return found

    def state(self) -> TrainerState:
        """What a checkpoint holds beside tensors."""
        return TrainerState(
            version=self.version,
            num_updates=self.optimiser.num_updates,
            held=tuple(self._held.labels),
            digests=dict(self.digests),
        )

    def restore(self, folder: Path) -> TrainerState:
        """Go on from a checkpoint. Raises CheckpointError where it is not of this model.

        What its settings did not ask for and ours do: a reference is the model that the run began
        with, and the old policy `exact` begins with the weights of the checkpoint.
        """
        state = read_state(folder)
        for label in self._held.labels:
            if label != REFERENCE:
                self._held.drop(label)
        for label in state.held:
            self._held.hold(label)
        tensors = self._tensors_with(state.held)
        read_tensors(folder, tensors)
        prefix = "optim."
        moments = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.optimiser.load(moments, state.num_updates)
        self.version = state.version
        self.digests = dict(state.digests)
        self._hold_version()
        return state

    # -- telling

    def _report(
        self, groups: Sequence[Group], tally: "_Tally", rate: float, began: float
    ) -> Report:
        rewards = [r for group in groups for r in group.rewards if r is not None]
        lengths = [sample.num_tokens for group in groups for sample in group.samples]
        loss, rows, count, tokens, num_groups, teaching, rewarded, reward, squares = (
            self.world.sums(
                tally.loss,
                tally.rows,
                sum(group.num_responses for group in groups),
                sum(lengths),
                len(groups),
                sum(map(self._takes_part, groups)),
                len(rewards),
                math.fsum(rewards),
                math.fsum(reward * reward for reward in rewards),
            )
        )
        mean = reward / rewarded if rewarded else None
        spread = None if mean is None else math.sqrt(max(0.0, squares / rewarded - mean * mean))
        length_max = self.world.largest(max(lengths, default=0))
        metrics: dict[str, float] = {}
        if self.is_rl:
            tally.metrics.gather(self.world.device)
            metrics = tally.metrics.values(aliases=False)
        seconds = time.perf_counter() - began
        return Report(
            version=self.version,
            loss=loss / self.config.batch.updates,
            lr=rate,
            grad_norm=tally.norms,
            samples=int(count),
            tokens=int(tokens),
            rows=int(rows),
            groups=int(num_groups),
            trained_groups=int(teaching),
            reward=mean,
            reward_std=spread,
            length_max=length_max,
            seconds=seconds,
            spent={"score": tally.score_s, "train": seconds - tally.score_s},
            time_s=time.time(),
            metrics=metrics,
        )


def sharded(config: TrainConfig, world: World, folder: Path) -> tuple[TrainableRing, torch.dtype]:
    """The model of this folder spread over the ranks, its memory not filled; and the type in which
    it is used and stored."""
    ring_config = trainable_config(folder)
    auto = "bfloat16" if ring_config.dtype == "bfloat16" else "float32"
    dtype = DTYPES[auto if config.numerics.dtype == "auto" else config.numerics.dtype]
    ring = TrainableRing(
        ring_config,
        numerics="fp8" if config.numerics.fp8 else config.numerics.kernels,
        device="meta",
        recompute_layers=config.numerics.recompute,
    )
    shard(ring, world, dtype)
    return ring, dtype


@dataclass
class _Tally:
    """What this rank counts in an iteration."""

    score_s: float
    loss: float = 0.0
    rows: int = 0
    norms: list[float] = field(default_factory=list)
    metrics: LossMetrics = field(default_factory=LossMetrics)


# what a rank runs whose microbatches are over: one row, of which nothing is scored
_NOTHING = TrainSequence(
    ids=np.zeros(2, dtype=np.int64), num_prompt=1, mask=np.zeros(1, dtype=np.bool_)
)


def _row(columns: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(1, tokens) of what every item has, or None."""
    found = [column for column in columns if column is not None]
    return torch.cat(found)[None] if found else None
