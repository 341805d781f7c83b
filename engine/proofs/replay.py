"""A journaled rollout run again: is every bit of it what this engine computes?

Each segment is generated anew under the weights that made it, behind the tokens recorded before
it, with the recorded seed; ids, logprobs and whatever else was recorded are compared as float32
bits. Segments that were drawn over KV of older weights are drawn in one go with those: the weights
are changed between two tokens, as they were then. Tokens of weights that are not here are given as
they were, and reported.
"""

from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ..backend import Backend
from ..checkpoint.manifest import Version
from ..errors import EngineDied, InvalidTrajectory, WeightsRefused
from ..messages import (
    Add,
    Cancel,
    Died,
    Flip,
    Flipped,
    FromCore,
    KVPolicy,
    Meter,
    Ready,
    Refused,
    Rejected,
    RolloutTokens,
    Stage,
    Staged,
    Tokens,
)
from ..rollout import FinishReason, Rollout, Segment, check_prompt

# whose meter stops a rollout at the token before which the weights changed
_POOL = "replay"
_FLOATS = ("lp_sampled", "lp_temp", "kept_mass", "lp_raw", "entropy")
_OTHERS = ("flags", "kept_ids")


class Span(Struct, frozen=True):
    """Output tokens [start, end); `obstacle` says why they cannot be replayed, None: they can."""

    start: int
    end: int
    segment: Segment
    obstacle: str | None


class Difference(Struct, frozen=True):
    """The first value that is not what was recorded; `token` is the index of an output token."""

    token: int
    field: str
    recorded: Any
    computed: Any


class Outcome(Struct, frozen=True):
    """What came of one span."""

    span: Span
    difference: Difference | None


class Computed(Struct):
    """What the engine made of a span, by the names of `Rollout`."""

    ids: list[int] = []
    columns: dict[str, list[Any]] = {}
    prompt_lp: list[float | None] = []
    prompt_top: list[list[tuple[int, float]]] = []
    routing_start: int = 0
    routing_ids: bytes = b""
    routing_weights: bytes = b""
    finish: FinishReason | None = None


def spans_of(
    rollout: Rollout, versions: Mapping[str, Version], *, to: int | None = None
) -> list[Span]:
    """One per segment that begins before token `to`. versions: those that are here, by digest."""
    num = len(rollout.output_ids) if to is None else min(to, len(rollout.output_ids))
    spans: list[Span] = []
    chain: list[Segment] = []
    for segment, end in _bounds(rollout.segments, num):
        if segment.kv == "computed":
            chain = []
        chain.append(segment)
        missing = next((one for one in chain if one.digest not in versions), None)
        obstacle = None
        if segment.digest not in versions:
            obstacle = f"made by {words(segment)}, which is not here"
        elif missing is not None:
            obstacle = f"drawn over KV of {words(missing)}, which is not here"
        spans.append(Span(segment.start, end, segment, obstacle))
    return spans


def words(segment: Segment) -> str:
    """Its version, for messages."""
    return f"version {segment.version} ({segment.digest[:12]})"


def missing_of(rollout: Rollout, versions: Mapping[str, Version]) -> list[Segment]:
    """One segment of each version that is not here."""
    found = {s.digest: s for s in rollout.segments if s.digest not in versions}
    return list(found.values())


def chains_of(spans: Sequence[Span]) -> list[list[Span]]:
    """What can be replayed, cut where KV was computed from the tokens alone."""
    chains: list[list[Span]] = []
    for span in spans:
        if span.obstacle is not None:
            continue
        if span.segment.kv == "computed":
            chains.append([])
        chains[-1].append(span)
    return chains


def _bounds(segments: Sequence[Segment], num: int) -> Iterable[tuple[Segment, int]]:
    ends = [*(segment.start for segment in segments[1:]), num]
    for segment, end in zip(segments, ends, strict=True):
        if segment.start < min(end, num):
            yield segment, min(end, num)


def check_fits(rollout: Rollout, ready: Ready) -> None:
    """Raise InvalidRequest (InvalidTrajectory) unless this engine can hold such a rollout."""
    check_prompt(rollout.prompt_ids, vocab_size=ready.vocab_size, max_model_len=ready.max_model_len)
    rollout.sampling.check(vocab_size=ready.vocab_size)
    largest = max(rollout.output_ids, default=0)
    if largest >= ready.vocab_size:
        raise InvalidTrajectory(
            f"output_ids: token id {largest} is outside the vocabulary (0..{ready.vocab_size - 1})",
            field="output_ids",
        )
    length = len(rollout.prompt_ids) + len(rollout.output_ids)
    if length > ready.max_model_len:
        raise InvalidTrajectory(
            f"output_ids: {length} tokens with the prompt, the context holds {ready.max_model_len}",
            field="output_ids",
        )


