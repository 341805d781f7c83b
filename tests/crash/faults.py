"""What launcher.py patches into a process: points at which it dies, and bugs that must be found.

    die:POINT:K:LOG   SIGKILL oneself at the K-th passing of POINT; LOG is the kill log
    compact_often     compaction every 0.2 s, so that kills meet it
    bug:NAME          one of BUGS

A process that dies *before* a commit first sleeps a little, as if the disk were slow: whoever
acknowledges or publishes too early has done so by then.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

SLOW_DISK_S = 0.03


class Fuse:
    """Counts passings of one point, and kills this process at the k-th."""

    def __init__(self, point: str, passings: int, log: str, place: str) -> None:
        self._point, self._left, self._log, self._place = point, passings, log, place
        self._lock = threading.Lock()

    def pass_(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            if self._point.startswith("before"):
                time.sleep(SLOW_DISK_S)
            record = {
                "at": time.monotonic_ns(),
                "what": self._place,
                "how": self._point,
                "pid": os.getpid(),
            }
            with open(self._log, "ab", buffering=0) as file:
                file.write(json.dumps(record).encode() + b"\n")
            os.kill(os.getpid(), signal.SIGKILL)


Patch = Callable[[], None]


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


# --- points to die at ------------------------------------------------------------------


def around_commits(point: str, fuse: Fuse) -> None:
    """before_KIND and after_KIND: a transaction that holds an op of this kind, on the journal's
    thread; after: it is durable, and nobody has been told."""
    from everstep.engine.journal.thread import JournalThread

    moment, kind = point.split("_", 1)

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(self: Any, batch: Sequence[Any]) -> Any:
            concerned = any(type(item.op).__name__.lower() == kind for item in batch)
            if concerned and moment == "before":
                fuse.pass_()
            error = inner(self, batch)
            if concerned and moment == "after" and error is None:
                fuse.pass_()
            return error

        return attempt

    wrap(JournalThread, "_try", make)


def passing(owner: Callable[[], Any], name: str, *, is_after: bool) -> Callable[[str, Fuse], None]:
    """Before or after a method."""

    def plant(_: str, fuse: Fuse) -> None:
        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def method(*args: Any, **kwargs: Any) -> Any:
                if not is_after:
                    fuse.pass_()
                result = inner(*args, **kwargs)
                if is_after:
                    fuse.pass_()
                return result

            return method

        wrap(owner(), name, make)

    return plant


def journal() -> Any:
    from everstep.engine.journal.journal import Journal

    return Journal


def draft() -> Any:
    from everstep.engine.journal.draft import Draft

    return Draft


def compaction() -> Any:
    from everstep.engine.journal.merge import Compaction

    return Compaction


def growth() -> Any:
    from everstep.engine.manager.growth import Growth

    return Growth


def collector() -> Any:
    from everstep.engine.manager.collector import Collector

    return Collector


def core() -> Any:
    from everstep.engine.core.core import Core

    return Core


def swap() -> Any:
    from everstep.engine.core.swap import Swap

    return Swap


def stager() -> Any:
    from everstep.engine.model.staging import WeightStager

    return WeightStager


KINDS = ("accept", "append", "end", "ack", "pause", "resume", "flip")
POINTS: dict[str, tuple[str, Callable[[str, Fuse], None]]] = {
    **{f"{m}_{kind}": ("server", around_commits) for m in ("before", "after") for kind in KINDS},
    "mid_transaction": ("server", passing(draft, "apply", is_after=True)),
    "mid_recovery": ("server", passing(growth, "rebuild", is_after=True)),
    "before_resubmission": ("server", passing(collector, "_resubmit", is_after=False)),
    "after_recovery": ("server", passing(collector, "collect", is_after=True)),
    "before_compaction": ("server", passing(journal, "compact", is_after=False)),
    "mid_compaction": ("server", passing(compaction, "work", is_after=True)),
    "after_compaction": ("server", passing(journal, "compact", is_after=True)),
    # the piece of work that comes next is of staging; the weights are exchanged
    "mid_staging": ("core", passing(swap, "_advance", is_after=False)),
    "mid_flip": ("core", passing(stager, "flip", is_after=True)),
    "after_core_flip": ("core", passing(swap, "flip", is_after=True)),
    "before_step": ("core", passing(core, "step", is_after=False)),
    "after_step": ("core", passing(core, "step", is_after=True)),
}


def compact_often() -> None:
    from everstep.engine.journal.thread import JournalThread

    defaults = JournalThread.__init__.__kwdefaults__
    assert defaults is not None
    defaults["compact_every_s"] = 0.2


# --- bugs that must be found -----------------------------------------------------------


def done_early(kinds: Sequence[str]) -> Patch:
    """Whoever waits for a commit of such an op is told that it is durable before it is."""

    def patch() -> None:
        import asyncio

        from everstep.engine.journal.thread import JournalThread

        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def commit(self: Any, op: Any) -> Any:
                future = inner(self, op)
                if type(op).__name__.lower() not in kinds:
                    return future
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
                early = asyncio.get_running_loop().create_future()
                early.set_result(None)
                return early

            return commit

        wrap(JournalThread, "commit", make)

    return patch


def recovering(change: Callable[[Any], None]) -> Patch:
    """Change what a journal brings back."""

    def patch() -> None:
        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def recover(self: Any) -> Any:
                recovered = inner(self)
                change(recovered)
                return recovered

            return recover

        wrap(journal(), "recover", make)

    return patch


def lose_sibling(recovered: Any) -> None:
    groups: dict[str, list[Any]] = {}
    for rollout in recovered.live:
        groups.setdefault(rollout.group_id, []).append(rollout)
    lost = {group[-1].id for group in groups.values() if len(group) > 1}
    recovered.live = [rollout for rollout in recovered.live if rollout.id not in lost]


def reset_counter(recovered: Any) -> None:
    recovered.num_accepted = 0


def forget_keys(recovered: Any) -> None:
    recovered.keys = []


def drop_stamps(recovered: Any) -> None:
    import msgspec

    for rollout in recovered.live:
        rollout.segments = [msgspec.structs.replace(s, digest="") for s in rollout.segments]


def lose_last_token(recovered: Any) -> None:
    for rollout in recovered.live:
        if len(rollout.output_ids) > 1:
            for name in ("output_ids", "lp_sampled", "lp_temp", "kept_mass", "flags", "versions"):
                getattr(rollout, name).pop()
            rollout.segments = [s for s in rollout.segments if s.start < len(rollout.output_ids)]


def forget_acknowledgements() -> None:
    """They are answered and never written."""

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def commit(self: Any, ops: Sequence[Any]) -> None:
            kept = [op for op in ops if type(op).__name__ != "Ack"]
            if kept:
                inner(self, kept)

        return commit

    wrap(journal(), "commit", make)


def compact_too_much() -> None:
    """Compaction also takes what has ended and nobody has read."""

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def compact(self: Any, **kwargs: Any) -> None:
            from everstep.engine.journal.ops import Ack, Query

            ended = [s for s in self.list(Query(limit=10000)) if s.state.is_ended]
            unread = [s.id for s in ended if not s.is_acked]
            if unread:
                self.commit([Ack(unread)])
            inner(self, **kwargs)

        return compact

    wrap(journal(), "compact", make)
    compact_often()


def lose_stop_state() -> None:
    """A rollout that was brought back searches for its stop strings from nothing."""

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def rebuild(self: Any, stop_ids: Any) -> Any:
            reason = inner(self, stop_ids)
            if self._detokenizer is not None:
                self._detokenizer._state = 0
            return reason

        return rebuild

    wrap(growth(), "rebuild", make)


# id of a rollout that this core was given with tokens → how many
_RESUMED: dict[str, int] = {}


def note_resumed() -> None:
    from everstep.engine.core.scheduler import Scheduler

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: Any, add: Any) -> None:
            if add.output_ids:
                _RESUMED[add.rollout_id] = len(add.output_ids)
            inner(self, add)

        return add

    wrap(Scheduler, "add", make)


def next_noise() -> None:
    """A rollout that another core began draws with the counter of the token after."""
    from everstep.engine.model import drawing

    note_resumed()
    drawn: list[Any] = []

    def make_method(inner: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, logits: Any, rows: Any, places: Any) -> Any:
            drawn[:] = rows
            return inner(self, logits, rows, places)

        return method

    def make_function(inner: Callable[..., Any]) -> Callable[..., Any]:
        def draw(logits: Any, rules: Any, *, positions: list[int], **others: Any) -> Any:
            moved = [
                at + (row.rollout_id in _RESUMED) for at, row in zip(positions, drawn, strict=True)
            ]
            return inner(logits, rules, positions=moved, **others)

        return draw

    wrap(drawing.Drawer, "draw", make_method)
    wrap(drawing, "draw", make_function)


def shifted_border() -> None:
    """To penalties, what another core has sampled is prompt."""
    import msgspec

    from everstep.engine.model import drawing

    note_resumed()

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def rule(self: Any, row: Any) -> Any:
            count = _RESUMED.get(row.rollout_id)
            if count is not None:
                row = msgspec.structs.replace(row, num_prompt=row.num_prompt + count)
            return inner(self, row)

        return rule

    wrap(drawing.Drawer, "rule", make)


def stale_prefixes() -> None:
    """A block that is handed out again is still found under what it held before."""
    from everstep.engine.core.block_pool import BlockPool

    def forget(self: Any, block: int) -> None:
        self._contents.pop(block, None)

    BlockPool.forget = forget  # type: ignore[method-assign]


# name → where it lives, how it gets there, what it is
BUGS: dict[str, tuple[str, Patch, str]] = {
    "ack_before_commit": (
        "server",
        done_early(["accept"]),
        "a submission is acknowledged before it is in the journal",
    ),
    "publish_before_commit": (
        "server",
        done_early(["append"]),
        "tokens are shown before they are in the journal",
    ),
    "end_before_commit": (
        "server",
        done_early(["end"]),
        "an ending is shown before it is in the journal",
    ),
    "rng_off_by_one": (
        "core",
        next_noise,
        "a resumed rollout draws the next token's noise",
    ),
    "penalties_shifted": (
        "core",
        shifted_border,
        "after a resume what was sampled counts as prompt",
    ),
    "stop_state_lost": (
        "server",
        lose_stop_state,
        "half a stop string before a restart is forgotten",
    ),
    "stamp_dropped": (
        "server",
        recovering(drop_stamps),
        "recovered tokens do not say which weights made them",
    ),
    "delivered_again": (
        "server",
        forget_acknowledgements,
        "acknowledgements are answered and not written",
    ),
    "sibling_lost": ("server", recovering(lose_sibling), "recovery loses one sample of a group"),
    "counter_reset": (
        "server",
        recovering(reset_counter),
        "derived seeds begin anew after a restart",
    ),
    "key_forgotten": (
        "server",
        recovering(forget_keys),
        "Idempotency-Keys do not survive a restart",
    ),
    "tail_lost": (
        "server",
        recovering(lose_last_token),
        "recovery loses the last journaled token",
    ),
    "unread_compacted": (
        "server",
        compact_too_much,
        "compaction takes what has ended and nobody has read",
    ),
    "stale_prefix": ("core", stale_prefixes, "an evicted block is still found by its old prefix"),
}

PLACES = {name: place for name, (place, _) in POINTS.items()} | {"compact_often": "server"}


def plant(fault: str, place: str) -> None:
    """Patch one fault into this process, if this is its place."""
    kind, _, rest = fault.partition(":")
    if kind == "die":
        point, passings, log = rest.split(":", 2)
        home, install = POINTS[point]
        if home == place:
            install(point, Fuse(point, int(passings), log, place))
    elif kind == "bug":
        home, patch, _ = BUGS[rest]
        if home == place:
            patch()
    elif kind == "compact_often":
        if place == "server":
            compact_often()
    else:
        raise SystemExit(f"no such fault: {fault}")
