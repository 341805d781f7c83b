"""Workloads over a journal and its model at once, and crashes at every change of the disk."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import apsw

from everstep.engine.config import JournalConfig
from everstep.engine.errors import EverstepError, JournalError, JournalFull
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import (
    Accept,
    Ack,
    Append,
    Budget,
    CloseBudget,
    End,
    Flip,
    Grown,
    Op,
    OpenBudget,
    Origin,
    Pause,
    Query,
    RequestKey,
    Resume,
    grow,
)
from everstep.engine.rollout import Rollout
from everstep.engine.trajectory import pack, seal, unpack, unseal
from tests.engine.journal import model as m
from tests.engine.journal.disk import (
    Change,
    Disk,
    DiskVFS,
    Files,
    after_kill,
    after_power_loss,
    vfs,
)
from tests.engine.journal.drawn import end, make_grown, make_rollout

PATH = "journal.db"
POOL = "train"
OPERATIONS = (
    *("accept", "append", "pause", "flip", "finish", "ack", "export", "import", "compact"),
    "budget",
)
LEVELS = ("process", "accepts", "power")
# what a level may lose by power loss: these operations, if nothing else came after them
MAY_BE_LOST = {"process": set(OPERATIONS), "accepts": {"append", "compact"}, "power": set()}
NOW_S = 2_000_000_000.0


def open_journal(disk: Disk, level: str = "accepts") -> Journal:
    config = JournalConfig(durability=level, retain_acked_s=0)
    vfs.disk = disk
    return Journal.open(PATH, config, vfs=DiskVFS.NAME, clock=lambda: NOW_S)


def pool_of(index: int) -> str:
    """The first samples are in a pool, which has budgets."""
    return "" if index else POOL


def origin_of(version: int) -> Origin:
    return Origin(version, f"d{version}", "cpu-f32", "core-1")


def tokens_of(grown: Grown) -> tuple[m.Token, ...]:
    columns = (grown.ids, grown.lp_sampled, grown.lp_temp, grown.kept_mass, grown.flags)
    return tuple(zip(*columns, strict=True))


@dataclass
class Run:
    """A journal and its model, step by step."""

    journal: Journal
    model: m.Model = field(default_factory=m.Model)

    def step(self, name: str) -> None:
        """One operation, chosen so that it is legal; the model moves once the journal has."""
        ops, model = self.plan(name)
        if name == "compact":
            self.journal.compact(is_thorough=True)
        elif name == "export":
            for summary in self.journal.list(Query(limit=10**6)):
                if not summary.is_acked:
                    rollout = self.journal.read(summary.id)
                    assert unpack(unseal(seal(pack(rollout)))) == rollout
        else:
            self.journal.commit(ops)
        self.model = model

    def plan(self, name: str) -> tuple[list[Op], m.Model]:
        """What the operation is here, and the model after it."""
        model = self.model
        version = model.flips[-1][0] if model.flips else 1
        live, ended = model.live(), model.ended()
        match name:
            case "accept":
                group = f"g{model.num_accepted}"
                names = [(f"{group}-{index}", group, index) for index in range(2)]
                rollouts = [
                    make_rollout(i, group_id=g, index=n, pool=pool_of(n)) for i, g, n in names
                ]
                key = RequestKey("", "/rollouts", group, "digest", created_s=NOW_S)
                number = model.num_accepted + 1
                return [Accept(rollouts, key, number)], model.accept(*names, key=group)
            case "append":
                news, origin = [], origin_of(version)
                for r in live:
                    budget = model.open_budget() if r.is_metered else None
                    num = 2 if budget is None else min(2, budget.left)
                    news.append(make_grown(r.id, len(r.tokens), num, salt=version))
                    model = model.append(r.id, tokens_of(news[-1]), (version, origin.digest))
                return [Append(origin, news, NOW_S)], model
            case "pause" if model.is_all_paused or any(r.state == "paused" for r in live):
                return [Resume(None)], model.mark("queued", None)
            case "pause" if len(live) == 1:
                return [Pause(None)], model.mark("paused", None)
            case "pause":
                return [Pause([r.id for r in live[:1]])], model.mark(
                    "paused", tuple(r.id for r in live[:1])
                )
            case "flip":
                flip = (version + 1, f"d{version + 1}")
                return [Flip(*flip)], model.flip_to(flip)
            case "finish":
                if not live:
                    return [], model
                rollout = end(restored(live[0]))
                rollout.text, rollout.text_offset = "done", 4
                return [End(rollout)], model.finish(rollout.id, "done")
            case "ack":
                if not ended:
                    return [Ack([])], model
                return [Ack([ended[0].id])], model.acknowledge(ended[0].id)
            case "import":
                name = f"i{model.num_accepted}"
                grown = make_grown(name, 0, 3, salt=9)
                origin = (version, f"d{version}")
                known = m.Rollout(0, name, "imported", 0, "queued", tokens_of(grown), (origin,) * 3)
                return [Accept([restored(known)])], model.take_in(known)
            case "budget" if (budget := model.open_budget()) is not None:
                return [CloseBudget(budget.id)], model.close()
            case "budget":
                # two appends do not use it up, the third does, with the first of its tokens
                name, tokens = f"b{len(model.budgets)}", 5
                key = RequestKey("", "/rollouts/budget", name, "digest", created_s=NOW_S)
                opened = Budget(id=name, pool=POOL, tokens=tokens, created_s=NOW_S)
                return [OpenBudget(opened, key)], model.open(name, tokens, name)
            case "compact":
                return [], model.compact()
        return [], model


def restored(known: m.Rollout) -> Rollout:
    """The whole rollout that the model speaks of."""
    rollout = make_rollout(
        known.id, group_id=known.group, index=known.index, pool=pool_of(known.index)
    )
    for token, (version, _) in zip(known.tokens, known.origins, strict=True):
        columns = dict(
            zip(
                ("ids", "lp_sampled", "lp_temp", "kept_mass", "flags"),
                ([value] for value in token),
                strict=True,
            )
        )
        grown = Grown(rollout_id=known.id, start=len(rollout.output_ids), **columns)
        grow(rollout, origin_of(version), grown)
    return rollout


def observe(journal: Journal) -> m.Model:
    """The journal as a model: everything that it answers, asked in every way it can be asked."""
    recovered = journal.recover()
    live = {rollout.id: rollout for rollout in recovered.live}
    rollouts = []
    for summary in journal.list(Query(limit=10**6)):
        rollout = journal.read(summary.id)
        seen = m.Rollout(
            summary.number,
            summary.id,
            summary.group_id,
            summary.index,
            str(summary.state),
            is_acked=summary.is_acked,
        )
        assert (rollout is None) == summary.is_acked
        assert summary == journal.summary(summary.id)
        if rollout is not None:
            assert rollout == live.get(summary.id, rollout)
            assert summary.state.is_ended == (summary.id not in live)
            assert summary.num_output_tokens == len(rollout.output_ids)
            assert rollout.prompt_ids == [1, 2, 3]
            seen = m.replace(
                seen,
                tokens=tuple(
                    zip(
                        *(rollout.output_ids, rollout.lp_sampled, rollout.lp_temp),
                        *(rollout.kept_mass, rollout.flags),
                        strict=True,
                    )
                ),
                origins=origins_of(rollout),
                text=rollout.text,
            )
        rollouts.append(seen)
    last = recovered.flips[-1] if recovered.flips else None
    assert recovered.flip == (last and (last.version, last.digest))
    return m.Model(
        tuple(rollouts),
        tuple(m.Budget(b.id, b.tokens, b.used, str(b.state)) for b in recovered.budgets),
        tuple((key.key, tuple(ids)) for key, ids in recovered.keys),
        tuple((flip.version, flip.digest) for flip in recovered.flips),
        recovered.is_all_paused,
        recovered.num_accepted,
    )


def origins_of(rollout: Rollout) -> tuple[m.Origin, ...]:
    starts = [segment.start for segment in rollout.segments]
    ends = [*starts, len(rollout.output_ids)][1:]
    found = []
    for segment, stop in zip(rollout.segments, ends, strict=True):
        found += [(segment.version, segment.digest)] * (stop - segment.start)
    assert [version for version, _ in found] == rollout.versions
    return tuple(found)


@dataclass
class Recorded:
    """A workload that ran to its end: the disk before, every change, the models in between."""

    names: tuple[str, ...]
    level: str
    start: Files
    log: list[Change]
    models: list[m.Model]
    """models[i]: after i operations."""
    borders: list[int]
    """borders[i]: number of changes when operation i began; the last: when all were done."""


_PREFACE = ("accept", "append", "import", "finish", "budget", "append")


def prefaced() -> tuple[Files, m.Model]:
    """A journal that has something of everything, closed."""
    disk = Disk()
    run = Run(open_journal(disk))
    for name in _PREFACE:
        run.step(name)
    run.journal.close()
    return disk.snapshot(), run.model


def record(names: Sequence[str], level: str, start: Files, model: m.Model) -> Recorded:
    """Run the workload; changes of the opening count to the first operation."""
    disk = Disk.of(start)
    run = Run(open_journal(disk, level), model)
    models, borders = [model], [0]
    if not names:
        models, borders = [model, model], [0]
    for name in names:
        run.step(name)
        models.append(run.model)
        borders.append(len(disk.log))
    log = list(disk.log)
    run.journal.close()
    return Recorded(tuple(names), level, start, log, models, borders)


@dataclass
class Tally:
    num_workloads: int = 0
    num_crashes: int = 0
    num_faults: int = 0
    violations: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    """Crashes that leave the same disk, with the same promises, are looked at once."""

    def line(self) -> str:
        return (
            f"{self.num_workloads} workloads, {self.num_crashes} crash points, "
            f"{self.num_faults} faults, {len(self.violations)} violations"
        )


def workloads(lengths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    for length in lengths:
        yield from itertools.product(OPERATIONS, repeat=length)


def crash_everywhere(recorded: Recorded, tally: Tally, *, seed: int, images: int = 2) -> None:
    """Crash at every change of the last operation: the earlier ones are other workloads' last."""
    tally.num_workloads += 1
    last = max(len(recorded.names) - 1, 0)
    for num in range(recorded.borders[last], len(recorded.log) + 1):
        # at its last change the operation may have returned: then it must be there
        is_done = num == len(recorded.log)
        rng = random.Random(f"{seed} {recorded.names} {recorded.level} {num}")
        _check(
            recorded,
            after_kill(recorded.start, recorded.log, num),
            last + is_done,
            f"kill at {num}",
            tally,
        )
        for _ in range(images):
            files = after_power_loss(recorded.start, recorded.log, num, rng)
            _check(recorded, files, _least(recorded, last + is_done), f"power loss at {num}", tally)


