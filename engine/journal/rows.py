"""Rows of the journal's tables: what they hold, as bytes, and their checksums.

Columns that are what they nearly always are (one token per rollout, nothing truncated) are left
empty: a plain token then takes 8 bytes, and 4 more for the number of its rollout.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ..errors import InvalidTrajectory
from ..rollout import SAMPLED, RolloutState
from ..trajectory import (
    Ragged,
    from_floats,
    from_ints,
    from_ragged,
    from_ragged_pairs,
    to_flags,
    to_floats,
    to_ints,
    to_ragged,
    to_ragged_pairs,
)
from .ops import Extra, Grown, RequestKey, Summary

_encode = msgspec.msgpack.Encoder().encode


class DamagedRecord(Exception):
    """A record that is not what was written. args: table, row."""

    def __init__(self, table: str, row: object, detail: str = "its checksum does not fit") -> None:
        super().__init__(f"table {table}, row {row}: {detail}")


def checksum(table: str, *columns: object) -> int:
    """64 signed bits of blake2b over the columns of a row."""
    data = _encode((table, columns))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def verified(table: str, values: Sequence[Any]) -> Sequence[Any]:
    """The values without the sum, which is their last; raises DamagedRecord if it does not fit."""
    *columns, total = values
    if checksum(table, *columns) != total:
        raise DamagedRecord(table, columns[0])
    return columns


class Tally(Struct):
    """How many rows a table has, and the sum of their sums."""

    num: int = 0
    total: int = 0

    def add(self, row_sum: int) -> None:
        self.num += 1
        self.total = _wrap(self.total + row_sum)

    def drop(self, row_sum: int) -> None:
        self.num -= 1
        self.total = _wrap(self.total - row_sum)

    def change(self, old_sum: int, new_sum: int) -> None:
        self.total = _wrap(self.total - old_sum + new_sum)


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


class Books(Struct):
    """The one row that knows what the tables should hold."""

    uid: str = ""
    num_commits: int = 0
    is_all_paused: bool = False
    flip: tuple[int, str] | None = None
    num_accepted: int = 0
    next_rollout: int = 1
    next_row: int = 1
    next_origin: int = 1
    next_key: int = 1
    tables: dict[str, Tally] = msgspec.field(
        default_factory=lambda: {
            name: Tally() for name in ("rollouts", "tokens", "origins", "keys", "budgets", "flips")
        }
    )

    def columns(self) -> tuple[Any, ...]:
        """All but `id`, the sum last."""
        version, digest = self.flip or (None, None)
        columns = (
            self.uid,
            self.num_commits,
            int(self.is_all_paused),
            version,
            digest,
            self.num_accepted,
            self.next_rollout,
            self.next_row,
            self.next_origin,
            self.next_key,
            _encode({name: (tally.num, tally.total) for name, tally in self.tables.items()}),
        )
        return (*columns, checksum("books", *columns))

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Books":
        *columns, total = values
        if checksum("books", *columns) != total:
            raise DamagedRecord("books", 1)
        uid, num_commits, is_all_paused, version, digest, num_accepted, *columns = columns
        rollout, row, origin, key, tables = columns
        tallies = msgspec.msgpack.decode(tables, type=dict[str, tuple[int, int]])
        return cls(
            uid=uid,
            num_commits=num_commits,
            is_all_paused=bool(is_all_paused),
            flip=None if version is None else (version, digest),
            num_accepted=num_accepted,
            next_rollout=rollout,
            next_row=row,
            next_origin=origin,
            next_key=key,
            # a table that a later schema has brought is empty
            tables=cls().tables | {name: Tally(*tally) for name, tally in tallies.items()},
        )

    def next(self) -> "Books":
        """A copy for the next commit."""
        tables = {name: msgspec.structs.replace(tally) for name, tally in self.tables.items()}
        return msgspec.structs.replace(self, tables=tables, num_commits=self.num_commits + 1)


class Entry(Struct):
    """A rollout, but for its trajectory; held in memory for every rollout of the file."""

    number: int
    id: str
    group_id: str
    sample: int
    pool: str
    state: RolloutState
    """A live one is QUEUED or PAUSED."""
    created_s: float
    ended_s: float | None = None
    num_tokens: int = 0
    """In the trajectory."""
    acked_s: float | None = None
    digest: int = 0
    sum: int = 0
    is_stored: bool = False
    num_appended: int = 0
    """Tokens in the table `tokens`. Not stored: counted."""
    has_first_token: bool = False
    """Its first_token_s is known to be written. Not stored."""

    def columns(self) -> tuple[Any, ...]:
        """All stored columns but `sum` and the trajectory."""
        return (
            self.number,
            self.id,
            self.group_id,
            self.sample,
            self.pool,
            str(self.state),
            self.created_s,
            self.ended_s,
            self.num_tokens,
            self.acked_s,
            self.digest,
        )

    def summed(self) -> "Entry":
        """Self, with its sum."""
        self.sum = checksum("rollouts", *self.columns())
        return self

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Entry":
        verified("rollouts", values)
        entry = cls(*values)
        entry.state = RolloutState(entry.state)
        entry.is_stored = True
        return entry

    @property
    def is_live(self) -> bool:
        return not self.state.is_ended

    def summary(self) -> Summary:
        return Summary(
            number=self.number,
            id=self.id,
            group_id=self.group_id,
            index=self.sample,
            pool=self.pool,
            state=self.state,
            created_s=self.created_s,
            ended_s=self.ended_s,
            num_output_tokens=self.num_tokens + self.num_appended,
            is_acked=self.acked_s is not None,
        )


def key_columns(number: int, key: RequestKey, rollout_ids: Sequence[str]) -> tuple[Any, ...]:
    """A row of `keys`, the sum last."""
    columns = (
        *(number, key.holder, key.route, key.key, key.body_digest, key.created_s),
        _encode(list(rollout_ids)),
    )
    return (*columns, checksum("keys", *columns))


def key_of(values: Sequence[Any]) -> tuple[int, RequestKey, list[str]]:
    number, holder, route, key, body_digest, created_s, ids = verified("keys", values)
    rollout_ids = msgspec.msgpack.decode(ids, type=list[str])
    return number, RequestKey(holder, route, key, body_digest, created_s), rollout_ids


class PackedExtra(Struct, array_like=True, omit_defaults=True):
    """`Extra` in columns."""

    lp_raw: bytes = b""
    entropy: bytes = b""
    kept_ids: Ragged = msgspec.field(default_factory=Ragged)
    top: Ragged = msgspec.field(default_factory=Ragged)
    prompt_start: int = 0
    prompt_lp: bytes = b""
    prompt_top: Ragged = msgspec.field(default_factory=Ragged)
    routing_ids: bytes = b""
    routing_weights: bytes = b""

    @classmethod
    def of(cls, extra: Extra) -> "PackedExtra":
        nan = float("nan")
        return cls(
            lp_raw=to_floats("lp_raw", extra.lp_raw),
            entropy=to_floats("entropy", extra.entropy),
            kept_ids=to_ragged("kept_ids", extra.kept_ids),
            top=to_ragged_pairs("top", extra.top),
            prompt_start=extra.prompt_start,
            prompt_lp=to_floats(
                "prompt_lp", [nan if value is None else value for value in extra.prompt_lp]
            ),
            prompt_top=to_ragged_pairs("prompt_top", extra.prompt_top),
            routing_ids=bytes(extra.routing_ids),
            routing_weights=bytes(extra.routing_weights),
        )

    def unpacked(self) -> Extra:
        prompt_lp = from_floats("prompt_lp", self.prompt_lp)
        return Extra(
            lp_raw=from_floats("lp_raw", self.lp_raw),
            entropy=from_floats("entropy", self.entropy),
            kept_ids=from_ragged("kept_ids", self.kept_ids),
            top=from_ragged_pairs("top", self.top),
            prompt_start=self.prompt_start,
            prompt_lp=[None if value != value else value for value in prompt_lp],
            prompt_top=from_ragged_pairs("prompt_top", self.prompt_top),
            routing_ids=self.routing_ids,
            routing_weights=self.routing_weights,
        )


class Rest(Struct, array_like=True, omit_defaults=True):
    """What an entry of a token row has beside plain tokens."""

    first_token_s: float | None = None
    num_cached_tokens: int | None = None
    extra: PackedExtra | None = None


class TokenRow(Struct):
    """New tokens of several rollouts under one origin: one entry each, in order, end to end."""

    row: int
    origin: int
    numbers: list[int] = []
    counts: list[int] = []
    ids: list[int] = []
    lp_sampled: list[float] = []
    lp_temp: list[float] = []
    kept_mass: list[float] = []
    flags: list[int] = []
    rest: dict[int, Rest] = {}
    """Entry → the rest."""

    def add(self, number: int, grown: Grown, rest: Rest | None = None) -> None:
        """One more entry."""
        if rest is not None:
            self.rest[len(self.numbers)] = rest
        self.numbers.append(number)
        self.counts.append(len(grown.ids))
        self.ids += grown.ids
        self.lp_sampled += grown.lp_sampled
        self.lp_temp += grown.lp_temp
        self.kept_mass += grown.kept_mass
        self.flags += grown.flags

    def entries(self) -> Iterator[tuple[int, Grown, Rest | None]]:
        """(number, tokens, rest) of each; rollout_id and start of the tokens are not known here."""
        start = 0
        for at, (number, count) in enumerate(zip(self.numbers, self.counts, strict=True)):
            end = start + count
            grown = Grown(
                rollout_id="",
                start=0,
                ids=self.ids[start:end],
                lp_sampled=self.lp_sampled[start:end],
                lp_temp=self.lp_temp[start:end],
                kept_mass=self.kept_mass[start:end],
                flags=self.flags[start:end],
            )
            yield number, grown, self.rest.get(at)
            start = end

    def columns(self) -> tuple[Any, ...]:
        """The stored row, the sum last. Raises InvalidTrajectory for what does not fit."""
        num = len(self.ids)
        lp_sampled = to_floats("lp_sampled", self.lp_sampled)
        lp_temp = to_floats("lp_temp", self.lp_temp)
        are_single = all(count == 1 for count in self.counts)
        columns = (
            self.row,
            self.origin,
            to_ints("number", self.numbers),
            b"" if are_single else to_ints("count", self.counts),
            to_ints("output_ids", self.ids),
            lp_sampled,
            b"" if lp_temp == lp_sampled else lp_temp,
            b"" if self.kept_mass == [1.0] * num else to_floats("kept_mass", self.kept_mass),
            b"" if self.flags == [SAMPLED] * num else to_flags(self.flags),
            _encode(self.rest) if self.rest else b"",
        )
        return (*columns, checksum("tokens", *columns))

    @classmethod
    def of(cls, values: Sequence[Any]) -> "TokenRow":
        row, origin, *columns = verified("tokens", values)
        numbers, counts, ids, lp_sampled, lp_temp, kept_mass, flags, rest = columns
        num = len(ids) // 4
        found = cls(
            row=row,
            origin=origin,
            numbers=from_ints("number", numbers),
            counts=from_ints("count", counts) if counts else [1] * (len(numbers) // 4),
            ids=from_ints("output_ids", ids),
            lp_sampled=from_floats("lp_sampled", lp_sampled),
            lp_temp=from_floats("lp_temp", lp_temp or lp_sampled),
            kept_mass=from_floats("kept_mass", kept_mass) if kept_mass else [1.0] * num,
            flags=list(flags) if flags else [SAMPLED] * num,
            rest=msgspec.msgpack.decode(rest, type=dict[int, Rest]) if rest else {},
        )
        if sum(found.counts) != num:
            raise DamagedRecord("tokens", row, "its counts do not add up")
        return found


def check_grown(grown: Grown) -> None:
    """Raise InvalidTrajectory unless the lists are aligned."""
    num = len(grown.ids)
    for name in ("lp_sampled", "lp_temp", "kept_mass", "flags"):
        if (actual := len(getattr(grown, name))) != num:
            raise InvalidTrajectory(
                f"rollout {grown.rollout_id}: {actual} values of {name} for {num} tokens",
                field=name,
            )
    if grown.extra is not None:
        for name in ("lp_raw", "entropy", "kept_ids", "top"):
            if (actual := len(getattr(grown.extra, name))) not in (0, num):
                raise InvalidTrajectory(
                    f"rollout {grown.rollout_id}: {actual} values of {name} for {num} tokens",
                    field=name,
                )