class Replayer:
    """Draws tokens again on a core that has started.

    versions  by digest
    """

    def __init__(
        self,
        backend: Backend,
        ready: Ready,
        versions: Mapping[str, Version],
        eos_ids: Sequence[int],
    ) -> None:
        self._backend = backend
        self._ready = ready
        self._versions = versions
        self._eos_ids = eos_ids
        self._digest = ready.digest
        self._num_drawn = 0
        self._backlog: deque[FromCore] = deque()

    async def replay(self, rollout: Rollout, chain: Sequence[Span]) -> AsyncIterator[Outcome]:
        """Generate the spans of a chain again, one after another, up to the first difference.

        Raises EngineDied; WeightsRefused or CheckpointError for a version that cannot be served.
        """
        first, last = chain[0], chain[-1]
        name = f"replay-{first.start}"
        await self._serve(first.segment, "recompute")
        self._backend.send([self._meter(first), self._add(name, rollout, first.start, last.end)])
        for span in chain:
            if span is not first:
                await self._change(span.segment)
                self._backend.send([self._meter(span)])
            computed = await self._collect(name, span.end - span.start)
            self._num_drawn += len(computed.ids)
            difference = first_difference(rollout, span, computed, self._ready)
            yield Outcome(span, difference)
            if difference is not None:
                break
        self._backend.send([Cancel([name])])

    def _meter(self, span: Span) -> Meter:
        return Meter(_POOL, self._num_drawn + span.end - span.start)

    def _add(self, name: str, rollout: Rollout, start: int, end: int) -> Add:
        stop_ids = rollout.sampling.ending_ids(self._eos_ids)
        return Add(
            rollout_id=name,
            prompt_ids=rollout.prompt_ids,
            output_ids=rollout.output_ids[:start],
            sampling=rollout.sampling,
            seed=rollout.seed,
            max_tokens=end,
            stop_ids=sorted(stop_ids),
            banned_ids=sorted(stop_ids | set(self._eos_ids)),
            pool=_POOL,
        )

    async def _change(self, segment: Segment) -> None:
        """Between two tokens of a rollout, to the weights of a segment that is not `computed`."""
        if segment.kv == "recompute-prompt":
            # also where the weights are these already: others may have served in between
            await self._serve(segment, "recompute-prompt", again=True)
        else:
            await self._serve(segment, "keep")

    async def _serve(self, segment: Segment, kv: KVPolicy, *, again: bool = False) -> None:
        if segment.digest == self._digest and not again:
            return
        version = self._versions[segment.digest]
        self._backend.send([Stage(version.number, version.folder, version.digest, "full")])
        await self._answer(Staged)
        self._backend.send([Flip(version.number, version.digest, kv)])
        await self._answer(Flipped)
        self._digest = segment.digest

    async def _answer(self, kind: type[Staged] | type[Flipped]) -> None:
        while not isinstance(message := await self._next(), kind):
            if isinstance(message, Refused):
                raise WeightsRefused(message.message, tensor=message.tensor, layer=message.layer)

    async def _collect(self, name: str, count: int) -> Computed:
        """So many new tokens of the rollout, or as many as there are before its end."""
        computed = Computed()
        while len(computed.ids) < count and computed.finish is None:
            match await self._next():
                case Tokens() as message:
                    for tokens in message.each():
                        if tokens.rollout_id == name:
                            _take(computed, tokens)
                case Rejected() as message if message.rollout_id == name:
                    raise InvalidTrajectory(f"this engine cannot run it: {message.message}")
        return computed

    async def _next(self) -> FromCore:
        while not self._backlog:
            self._backlog += await self._backend.receive()
        message = self._backlog.popleft()
        if isinstance(message, Died):
            raise EngineDied(message.message)
        return message


def _take(computed: Computed, tokens: RolloutTokens) -> None:
    computed.ids += tokens.ids
    for name in (*_FLOATS, *_OTHERS, "top"):
        computed.columns.setdefault(name, []).extend(getattr(tokens, name))
    skip = len(computed.prompt_lp) - tokens.prompt_start
    computed.prompt_lp += tokens.prompt_lp[skip:]
    computed.prompt_top += tokens.prompt_top[skip:]
    if tokens.routing_ids and not computed.routing_ids:
        computed.routing_start = tokens.routing_start
    computed.routing_ids += tokens.routing_ids
    computed.routing_weights += tokens.routing_weights
    computed.finish = tokens.finish


