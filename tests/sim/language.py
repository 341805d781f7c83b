"""The model that the simulation runs: a token is a hash of prefix, version, seed, and of the weights
that wrote each position of the KV that it was drawn over.

Weights of a version are a name. A core loads one, stages another in pieces, and flips to it.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Generator
from pathlib import Path

from msgspec import Struct

from everstep.engine.checkpoint.manifest import Manifest, Version
from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.core.core import Core
from everstep.engine.core.plan import Row, Sampled
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.core.swap import Part
from everstep.engine.errors import CheckpointError, WeightsRefused
from everstep.engine.manager.versions import NOTHING_DONE
from everstep.engine.messages import Ready, Stage, StageReport
from everstep.engine.rollout import SAMPLED
from tests.fakes import FakeRunner

VOCAB = 24
EOS = VOCAB - 1
BASE = 1
"""The version that a front is made with."""
_FOLDER = Path("/weights")
_NUM_PIECES = 4
# what the core's clock moves on when it is looked at: work between steps takes time
_GLANCE_S = 0.001


def digest_of(version: int) -> str:
    return f"{version:064x}"


def folder_of(version: int) -> str:
    return str(_FOLDER / str(version))


def read_manifest(folder: Path) -> Manifest:
    """Stands for the real one: nothing is read."""
    version = int(folder.name)
    parent = digest_of(version - 1)
    return Manifest(version=version, digest=digest_of(version), parent=parent, tensors={})


def draw(seed: int, ids: list[int], num_prompt: int, kv: list[int]) -> tuple[int, float]:
    """The next token after `ids`, and its logprob (a float32, as real ones are).

    kv  version that wrote each position's KV; the last is the version that draws
    """
    data = array("q", [seed, num_prompt, *ids, *kv]).tobytes()
    noise = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return noise % VOCAB, -(noise >> 32 & 1023) / 128


class SimRunner(FakeRunner):
    """As FakeRunner, which checks every read of KV memory."""

    def __init__(self, kv: ResolvedKV, version: int) -> None:
        super().__init__(kv, vocab_size=VOCAB, version=version, digest=digest_of(version))

    def _draw(self, row: Row) -> Sampled:
        kv = [int(digest, 16) for digest in self.digests(row)]
        kv += [self.version] * (row.end - row.start)
        token, logprob = draw(row.seed, row.all_ids, row.num_prompt, kv)
        return Sampled(
            token_id=token, lp_sampled=logprob, lp_temp=logprob, kept_mass=1.0, flags=SAMPLED
        )


class SimWeights(Struct):
    """A version that was staged."""

    version: int
    digest: str


class SimStager:
    """Stages in pieces. bad: share of versions that turn out not to be what was published."""

    def __init__(self, runner: SimRunner, rng: random.Random, bad: float) -> None:
        self._runner, self._rng, self._bad = runner, rng, bad

    def stage(self, order: Stage) -> Generator[Part, None, tuple[SimWeights, StageReport]]:
        for done in range(_NUM_PIECES):
            yield "read", done, _NUM_PIECES
        if self._rng.random() < self._bad:
            raise WeightsRefused("layer 0: not what the trainer computes", layer=0)
        return SimWeights(order.version, digest_of(order.version)), NOTHING_DONE

    def flip(self, prepared: SimWeights) -> Generator[None, None, None]:
        self._runner.set_version(prepared.version, prepared.digest)
        return self._give_back()

    def discard(self) -> Generator[None, None, None]:
        return self._give_back()

    def _give_back(self) -> Generator[None, None, None]:
        for _ in range(_NUM_PIECES):
            yield


class WeightSettings(Struct, frozen=True):
    """bad: share of stagings that are refused; missing: of restarts that do not find the weights."""

    bad: float
    missing: float


def make_core(
    kv: ResolvedKV,
    batch: BatchConfig,
    name: str,
    weights: Version | None,
    settings: WeightSettings,
    now: Callable[[], float],
    rng: random.Random,
) -> tuple[Core, Ready]:
    """A real core over the fake model. Raises CheckpointError where its weights are gone."""
    if weights is not None and rng.random() < settings.missing:
        raise CheckpointError(f"{weights.folder}: no such folder")
    version = BASE if weights is None else weights.number
    scheduler = Scheduler(kv, batch)
    scheduler.set_version(digest_of(version))
    runner = SimRunner(kv, version)
    glances = 0

    def clock() -> float:
        nonlocal glances
        glances += 1
        return now() + glances * _GLANCE_S

    ready = Ready(
        core_id=name,
        vocab_size=VOCAB,
        max_model_len=kv.max_model_len,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        max_num_seqs=batch.max_num_seqs,
        version=version,
        digest=digest_of(version),
        path=folder_of(version),
        numerics="hash",
        eos_ids=[EOS],
        num_moe_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    stager = SimStager(runner, rng, settings.bad)
    return Core(scheduler, runner, stager, stage_share=0.5, clock=clock), ready
