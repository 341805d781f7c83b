"""The model that the simulation runs: a token is a hash of prefix, version and seed.

Weights of a version are a name. A core loads one, and takes another between two steps.
"""

import hashlib
from array import array

from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.core import Core
from everstep.engine.messages import Ready
from everstep.engine.plan import Row, Sampled
from everstep.engine.rollout import SAMPLED
from everstep.engine.scheduler import Scheduler
from tests.fakes import FakeRunner

VOCAB = 24
EOS = VOCAB - 1


def digest_of(version: int) -> str:
    return f"weights-{version}"


def draw(seed: int, ids: list[int], num_prompt: int, version: int) -> tuple[int, float]:
    """The next token after `ids`, and its logprob (a float32, as real ones are)."""
    data = array("q", [seed, version, num_prompt, *ids]).tobytes()
    noise = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return noise % VOCAB, -(noise >> 32 & 1023) / 128


class SimRunner(FakeRunner):
    """As FakeRunner, which checks every read of KV memory; draws depend on the version too."""

    def __init__(self, kv: ResolvedKV, version: int) -> None:
        super().__init__(kv, vocab_size=VOCAB, version=version, digest=digest_of(version))

    def _draw(self, row: Row) -> Sampled:
        token, logprob = draw(row.seed, row.all_ids, row.num_prompt, self.version)
        return Sampled(
            token_id=token, lp_sampled=logprob, lp_temp=logprob, kept_mass=1.0, flags=SAMPLED
        )


def make_core(kv: ResolvedKV, batch: BatchConfig, name: str, version: int) -> tuple[Core, Ready]:
    """A real core over the fake model."""
    scheduler = Scheduler(kv, batch)
    scheduler.set_version(digest_of(version))
    ready = Ready(
        core_id=name,
        vocab_size=VOCAB,
        max_model_len=kv.max_model_len,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        max_num_seqs=batch.max_num_seqs,
        version=version,
        digest=digest_of(version),
        numerics="hash",
        eos_ids=[EOS],
        num_moe_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Core(scheduler, SimRunner(kv, version)), ready
