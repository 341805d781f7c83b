"""Versions of a tiny model, a core that flips between them, and what a flip must give: the slow and
plain way, from the segments alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec import Struct

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.config import BatchConfig, ModelConfig, ResolvedKV
from everstep.engine.core.core import Core
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.messages import (
    Add,
    Flip,
    Flipped,
    FromCore,
    KVChanged,
    KVPolicy,
    Refused,
    Stage,
    Staged,
    StageReport,
    Staging,
    Tokens,
)
from everstep.engine.model import model
from everstep.engine.model.canaries import make_canary
from everstep.engine.model.model import KVStore
from everstep.engine.model.rotary import rotary_tables
from everstep.engine.model.runner import ModelRunner
from everstep.engine.model.staging import WeightStager
from everstep.engine.model.weights import Weights, load_weights
from everstep.kernels import QuerySpan, log_softmax

BLOCK = 4
CANARY = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def weights_of(folder: Path, version: int = 0, model: ModelConfig = ModelConfig()) -> Weights:
    checkpoint = Checkpoint.open(folder)
    return load_weights(checkpoint, model, version=version, on_progress=lambda *_: None)


def make_versions(root: Path, count: int, *, format: str = "bf16") -> list[Path]:
    """Folders of versions 0, 1, …: other weights, one model, each with a manifest and a canary."""
    folders = []
    for version in range(count):
        folder = make_checkpoint(root / f"v{version}", shape="tiny", format=format, seed=version)
        describe(folder, version)
        folders.append(folder)
    return folders


def describe(folder: Path, version: int, *, fingerprints: bool = True) -> None:
    """Write the manifest that a trainer with these weights would."""
    checkpoint = Checkpoint.open(folder)
    canary = make_canary(weights_of(folder), CANARY, 4, fingerprints=fingerprints)
    write_manifest(folder, manifest_of(checkpoint, version=version, canaries=[canary]))


class Drawn(Struct):
    """A rollout as a front knows it: tokens, their logprobs, and where what they were made of
    changes: (token, version, kv)."""

    ids: list[int] = []
    lp: list[float] = []
    segments: list[tuple[int, int, str]] = []
    kv: str = "computed"
    is_ended: bool = False


class FlippingCore:
    """A core over real weights, moved by hand."""

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        blocks: int = 60,
        chunk: int = 32,
        parking: int = 0,
        config: ModelConfig = ModelConfig(),
    ) -> None:
        self.folders = folders
        self.kv = ResolvedKV(
            block_size=BLOCK,
            num_blocks=blocks,
            max_model_len=96,
            prefix_caching=True,
            num_parking_blocks=parking,
        )
        self.runner = ModelRunner(weights_of(folders[0], model=config), self.kv, config)
        scheduler = Scheduler(self.kv, BatchConfig(max_num_seqs=8, max_num_batched_tokens=chunk))
        scheduler.set_version(self.runner.weights.digest)
        self.free_bytes = 1 << 40
        stager = WeightStager(self.runner, config, free_bytes=lambda: self.free_bytes)
        self.core = Core(scheduler, self.runner, stager, stage_share=1.0)
        self.version = 0
        self.rollouts: dict[str, Drawn] = {}
        self.adds: dict[str, Add] = {}
        self.cached: dict[str, int] = {}
        self.told: list[FromCore] = []

    def add(self, add: Add) -> None:
        self.adds[add.rollout_id] = add
        self.rollouts[add.rollout_id] = Drawn()
        self.take(self.core.handle(add))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.take(self.core.step() or [])

    def finish(self) -> None:
        while not all(rollout.is_ended for rollout in self.rollouts.values()):
            events = self.core.step()
            assert events is not None, "it stands still"
            self.take(events)

    def stage(self, version: int, folder: Path | None = None) -> StageReport | Refused:
        """Without a step."""
        path = str(folder or self.folders[version])
        self.take(self.core.handle(Stage(version, path)))
        swap = self.core._swap
        assert swap is not None
        while True:
            mark = len(self.told)
            swap.nothing_to_run()
            self.take(swap.work())
            for message in self.told[mark:]:
                if isinstance(message, Staged):
                    return message.report
                if isinstance(message, Refused):
                    return message

    def flip(self, version: int, kv: KVPolicy, *, steps: int = 0) -> None:
        """Staged, then so many steps under the old weights, then flipped."""
        report = self.stage(version)
        assert isinstance(report, StageReport), report
        self.step(steps)
        digest = Checkpoint.open(self.folders[version]).content_digest()
        self.take(self.core.handle(Flip(version, digest, kv)))

    def take(self, messages: Sequence[FromCore]) -> None:
        for message in messages:
            match message:
                case KVChanged():
                    for rollout_id, kv in message.moves:
                        self.rollouts[rollout_id].kv = kv
                case Flipped():
                    self.version = message.version
                case Tokens():
                    assert message.version == self.version, "tokens before the flip is told"
                    for tokens in message.each():
                        self._grow(tokens.rollout_id, tokens.ids, tokens.lp_temp)
                        self.rollouts[tokens.rollout_id].is_ended |= tokens.finish is not None
                        if tokens.num_cached_tokens is not None:
                            self.cached[tokens.rollout_id] = tokens.num_cached_tokens
            if not isinstance(message, Staging | Tokens):
                self.told.append(message)

    def _grow(self, rollout_id: str, ids: list[int], lp: list[float]) -> None:
        rollout = self.rollouts[rollout_id]
        origin = (self.version, rollout.kv)
        if ids and (not rollout.segments or rollout.segments[-1][1:] != origin):
            rollout.segments.append((len(rollout.ids), *origin))
        rollout.ids += ids
        rollout.lp += lp


@torch.inference_mode()
def lp_by_segments(
    versions: Sequence[Weights], prompt_ids: Sequence[int], drawn: Drawn
) -> list[float]:
    """ln p of each output token, computed position by position from what the segments say."""
    config, ids = versions[0].config, [*prompt_ids, *drawn.ids]
    num_prompt, found = len(prompt_ids), []
    table = list(range(1, 2 + len(ids) // BLOCK))
    store = KVStore.empty(config, (1 + len(table)) * BLOCK, versions[0].dtype)
    tables = rotary_tables(config, len(ids), torch.float32)

    def run(version: int, start: int, end: int) -> torch.Tensor:
        plan = model.plan_step(config, [QuerySpan(0, start, end - start, table)], BLOCK)
        part = torch.tensor(ids[start:end])
        return model.forward(versions[version], part, store, plan, tables).hidden

    ends = [start for start, _, _ in drawn.segments[1:]] + [len(drawn.ids)]
    for (start, version, kv), end in zip(drawn.segments, ends, strict=True):
        if kv == "computed" and num_prompt + start > 1:
            run(version, 0, num_prompt + start - 1)
        if kv == "recompute-prompt":
            run(version, 0, num_prompt)
        for token in range(start, end):
            position = num_prompt + token - 1
            logits = model.logits(versions[version], run(version, position, position + 1))
            found.append(log_softmax(logits)[0, ids[position + 1]].item())
    return found