def first_difference(
    rollout: Rollout, span: Span, computed: Computed, ready: Ready
) -> Difference | None:
    """By token; the id before what is known of it."""
    found = [
        *_column_difference(span, "output_ids", rollout.output_ids, computed.ids),
        *(
            difference
            for name in (*_FLOATS, *_OTHERS, "top")
            for difference in _column_difference(
                span, name, _bits(name, getattr(rollout, name)), _bits(name, computed.columns[name])
            )
        ),
    ]
    if span.start == 0:
        for name in ("prompt_lp", "prompt_top"):
            left = _bits(name, getattr(rollout, name))
            right = _bits(name, getattr(computed, name))
            if left and left != right[: len(left)]:
                at = next(
                    i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]
                )
                found.append(Difference(0, f"{name} of prompt token {at}", left[at], right[at]))
    found += _routing_difference(rollout, span, computed, ready)
    if not found and span.end == len(rollout.output_ids):
        found += _finish_difference(rollout, span, computed)
    return min(found, key=lambda difference: difference.token, default=None)


def _column_difference(
    span: Span, name: str, recorded: Sequence[Any], computed: Sequence[Any]
) -> list[Difference]:
    """The first difference of one column; a column that was not recorded has none."""
    recorded = recorded[span.start : span.end]
    if not recorded:
        return []
    for index, (left, right) in enumerate(zip(recorded, computed, strict=False)):
        if left != right:
            return [Difference(span.start + index, name, left, right)]
    if len(computed) < len(recorded):
        index = len(computed)
        return [Difference(span.start + index, name, recorded[index], "nothing: it ended before")]
    return []


def _bits(name: str, values: Sequence[Any]) -> Sequence[Any]:
    """Rounded to float32, as the journal keeps them."""
    if name in _FLOATS:
        return array("f", values).tolist()
    if name == "prompt_lp":
        return [None if value is None else array("f", [value])[0] for value in values]
    if name in ("top", "prompt_top"):
        return [[(token, array("f", [lp])[0]) for token, lp in pairs] for pairs in values]
    return values


def _routing_difference(
    rollout: Rollout, span: Span, computed: Computed, ready: Ready
) -> list[Difference]:
    """Rows of the span: those whose logits its tokens were drawn from, and the prompt's first."""
    num_prompt = len(rollout.prompt_ids)
    names = ("routing_ids", "routing_weights")
    for name, size in zip(names, ready.routing_widths, strict=True):
        left, right = bytes(getattr(rollout, name)), getattr(computed, name)
        first = 0 if span.start == 0 else num_prompt + span.start - 1
        for row in range(first, num_prompt + span.end - 1 if left else first):
            at = row - computed.routing_start
            if left[row * size : (row + 1) * size] != right[at * size : (at + 1) * size]:
                token = max(0, row + 1 - num_prompt)
                return [Difference(token, name, f"position {row}", "other experts or weights")]
    return []


def _finish_difference(rollout: Rollout, span: Span, computed: Computed) -> list[Difference]:
    """An ending that a core finds by itself comes at the same token again."""
    recorded = rollout.finish_reason
    if recorded is None or recorded.type == "abort" or isinstance(recorded.matched, str):
        return []
    is_stop = recorded.type == "stop" and recorded.matched is not None
    if is_stop and computed.finish != recorded:
        return [Difference(span.end - 1, "finish_reason", recorded, computed.finish)]
    return []


def why(span: Span, ready: Ready) -> str:
    """What is known of the cause, in one sentence."""
    recorded = span.segment.numerics
    if recorded == ready.numerics:
        return (
            "weights, numerics and kernels are those that were recorded, so the bits must be equal: "
            "this is a bug of everstep, and `everstep capsule` packs the file that shows it"
        )
    names = ("device", "library", "kernel level", "dtype", "weight formats")
    pairs = zip(names, recorded.split("/"), ready.numerics.split("/"), strict=False)
    parts = [
        f"{name} {left} was recorded, {right} is here"
        for name, left, right in pairs
        if left != right
    ]
    return (
        f"the numerics differ ({'; '.join(parts) or recorded}): equal bits are promised under equal "
        "ids only"
    )