def _least(recorded: Recorded, num_done: int) -> int:
    """How many operations must be there after a power loss."""
    may_be_lost = MAY_BE_LOST[recorded.level]
    while num_done and (
        not recorded.names
        or recorded.names[num_done - 1] in may_be_lost
        or recorded.models[num_done - 1] == recorded.models[num_done]
    ):
        num_done -= 1
    return num_done


def _check(recorded: Recorded, files: Files, least: int, where: str, tally: Tally) -> None:
    tally.num_crashes += 1
    allowed = recorded.models[least:]
    key = hash((tuple(sorted(files.items())), tuple(allowed)))
    if key in tally.seen:
        return
    tally.seen.add(key)
    try:
        journal = open_journal(Disk.of(files), recorded.level)
        seen = observe(journal)
        found = m.violations(seen, allowed, recorded.models[-1])
        found += [f"I10: {line}" for line in journal.check()]
        found += _goes_on(journal, seen)
        journal.close()
    except (EverstepError, AssertionError) as error:
        found = [f"{type(error).__name__}: {error}"]
    tally.violations += [
        f"{'+'.join(recorded.names)} ({recorded.level}), {where}: {line}" for line in found
    ]


def _goes_on(journal: Journal, seen: m.Model) -> list[str]:
    """After a crash it must work as if there had been none."""
    run = Run(journal, m.replace(seen, next_number=_next_number(journal)))
    for name in ("accept", "append", "finish"):
        run.step(name)
    return m.violations(observe(journal), [run.model], run.model)


