"""A rollout outside the process that grows it: in the journal, in an export file, on the wire.

Per-token columns are little-endian bytes, a tenth of what lists take. `pack` and `unpack` convert;
`seal` and `unseal` add a container that knows when it was cut, altered or written by a newer
version. What is unpacked is not trusted: every length and every number is checked.
"""

import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from .container import ContainerFault, unwrap, wrap
from .errors import InvalidTrajectory
from .rollout import FinishReason, Rollout, RolloutState, SamplingParams, Segment

MAGIC = b"EVST"
FORMAT = 1
_INT32_MAX = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Seconds = Annotated[float, Meta(ge=0.0)]


class Ragged(Struct, array_like=True, forbid_unknown_fields=True):
    """Lists of different lengths, end to end.

    counts  int32, length of each list
    ids     int32, all of them
    values  float32, aligned with ids; empty where the lists hold ids alone
    """

    counts: bytes = b""
    ids: bytes = b""
    values: bytes = b""


_NO_LISTS = Ragged()


class Trajectory(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A `Rollout` by the same names; per-token columns are little-endian bytes.

    int32    prompt_ids, output_ids
    float32  lp_sampled, lp_temp, kept_mass, lp_raw, entropy, prompt_lp (NaN = None)
    uint8    flags
    ragged   kept_ids, top, prompt_top
    versions are run-length: (number, how many tokens)
    """

    id: Name
    group_id: Name
    index: Count = 0
    prompt_ids: bytes
    sampling: SamplingParams
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    max_tokens: Annotated[int, Meta(ge=1, le=_INT32_MAX)]
    priority: Annotated[int, Meta(ge=-(2**53), le=2**53)] = 0
    client: str = ""
    metadata: Any = None
    attempt: Count = 0
    pool: str = ""
    is_durable: bool = False
    forked_from: tuple[Name, Count] | None = None
    state: RolloutState = RolloutState.QUEUED
    finish_reason: FinishReason | None = None

    output_ids: bytes = b""
    lp_sampled: bytes = b""
    lp_temp: bytes = b""
    kept_mass: bytes = b""
    flags: bytes = b""
    versions: list[tuple[Annotated[int, Meta(ge=0, le=2**63 - 1)], Count]] = []

    lp_raw: bytes = b""
    entropy: bytes = b""
    kept_ids: Ragged = msgspec.field(default_factory=Ragged)
    top: Ragged = msgspec.field(default_factory=Ragged)
    prompt_lp: bytes = b""
    prompt_top: Ragged = msgspec.field(default_factory=Ragged)
    routing_ids: bytes = b""
    routing_weights: bytes = b""

    text: str = ""
    text_offset: Count = 0
    segments: list[Segment] = []
    num_cached_tokens: Count = 0
    num_preemptions: Count = 0
    created_s: Seconds = 0.0
    first_token_s: Seconds | None = None
    ended_s: Seconds | None = None

    vocab_size: Count | None = None
    """Of the engine that exported it; an importer compares. `pack` leaves both unset."""
    tokenizer: str | None = None
    """Digest of the exporter's tokenizer."""


_SCALARS = (
    *("id", "group_id", "index", "sampling", "seed", "max_tokens", "priority", "client"),
    *("metadata", "attempt", "pool", "is_durable", "forked_from", "state", "finish_reason"),
    *("text", "text_offset", "num_cached_tokens", "num_preemptions"),
    *("created_s", "first_token_s", "ended_s"),
)
_LOGPROBS = ("lp_sampled", "lp_temp", "kept_mass")
_OPTIONAL_LOGPROBS = ("lp_raw", "entropy")


def pack(rollout: Rollout) -> Trajectory:
    """Its trajectory; columns are copied, scalars and metadata are shared.

    Logprobs are float32, as the engine makes them. Raises InvalidTrajectory where a token id does
    not fit int32, a flag uint8, or metadata is more than JSON can say.
    """
    check_metadata(rollout.metadata)
    floats: dict[str, Any] = {
        n: to_floats(n, getattr(rollout, n)) for n in (*_LOGPROBS, *_OPTIONAL_LOGPROBS)
    }
    return Trajectory(
        **{name: getattr(rollout, name) for name in _SCALARS},
        **floats,
        prompt_ids=to_ints("prompt_ids", rollout.prompt_ids),
        output_ids=to_ints("output_ids", rollout.output_ids),
        flags=to_flags(rollout.flags),
        versions=[(version, len(list(run))) for version, run in groupby(rollout.versions)],
        kept_ids=to_ragged("kept_ids", rollout.kept_ids),
        top=to_ragged_pairs("top", rollout.top),
        prompt_lp=to_floats(
            "prompt_lp", [math.nan if value is None else value for value in rollout.prompt_lp]
        ),
        prompt_top=to_ragged_pairs("prompt_top", rollout.prompt_top),
        routing_ids=bytes(rollout.routing_ids),
        routing_weights=bytes(rollout.routing_weights),
        segments=list(rollout.segments),
    )


def unpack(trajectory: Trajectory) -> Rollout:
    """The rollout; raises InvalidTrajectory naming the field that is wrong.

    Checked: lengths agree, ids are not negative, logprobs are finite, versions follow from the
    segments, an ending has its reason, metadata is JSON.
    """
    t = trajectory
    check_metadata(t.metadata)
    prompt_ids = _ids("prompt_ids", t.prompt_ids)
    output_ids = _ids("output_ids", t.output_ids)
    num, num_prompt = len(output_ids), len(prompt_ids)
    rollout = Rollout(
        **{name: getattr(t, name) for name in _SCALARS},
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        flags=list(t.flags),
        versions=_versions(t, num),
        kept_ids=from_ragged("kept_ids", t.kept_ids),
        top=from_ragged_pairs("top", t.top),
        prompt_lp=_prompt_lp(t.prompt_lp),
        prompt_top=from_ragged_pairs("prompt_top", t.prompt_top),
        routing_ids=bytearray(t.routing_ids),
        routing_weights=bytearray(t.routing_weights),
        segments=list(t.segments),
    )
    for name in (*_LOGPROBS, *_OPTIONAL_LOGPROBS):
        setattr(rollout, name, _finite(name, from_floats(name, getattr(t, name))))
    for name in (*_LOGPROBS, "flags"):
        _check_length(name, len(getattr(rollout, name)), num)
    for name in (*_OPTIONAL_LOGPROBS, "kept_ids", "top"):
        if getattr(rollout, name):
            _check_length(name, len(getattr(rollout, name)), num)
    for name in ("prompt_lp", "prompt_top"):
        if len(getattr(rollout, name)) > num_prompt:
            raise _wrong(name, f"{len(getattr(rollout, name))} values, {num_prompt} prompt tokens")
    _check_scalars(rollout)
    return rollout


def seal(trajectory: Trajectory) -> bytes:
    """The trajectory as msgpack in a container (engine/container.py)."""
    return wrap(MAGIC, FORMAT, encode(trajectory))


def unseal(data: bytes) -> Trajectory:
    """What `seal` made; raises InvalidTrajectory: cut, altered, foreign, or of a newer format.

    Lengths inside are not looked at here: `unpack` does.
    """
    if not data.startswith(MAGIC):
        raise _wrong("file", f"does not begin with {MAGIC.decode()}: no sealed trajectory")
    try:
        return decode(unwrap(data, MAGIC, FORMAT))
    except ContainerFault as fault:
        raise _wrong(fault.field, str(fault)) from None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Trajectory)


