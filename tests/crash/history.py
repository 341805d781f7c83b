"""What a client wrote down about a run, sorted by what it is about.

History records, one JSON object a line, `at` = when it was written:

    submit   phase invoke | ok | refused | unknown, key, body (invoke), group_id, rollout_ids (ok)
    open     a stream was opened: id, stream      close   it ended: stream
    saw      id, asked (when the question was sent), after, ids, lp, num (tokens in all, of an
             answer that shows all), state
    whole    id, rollout: the answer as it came, written down before it is acknowledged
    ack      phase invoke | ok | unknown, ids
    gone     id, asked: the server does not know it (any more)
    listed   asked, ids: what a list showed as ended and not acknowledged; `is_last` = the run's end
    hello    a client began, perhaps after its predecessor was killed
    done     the client ended by itself

Kill records: at, what (server | core | client | stop | full), how (random | failpoint name), pid.

"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass
class Report:
    """Counts, and what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    worst_logprob: float = 0.0

    def fault(self, invariant: str, text: str) -> None:
        self.faults.append(f"{invariant}: {text}")


@dataclass
class Life:
    """All that the client has seen of one rollout."""

    id: str
    body: Record
    index: int
    group_id: str
    saw: list[Record] = field(default_factory=list)
    wholes: list[Record] = field(default_factory=list)
    ack_asked_at: int | None = None
    acked_at: int | None = None
    streams: list[tuple[int, int]] = field(default_factory=list)

    @property
    def final(self) -> Record | None:
        return self.wholes[0]["rollout"] if self.wholes else None


def read_records(path: Path) -> Iterator[Record]:
    """A last line that was cut by a kill of its writer is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


class History:
    """The records, sorted by what they are about; what can be told wrong on the way is."""

    def __init__(self, records: Iterable[Record], report: Report) -> None:
        self.report = report
        self.lives: dict[str, Life] = {}
        self.bodies: dict[str, Record] = {}
        self.answers: dict[str, list[str]] = {}
        self.unresolved: set[str] = set()
        self.strangers: set[str] = set()
        self.last_list: list[str] | None = None
        self.is_done = False
        self._open: dict[str, tuple[str, int]] = {}
        for record in records:
            self._take(record)
        self._close_all(2**63)

    def _close_all(self, at: int) -> None:
        for rollout_id, opened in self._open.values():
            self.lives[rollout_id].streams.append((opened, at))
        self._open.clear()

    def _take(self, record: Record) -> None:
        match record["kind"]:
            case "submit":
                self._submit(record)
            case "ack":
                self._ack(record)
            case "listed":
                self._listed(record)
            case "hello":
                self._close_all(record["at"])
            case "done":
                self.is_done = True
            case "open" | "close" | "saw" | "whole" | "gone" as kind:
                life = self.lives.get(record["id"])
                if life is None:
                    self.strangers.add(record["id"])
                elif kind == "open":
                    self._open[record["stream"]] = (life.id, record["at"])
                elif kind == "close":
                    life.streams.append((self._open.pop(record["stream"])[1], record["at"]))
                elif kind == "saw":
                    life.saw.append(record)
                elif kind == "whole":
                    self._whole(life, record)
                elif life.ack_asked_at is None:
                    self.report.fault("I1", f"{life.id} was accepted and is not known any more")

    def _submit(self, record: Record) -> None:
        key, counts = record["key"], self.report.counts
        match record["phase"]:
            case "invoke":
                if self.bodies.setdefault(key, record["body"]) != record["body"]:
                    raise SystemExit(f"the client sent two bodies under the key {key}")
                if key not in self.answers:
                    self.unresolved.add(key)
            case "unknown":
                counts["unknown outcomes"] += 1
            case "refused":
                self.unresolved.discard(key)
                counts["refused"] += 1
            case "ok":
                self.unresolved.discard(key)
                self._accepted(key, record)

    def _accepted(self, key: str, record: Record) -> None:
        ids = record["rollout_ids"]
        if key in self.answers:
            self.report.counts["replayed submissions"] += 1
            if self.answers[key] != ids:
                self.report.fault("I1", f"key {key}: {ids} where it was {self.answers[key]}")
            return
        self.answers[key] = ids
        body = self.bodies[key]
        if len(ids) != body["samples"] or len(set(ids)) != len(ids):
            self.report.fault("I8", f"key {key}: {body['samples']} samples asked, got {ids}")
        for index, rollout_id in enumerate(ids):
            if rollout_id in self.lives:
                self.report.fault("I1", f"{rollout_id} was given out for two submissions")
            self.lives[rollout_id] = Life(rollout_id, body, index, record["group_id"])

    def _whole(self, life: Life, record: Record) -> None:
        if life.acked_at is not None and record["asked"] > life.acked_at:
            self.report.fault("I2", f"{life.id} was delivered after it was acknowledged")
        elif life.wholes:
            self.report.counts["redelivered"] += 1
        life.wholes.append(record)

    def _ack(self, record: Record) -> None:
        phase, at = record["phase"], record["at"]
        self.report.counts["unknown acknowledgements"] += phase == "unknown"
        for rollout_id in record["ids"]:
            life = self.lives.get(rollout_id)
            if life is None:
                self.strangers.add(rollout_id)
            elif phase == "invoke":
                life.ack_asked_at = life.ack_asked_at or at
            elif phase == "ok":
                life.acked_at = life.acked_at or at

    def _listed(self, record: Record) -> None:
        for rollout_id in record["ids"]:
            # of a group whose answer was lost a list may tell before its key is resolved
            life = self.lives.get(rollout_id)
            if life and life.acked_at is not None and record["asked"] > life.acked_at:
                self.report.fault("I2", f"{rollout_id} is listed after it was acknowledged")
        if record.get("is_last"):
            self.last_list = record["ids"]