def _next_number(journal: Journal) -> int:
    return journal._memory.books.next_rollout


def fail_everywhere(
    names: Sequence[str],
    level: str,
    start: Files,
    model: m.Model,
    tally: Tally,
    *,
    only: Callable[[int], bool] = lambda number: True,
) -> None:
    """Let every change of the last operation fail once: with EIO, and with a disk that is full.

    A full disk is an error that can be tried again: once there is room, all is as if nothing had
    happened. Any other fault ends the journal; what was acknowledged is there when it is opened.
    """
    recorded = record(names, level, start, model)
    for number in range(recorded.borders[-2], recorded.borders[-1]):
        if only(number):
            _fail_at(recorded, number, is_full=False, tally=tally)
            if recorded.log[number].kind != "sync":
                _fail_at(recorded, number, is_full=True, tally=tally)


def _fail_at(recorded: Recorded, number: int, *, is_full: bool, tally: Tally) -> None:
    tally.num_faults += 1
    where = (
        f"{'+'.join(recorded.names)} ({recorded.level}), {'full' if is_full else 'EIO'} at {number}"
    )
    disk = Disk.of(recorded.start)
    run = Run(open_journal(disk, recorded.level), recorded.models[0])
    for name in recorded.names[:-1]:
        run.step(name)
    disk.faults = {number: apsw.FullError if is_full else apsw.IOError}
    disk.is_lasting = is_full
    before = len(recorded.names) - 1
    try:
        run.step(recorded.names[-1])
        least = before + 1
    except JournalFull:
        least = before
        if not is_full:
            tally.violations.append(f"{where}: EIO was taken for a full disk")
    except JournalError as error:
        least = before
        if is_full:
            tally.violations.append(f"{where}: {error}")
    disk.faults = {}
    if is_full and least == before:
        try:
            run.step(recorded.names[-1])
            least = before + 1
        except JournalError as error:
            tally.violations.append(f"{where}: once there is room: {error}")
    files = disk.snapshot()
    try:
        run.journal.close()
    except JournalError as error:
        tally.violations.append(f"{where}: close: {error}")
    _check(recorded, files, least, where, tally)
