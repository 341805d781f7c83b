"""Stand-ins for the slow and the outside: a runner without a model, a front without HTTP, a clock.

`FakeRunner` keeps KV memory for real. Every slot of every block remembers the token, the whole
context and the weights that wrote it, so a stale, aliased, poisoned or lost entry is caught at
the first row that reads it, not by a wrong token much later.
"""

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path

from msgspec import Struct

from everstep.engine.checkpoint.manifest import (
    Manifest,
    TensorRecord,
    combine_digests,
    read_manifest,
    write_manifest,
)
from everstep.engine.config import ResolvedKV
from everstep.engine.core.plan import Row, RowResult, Sampled, StepPlan, StepResult
from everstep.engine.core.swap import Part
from everstep.engine.errors import WeightsRefused
from everstep.engine.messages import (
    Add,
    FromCore,
    KVChanged,
    RolloutTokens,
    Stage,
    StageReport,
    StateChanged,
    Tokens,
)
from everstep.engine.rollout import SAMPLED, KVState, Rollout, RolloutState, SamplingParams

ROUTING_RECORD = 2
"""Bytes of routing ids per token; the weights take four times as many."""


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def fingerprint(*parts: object) -> int:
    """48 bits that depend on every part."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")


def fake_token(seed: int, position: int, ids: Sequence[int], vocab_size: int) -> int:
    """The token that the fake model draws: a function of the rollout alone."""
    return fingerprint("token", seed, position, tuple(ids)) % vocab_size


def fake_logprob(ids: Sequence[int]) -> float:
    """The logprob of the last id given those before it: a float32, as real ones are."""
    return -(fingerprint("logprob", tuple(ids)) % 1000) / 128


def fake_routing(ids: Sequence[int]) -> bytes:
    """The routing record of the last id's row."""
    return (fingerprint("routing", tuple(ids)) % 65536).to_bytes(ROUTING_RECORD, "little")


def draw(
    seed: int, ids: Sequence[int], num_prompt: int, vocab_size: int, banned_ids: Sequence[int] = ()
) -> Sampled:
    """One draw of the fake model, next to all that a real one would report."""
    position = len(ids) - num_prompt
    token = fake_token(seed, position, ids, vocab_size)
    while token in banned_ids:
        token = (token + 1) % vocab_size
    logprob = fake_logprob([*ids, token])
    return Sampled(
        token_id=token,
        lp_sampled=logprob,
        lp_temp=logprob,
        kept_mass=1.0,
        flags=SAMPLED,
    )


def generate_alone(
    prompt_ids: Sequence[int],
    *,
    seed: int,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    min_tokens: int = 0,
    vocab_size: int = 64,
) -> list[int]:
    """The output of a rollout that nothing ever disturbs: the model for every schedule."""
    ids = list(prompt_ids)
    while len(ids) - len(prompt_ids) < max_tokens:
        banned = banned_ids if len(ids) - len(prompt_ids) < min_tokens else ()
        ids.append(draw(seed, ids, len(prompt_ids), vocab_size, banned).token_id)
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt_ids) :]


class Slot(Struct, frozen=True):
    """One token's keys and values: what they are of, and the weights that made them."""

    token: int
    context: int
    """Fingerprint of this slot on top of the context it was computed over, weights included."""
    digest: str


def _link(context: int, token: int, digest: str) -> int:
    """Fingerprint of a token's keys and values over a context. Half of all that a fake step costs,
    so it is Python's own hash, which nobody sees."""
    return hash((context, token, digest))


POISON = Slot(-1, -1, "poison")