def encode(trajectory: Trajectory) -> bytes:
    """As msgpack. Raises InvalidTrajectory for what msgpack cannot say (an integer of 65 bits)."""
    try:
        return _encoder.encode(trajectory)
    except (msgspec.MsgspecError, OverflowError, RecursionError, TypeError) as error:
        raise _wrong("trajectory", f"cannot be written: {error}") from None


def decode(data: bytes | memoryview) -> Trajectory:
    """From msgpack. Raises InvalidTrajectory naming the path of the fault."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        raise _wrong("trajectory", str(error) or type(error).__name__) from None


# --- columns ---------------------------------------------------------------------------


def to_ints(name: str, values: Iterable[int]) -> bytes:
    """int32 bytes; raises InvalidTrajectory naming the column."""
    return _bytes_of(name, "i", values)


def to_floats(name: str, values: Iterable[float]) -> bytes:
    """float32 bytes; raises InvalidTrajectory naming the column."""
    return _bytes_of(name, "f", values)


def to_flags(values: Iterable[int]) -> bytes:
    """uint8 bytes."""
    return _bytes_of("flags", "B", values)


def from_ints(name: str, data: bytes) -> list[int]:
    return _values_of(name, "i", data)


def from_floats(name: str, data: bytes) -> list[float]:
    return _values_of(name, "f", data)


def to_ragged(name: str, lists: Sequence[Sequence[int]]) -> Ragged:
    flat = [item for items in lists for item in items]
    return Ragged(to_ints(name, map(len, lists)), to_ints(name, flat))


def to_ragged_pairs(name: str, lists: Sequence[Sequence[tuple[int, float]]]) -> Ragged:
    flat = [item for items in lists for item in items]
    return Ragged(
        to_ints(name, map(len, lists)),
        to_ints(name, [token for token, _ in flat]),
        to_floats(name, [value for _, value in flat]),
    )


def from_ragged(name: str, ragged: Ragged) -> list[list[int]]:
    if ragged == _NO_LISTS:
        return []
    ids = _ids(name, ragged.ids)
    return [ids[start:end] for start, end in _spans(name, ragged, len(ids))]


def from_ragged_pairs(name: str, ragged: Ragged) -> list[list[tuple[int, float]]]:
    if ragged == _NO_LISTS:
        return []
    ids, values = _ids(name, ragged.ids), from_floats(name, ragged.values)
    _check_length(name, len(values), len(ids))
    # a token outside the support has the logprob −inf; NaN is never one
    if any(map(math.isnan, values)):
        raise _wrong(name, "holds NaN")
    flat = list(zip(ids, values, strict=True))
    return [flat[start:end] for start, end in _spans(name, ragged, len(ids))]


def check_metadata(value: Any) -> None:
    """Raise InvalidTrajectory unless JSON and msgpack can both say it."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                raise _wrong("metadata", "keys of objects must be strings")
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
        elif isinstance(item, int):
            if not -(2**63) <= item < 2**64:
                raise _wrong("metadata", "an integer has more than 64 bits")
        elif not isinstance(item, (str, float, type(None))):
            raise _wrong("metadata", f"{type(item).__name__} is no JSON value")