class FakeRunner:
    """Carries out plans over fake KV memory and checks every read; AssertionError if one is wrong.

    A rollout id in `nonfinite` gets a non-finite row in its next step. `is_checking = False`
    skips the memory altogether, for timings.
    """

    def __init__(
        self, kv: ResolvedKV, *, vocab_size: int = 64, version: int = 1, digest: str = "v1"
    ) -> None:
        self.vocab_size = vocab_size
        self.version = version
        self.digest = digest
        self.nonfinite: set[str] = set()
        self.is_checking = True
        self.num_steps = 0
        self.num_computed_tokens = 0
        self._block_size = kv.block_size
        self._num_parking_blocks = kv.num_parking_blocks
        self._blocks: list[list[Slot | None]] = [
            [None] * kv.block_size for _ in range(kv.num_blocks)
        ]
        self._parked: dict[str, list[list[Slot | None]]] = {}
        # per rollout: context fingerprints of what it wrote itself, whatever the weights were
        self._own: dict[str, dict[int, int]] = {}

    def set_version(self, version: int, digest: str) -> None:
        self.version, self.digest = version, digest

    def forget(self, rollout_id: str) -> None:
        """The id may come again, for a rollout that has computed nothing yet."""
        self._own.pop(rollout_id, None)
        self.nonfinite.discard(rollout_id)

    @property
    def num_parked_blocks(self) -> int:
        return sum(len(blocks) for blocks in self._parked.values())

    def run(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        if self.is_checking:
            self._carry_out_moves(plan)
            self._check_writes(plan)
        results = [self._run_row(row) for row in plan.rows]
        return StepResult.of(self.version, self.digest, results)

    def _carry_out_moves(self, plan: StepPlan) -> None:
        for park in plan.parks:
            assert park.key not in self._parked, f"{park.key} is parked twice"
            self._parked[park.key] = [list(self._blocks[block]) for block in park.blocks]
            assert self.num_parked_blocks <= self._num_parking_blocks, "host memory is full"
        for unpark in plan.unparks:
            saved = self._parked.pop(unpark.key)
            for block, slots in zip(unpark.blocks, saved, strict=True):
                self._write(block, slots)
        for copy in plan.copies:
            self._write(copy.target, self._blocks[copy.source])
        for key in plan.unpark_drops:
            del self._parked[key]

    def _write(self, block: int, slots: Sequence[Slot | None]) -> None:
        assert block != 0, "the null block was written"
        self._blocks[block] = list(slots)

    def _check_writes(self, plan: StepPlan) -> None:
        """No block is written by one row and read or written by another."""
        written: dict[int, str] = {}
        for row in plan.rows:
            assert 0 < row.num_tokens <= row.num_missing <= len(row.all_ids), row.rollout_id
            assert len(row.block_table) * self._block_size >= row.end, "the table does not cover"
            last = -(-row.end // self._block_size)
            for block in row.block_table[row.start // self._block_size : last]:
                assert written.setdefault(block, row.rollout_id) == row.rollout_id
        for row in plan.rows:
            for block in row.block_table[: row.start // self._block_size]:
                assert block not in written, f"block {block} is read and written in one step"

    def _run_row(self, row: Row) -> RowResult:
        count = len(row.token_ids)
        self.num_computed_tokens += count
        if row.rollout_id in self.nonfinite:
            self.nonfinite.discard(row.rollout_id)
            self._poison(row)
            return RowResult(nonfinite=f"step {self.num_steps}, layer 0")
        if self.is_checking:
            context = self._read(row)
            self._compute(row, context)
        result = RowResult()
        if row.samples:
            result.sampled = self._draw(row)
            _add_extras(result.sampled, row.sampling)
        prefixes = [row.all_ids[: row.start + i + 1] for i in range(count)]
        if row.sampling.prompt_logprobs is not None:
            for prefix in prefixes[: max(0, row.num_prompt - 1 - row.start)]:
                logprob = fake_logprob(row.all_ids[: len(prefix) + 1])
                result.prompt_lp.append(logprob)
                if row.sampling.prompt_logprobs:
                    result.prompt_top.append([(row.all_ids[len(prefix)], logprob)])
        if "routing" in row.sampling.record:
            result.routing_ids = b"".join(fake_routing(prefix) for prefix in prefixes)
            result.routing_weights = b"".join(fake_routing(prefix) * 4 for prefix in prefixes)
        return result

    def _draw(self, row: Row) -> Sampled:
        return draw(row.seed, row.all_ids, row.num_prompt, self.vocab_size, row.banned_ids)

    def _slot(self, row: Row, position: int) -> tuple[list[Slot | None], int]:
        index, offset = divmod(position, self._block_size)
        return self._blocks[row.block_table[index]], offset

    def _read(self, row: Row) -> int:
        """Check every slot before the row; returns the fingerprint of the context."""
        own = self._own.setdefault(row.rollout_id, {})
        context = 0
        for position in range(row.start):
            slots, offset = self._slot(row, position)
            slot = slots[offset]
            where = f"{row.rollout_id}, position {position}"
            assert slot is not None, f"{where}: never computed"
            assert slot != POISON, f"{where}: poisoned"
            assert slot.token == row.all_ids[position], f"{where}: another token's KV"
            if own.get(position) != slot.context:
                expected = _link(context, slot.token, slot.digest)
                assert slot.context == expected, f"{where}: KV of another context"
                assert slot.digest == self.digest, f"{where}: shared KV of weights {slot.digest}"
                own[position] = slot.context
            context = slot.context
        return context

    def digests(self, row: Row) -> list[str]:
        """Of the weights that made the KV which a row reads, by position."""
        slots = (self._slot(row, position) for position in range(row.start))
        found = [block[offset] for block, offset in slots]
        return [slot.digest for slot in found if slot is not None]

    def _compute(self, row: Row, context: int) -> None:
        own = self._own[row.rollout_id]
        for position, token in enumerate(row.token_ids, row.start):
            slots, offset = self._slot(row, position)
            context = _link(context, token, self.digest)
            slots[offset] = Slot(token, context, self.digest)
            own[position] = context

    def _poison(self, row: Row) -> None:
        if self.is_checking:
            for position in range(row.start, row.start + len(row.token_ids)):
                slots, offset = self._slot(row, position)
                slots[offset] = POISON


class FakeWeights(Struct):
    """A version that was staged."""

    version: int
    digest: str


def make_version(
    folder: Path, number: int, *, lineage: str = "", parent: str | None = None, content: str = ""
) -> Path:
    """A folder with a manifest and no weights. content: what its digest depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{number} {content}".encode()).hexdigest()
    manifest = Manifest(
        version=number,
        digest=combine_digests({"w": digest}),
        parent=parent,
        lineage=lineage,
        tensors={"w": TensorRecord("F32", (1,), digest)},
    )
    write_manifest(folder, manifest)
    return folder


class FakeStager:
    """Stages what a path says: a folder of `make_version`, a digest, or `DIGEST!TENSOR`, which is
    refused and names that tensor. A folder that holds a file `refuse` is refused too."""

    def __init__(self, runner: FakeRunner, *, num_pieces: int = 3) -> None:
        self.runner = runner
        self.num_pieces = num_pieces

    def stage(self, order: Stage) -> Generator[Part, None, tuple[FakeWeights, StageReport]]:
        digest, _, tensor = order.path.partition("!")
        manifest = read_manifest(Path(order.path))
        if manifest is not None:
            digest = manifest.digest
            tensor = "w" if Path(order.path, "refuse").exists() else ""
        for done in range(self.num_pieces):
            yield "read", done, self.num_pieces
        if tensor:
            raise WeightsRefused(f"{tensor} is not what was published", tensor=tensor)
        if order.digest and order.digest != digest:
            raise WeightsRefused(f"digest {digest}, expected {order.digest}")
        report = StageReport(
            num_bytes=1, seconds=0.0, busy_seconds=0.0, slices=0, longest_slice_s=0.0
        )
        return FakeWeights(order.version, digest), report

    def flip(self, prepared: FakeWeights) -> Generator[None, None, None]:
        self.runner.set_version(prepared.version, prepared.digest)
        return self._give_back()

    def discard(self) -> Generator[None, None, None]:
        return self._give_back()

    def _give_back(self) -> Generator[None, None, None]:
        for _ in range(self.num_pieces):
            yield


def _add_extras(sampled: Sampled, sampling: SamplingParams) -> None:
    if "lp_raw" in sampling.record:
        sampled.lp_raw = sampled.lp_temp
    if "entropy" in sampling.record:
        sampled.entropy = 1.5
    if "kept_ids" in sampling.record:
        sampled.kept_ids = [sampled.token_id]
    if sampling.top_logprobs:
        sampled.top = [(sampled.token_id, sampled.lp_sampled)]


class FakeFront:
    """Keeps what a core tells of its rollouts, and checks that it is complete, once and legal."""

    def __init__(self) -> None:
        self.rollouts: dict[str, Rollout] = {}
        self.adds: dict[str, Add] = {}
        self.kv: dict[str, KVState] = {}

    def add(self, add: Add) -> Rollout:
        """Note a rollout as it is handed to a core."""
        rollout = Rollout(
            id=add.rollout_id,
            group_id=add.rollout_id,
            prompt_ids=list(add.prompt_ids),
            sampling=add.sampling,
            seed=add.seed,
            max_tokens=add.max_tokens,
            output_ids=list(add.output_ids),
            num_cached_tokens=-1,
        )
        self.rollouts[rollout.id] = rollout
        self.adds[rollout.id] = add
        return rollout

    def receive(self, messages: Sequence[FromCore]) -> None:
        for message in messages:
            if isinstance(message, StateChanged):
                for rollout_id, state in message.moves:
                    self.rollouts[rollout_id].move(RolloutState(state))
            elif isinstance(message, KVChanged):
                self.kv.update(message.moves)
            elif isinstance(message, Tokens):
                for tokens in message.each():
                    self._receive_tokens(self.rollouts[tokens.rollout_id], tokens, message.version)

    def _receive_tokens(self, rollout: Rollout, tokens: RolloutTokens, version: int) -> None:
        where = rollout.id
        if tokens.num_cached_tokens is not None:
            assert rollout.num_cached_tokens == -1, f"{where}: num_cached_tokens came twice"
            rollout.num_cached_tokens = tokens.num_cached_tokens
        assert tokens.start == len(rollout.output_ids), f"{where}: tokens from {tokens.start}"
        for values in (tokens.lp_sampled, tokens.lp_temp, tokens.kept_mass, tokens.flags):
            assert len(values) == len(tokens.ids)
        rollout.output_ids += tokens.ids
        rollout.versions += [version] * len(tokens.ids)
        rollout.lp_raw += tokens.lp_raw
        rollout.entropy += tokens.entropy
        rollout.top += tokens.top
        if tokens.prompt_lp:
            assert tokens.prompt_start == len(rollout.prompt_lp), f"{where}: prompt_lp twice"
            has_tops = bool(rollout.sampling.prompt_logprobs)
            assert len(tokens.prompt_top) == (len(tokens.prompt_lp) if has_tops else 0)
            rollout.prompt_lp += tokens.prompt_lp
            rollout.prompt_top += tokens.prompt_top
        if tokens.routing_ids:
            num_records = len(rollout.routing_ids) // ROUTING_RECORD
            assert tokens.routing_start == num_records, f"{where}: routing twice, or a hole"
            assert len(tokens.routing_weights) == 4 * len(tokens.routing_ids)
            rollout.routing_ids += tokens.routing_ids
        if tokens.finish is not None:
            rollout.finish_reason = tokens.finish
            is_error = tokens.finish.type == "error"
            rollout.move(RolloutState.FAILED if is_error else RolloutState.FINISHED)

    def alone(self, rollout_id: str, vocab_size: int) -> list[int]:
        """The output that this rollout has when nothing ever disturbs it."""
        add = self.adds[rollout_id]
        return generate_alone(
            add.prompt_ids,
            seed=add.seed,
            max_tokens=add.max_tokens,
            stop_ids=add.stop_ids,
            banned_ids=add.banned_ids,
            min_tokens=add.sampling.min_tokens,
            vocab_size=vocab_size,
        )

    def check(self, rollout_id: str, vocab_size: int) -> None:
        """Raise AssertionError unless tokens and records are those of the rollout alone.

        An unfinished rollout has the beginning of them.
        """
        rollout, add = self.rollouts[rollout_id], self.adds[rollout_id]
        alone = self.alone(rollout_id, vocab_size)
        is_finished = rollout.state is RolloutState.FINISHED
        num_output = len(alone) if is_finished else len(rollout.output_ids)
        assert rollout.output_ids == alone[:num_output], f"{rollout_id}: other tokens than alone"
        if is_finished:
            assert rollout.finish_reason is not None
            is_stop = alone[-1] in add.stop_ids
            assert rollout.finish_reason.type == ("stop" if is_stop else "length")
            assert rollout.finish_reason.matched == (alone[-1] if is_stop else None)
            assert rollout.num_cached_tokens >= 0
        ids = rollout.prompt_ids + rollout.output_ids
        if add.sampling.prompt_logprobs is not None:
            expected = [
                fake_logprob(ids[: i + 1]) if i else None for i in range(len(add.prompt_ids))
            ]
            known = len(expected) if is_finished else len(rollout.prompt_lp)
            assert rollout.prompt_lp == expected[:known], f"{rollout_id}: prompt_lp"
        if "routing" in add.sampling.record:
            num_rows = len(ids) - 1 if is_finished else len(rollout.routing_ids) // ROUTING_RECORD
            routing = b"".join(fake_routing(ids[: i + 1]) for i in range(num_rows))
            assert rollout.routing_ids == routing, f"{rollout_id}: routing"