def _bytes_of(name: str, code: str, values: Iterable[Any]) -> bytes:
    try:
        column = array(code, values)
    except (OverflowError, TypeError, ValueError) as error:
        raise _wrong(name, str(error)) from None
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _values_of(name: str, code: str, data: bytes) -> list[Any]:
    if not data:
        return []
    column = array(code)
    if len(data) % column.itemsize:
        raise _wrong(name, f"{len(data)} bytes are no whole number of {column.itemsize}")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tolist()


def _ids(name: str, data: bytes) -> list[int]:
    ids = from_ints(name, data)
    if ids and min(ids) < 0:
        raise _wrong(name, f"token id {min(ids)} is negative")
    return ids


def _spans(name: str, ragged: Ragged, num: int) -> list[tuple[int, int]]:
    """(start, end) of each list in the flat columns of `num` items."""
    spans, end = [], 0
    for count in from_ints(name, ragged.counts):
        if count < 0:
            raise _wrong(name, f"a list of {count} items")
        spans.append((end, end + count))
        end += count
    if end != num:
        raise _wrong(name, f"counts add up to {end}, there are {num} items")
    return spans


def _finite(name: str, values: list[float]) -> list[float]:
    if not all(map(math.isfinite, values)):
        bad = next(i for i, value in enumerate(values) if not math.isfinite(value))
        raise _wrong(name, f"{values[bad]} at token {bad}")
    return values


def _prompt_lp(data: bytes) -> list[float | None]:
    values = from_floats("prompt_lp", data)
    if values and not math.isnan(values[0]):
        raise _wrong("prompt_lp", "the first token of a prompt has no logprob")
    return [None, *_finite("prompt_lp", values[1:])] if values else []


def _versions(t: Trajectory, num: int) -> list[int]:
    """Per token; the run lengths are added up before anything of their size is made."""
    if (total := sum(count for _, count in t.versions)) != num:
        raise _wrong("versions", f"counts add up to {total}, there are {num} tokens")
    return [version for version, count in t.versions for _ in range(count)]


def _check_length(name: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise _wrong(name, f"{actual} values, expected {expected}")


def _check_scalars(rollout: Rollout) -> None:
    num = len(rollout.output_ids)
    if num > rollout.max_tokens:
        raise _wrong("output_ids", f"{num} tokens, max_tokens is {rollout.max_tokens}")
    if rollout.text_offset != len(rollout.text):
        raise _wrong("text_offset", f"{rollout.text_offset}, text has {len(rollout.text)}")
    if rollout.state.is_ended != (rollout.finish_reason is not None):
        raise _wrong("finish_reason", f"{rollout.finish_reason} in state {rollout.state}")
    times = (rollout.created_s, rollout.first_token_s or 0.0, rollout.ended_s or 0.0)
    if not all(map(math.isfinite, times)):
        raise _wrong("created_s", "times must be finite")
    _check_segments(rollout)


def _check_segments(rollout: Rollout) -> None:
    """They cover every token, in order, and say the versions that the tokens have."""
    num = len(rollout.output_ids)
    starts = [segment.start for segment in rollout.segments]
    if starts != sorted(starts) or (starts and (starts[0] < 0 or starts[-1] > num)):
        raise _wrong("segments", f"starts {starts[:8]} do not divide {num} tokens")
    if num and (not starts or starts[0] != 0):
        raise _wrong("segments", "the first does not begin at token 0")
    for segment, end in zip(rollout.segments, [*starts, num][1:], strict=True):
        if any(version != segment.version for version in rollout.versions[segment.start : end]):
            raise _wrong("versions", f"differ from the segment at token {segment.start}")


def _wrong(field: str, message: str) -> InvalidTrajectory:
    return InvalidTrajectory(f"trajectory: {field}: {message}", field=field)
