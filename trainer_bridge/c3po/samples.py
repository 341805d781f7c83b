"""Where every sample of a C3PO++ run is: stream, pool, hold area. Its tokens go where it goes.

    stream ──admit──▶ pool ──finish──▶ hold ──deliver──▶ the trainer
      ▲                │                │
      └── issue again ─┴────────────────┘    a purge: at the tail; a failure or a loss: at the head

Each movement posts its tokens in the ledger. What may be issued no more takes its group with it.
"""

from collections import deque
from collections.abc import Sequence

from ...engine.errors import Conflict, IllegalState
from .ledger import Account, Ledger
from .words import (
    Abandoned,
    C3poState,
    Command,
    Held,
    Live,
    Purge,
    PurgeReason,
    Sample,
    Span,
    TrainGroup,
    TrainSample,
    Waiting,
    length_of,
    oldest_of,
)


class Samples:
    """The places of one run. A method that raises has changed nothing."""

    def __init__(self, *, group: int, max_reissues: int) -> None:
        self._group = group
        self._max_reissues = max_reissues
        self.stream: deque[Waiting] = deque()
        self.pool: dict[Sample, Live] = {}
        """In admission order."""
        self.hold: dict[str, dict[int, Held]] = {}
        """Every prompt that is neither delivered nor abandoned, its finished members by index."""
        self.complete: list[str] = []
        """Prompts whose group is complete, in order of completion."""
        self.leaving: dict[Sample, Account] = {}
        """Given up in this iteration: their last tokens are counted where they went."""
        self.purges: list[Purge] = []
        """Of this iteration."""
        self.num_accepted = 0
        """Samples that ended well and were not given up later."""
        self.num_abandoned = 0
        self.ledger = Ledger()

    @classmethod
    def restore(cls, state: C3poState, *, group: int, max_reissues: int) -> "Samples":
        """The places in a state, which belongs to them from now on."""
        samples = cls(group=group, max_reissues=max_reissues)
        samples.stream = deque(state.stream)
        samples.pool = {live.sample: live for live in state.pool}
        samples.hold = {
            prompt: {held.sample.index: held for held in members} for prompt, members in state.hold
        }
        samples.complete = state.complete
        samples.leaving = {sample: Account(account) for sample, account in state.leaving}
        samples.purges = state.purges
        samples.num_accepted = state.num_accepted
        samples.num_abandoned = state.num_abandoned
        samples.ledger = Ledger(state.ledger)
        return samples

    def extend(self, prompts: Sequence[str]) -> None:
        """New prompts at the tail. Raises Conflict for one that is under way."""
        seen = {sample.prompt for sample in self.leaving}
        for prompt in prompts:
            if prompt in self.hold or prompt in seen:
                raise Conflict(f"prompt {prompt!r} is under way; a second epoch needs another name")
            seen.add(prompt)
        for prompt in prompts:
            self.hold[prompt] = {}
            self.stream.extend(Waiting(Sample(prompt, i)) for i in range(self._group))

    def admit(self) -> Sample:
        """The head of the stream goes to the end of the pool."""
        waiting = self.stream.popleft()
        self.pool[waiting.sample] = Live(waiting.sample, [], losses=waiting.losses)
        return waiting.sample

    def live(self, sample: Sample) -> Live:
        """Raises IllegalState unless it is in the pool."""
        live = self.pool.get(sample)
        if live is None:
            raise IllegalState(f"{sample} is not in the pool")
        return live

    def grow(self, sample: Sample, span: Span) -> None:
        """Raises IllegalState for a version below that of its last token."""
        if sample in self.leaving:
            self.ledger.post(span.count, Account.SAMPLED, self.leaving[sample])
            return
        live = self.live(sample)
        last = live.spans[-1] if live.spans else None
        if last is not None and span.version < last.version:
            raise IllegalState(
                f"{sample} grew under version {span.version} after {last.version}: "
                "versions never decrease along a rollout, unless a trainer went back"
            )
        self.ledger.post(span.count, Account.SAMPLED, Account.CARRIED)
        live.length += span.count
        if last is not None and (last.version, last.undone) == (span.version, span.undone):
            live.spans[-1] = Span(last.count + span.count, span.version, span.undone)
        else:
            live.spans.append(span)

    def turn(self, version: int) -> None:
        """A trainer went back to `version`."""
        for member in self._members():
            member.spans = [span.back(version) for span in member.spans]

    def finish(self, sample: Sample) -> None:
        """It ended well."""
        live = self.pool.pop(sample)
        members = self.hold[sample.prompt]
        members[sample.index] = Held(sample, live.spans, live.losses)
        if len(members) == self._group:
            self.complete.append(sample.prompt)
        self.ledger.post(live.length, Account.CARRIED, Account.HELD)
        self.num_accepted += 1

    def fail(self, sample: Sample, *, is_cancelled: bool) -> list[Command]:
        """It ended badly: the next attempt goes to the head of the stream."""
        live = self.pool.pop(sample)
        waiting = _next_attempt(live)
        may_issue = self._may_issue(waiting)
        account = Account.REGENERATED if may_issue and not is_cancelled else Account.CANCELLED
        self.ledger.post(live.length, Account.CARRIED, account)
        if may_issue:
            self.stream.appendleft(waiting)
            return []
        what = "was cancelled" if is_cancelled else "failed"
        return self.abandon(sample, f"{what} at attempt {sample.attempt}, the last")

    def lose(self, sample: Sample) -> list[Command]:
        """Its tokens are gone, in the pool or in the hold area: the same attempt goes to the head
        of the stream. Raises IllegalState if it is in neither."""
        member: Live | Held | None = self.hold.get(sample.prompt, {}).get(sample.index)
        if member is not None and member.sample == sample:
            source = Account.HELD
            del self.hold[sample.prompt][sample.index]
            if sample.prompt in self.complete:
                self.complete.remove(sample.prompt)
            self.num_accepted -= 1
        else:
            source, member = Account.CARRIED, self.live(sample)
            del self.pool[sample]
        waiting = Waiting(sample, member.losses + 1)
        if self._may_issue(waiting):
            self.ledger.post(member.length, source, Account.REGENERATED)
            self.stream.appendleft(waiting)
            return []
        self.ledger.post(member.length, source, Account.CANCELLED)
        return self.abandon(sample, f"its tokens were lost, {waiting.losses} times in all")

    def purge_by_age(self, retention: int) -> list[Command]:
        """Those that were cut more often go; their next attempts join the tail."""
        commands: list[Command] = []
        for live in [v for v in self.pool.values() if v.retention > retention]:
            # its group may have been abandoned for a sibling just now
            if live.sample not in self.pool:
                continue
            commands.append(self._purge(live, "age", Account.PURGED))
            waiting = _next_attempt(live)
            if self._may_issue(waiting):
                self.stream.append(waiting)
            else:
                why = f"was purged by age at attempt {live.sample.attempt}, the last"
                commands += self.abandon(live.sample, why)
        return commands

    def purge_by_lag(self, oldest_version: int) -> list[Command]:
        """Groups with an older token are sampled anew, all their members that have tokens."""
        oldest: dict[str, int] = {}
        for member in self._members():
            version = oldest_of(member.spans)
            if version is not None:
                prompt = member.sample.prompt
                oldest[prompt] = min(version, oldest.get(prompt, version))
        commands: list[Command] = []
        for prompt, version in oldest.items():
            if version < oldest_version:
                commands += self._drop_group(prompt)
        return commands

    def abandon(self, sample: Sample, reason: str) -> list[Command]:
        """Its prompt is given up; what the members of the group have is cancelled."""
        prompt = sample.prompt
        commands: list[Command] = [
            self._purge(live, "abandoned", Account.CANCELLED)
            for live in list(self.pool.values())
            if live.sample.prompt == prompt
        ]
        commands += [
            self._purge_held(held, "abandoned", Account.CANCELLED)
            for held in list(self.hold[prompt].values())
        ]
        del self.hold[prompt]
        if prompt in self.complete:
            self.complete.remove(prompt)
        self.stream = deque(waiting for waiting in self.stream if waiting.sample.prompt != prompt)
        self.num_abandoned += 1
        return [*commands, Abandoned(prompt, sample, reason)]

    def age(self) -> None:
        """An iteration has ended: what is unfinished and has tokens was cut once more."""
        self.leaving.clear()
        for live in self.pool.values():
            live.retention += bool(live.spans)

    def groups(self) -> tuple[TrainGroup, ...]:
        """The complete groups, in order of completion."""
        return tuple(self._train_group(prompt) for prompt in self.complete)

    def deliver(self) -> None:
        """The trainer has the complete groups."""
        for prompt in self.complete:
            count = sum(held.length for held in self.hold.pop(prompt).values())
            self.ledger.post(count, Account.HELD, Account.DELIVERED)
        self.complete.clear()
        self.purges.clear()

    def check_books(self, iteration: int) -> None:
        """Raise LedgerError unless the ledger says what is counted here."""
        self.ledger.balance(
            iteration,
            carried=sum(length_of(live.spans) for live in self.pool.values()),
            held=sum(held.length for found in self.hold.values() for held in found.values()),
        )

    def _members(self) -> list[Live | Held]:
        """All that have tokens, or will."""
        held = (one for members in self.hold.values() for one in members.values())
        return [*self.pool.values(), *held]

    def _train_group(self, prompt: str) -> TrainGroup:
        members = sorted(self.hold[prompt].values(), key=lambda held: held.sample.index)
        return TrainGroup(prompt, tuple(TrainSample(m.sample, tuple(m.spans)) for m in members))

    def _may_issue(self, waiting: Waiting) -> bool:
        return waiting.sample.attempt + waiting.losses <= self._max_reissues

    def _drop_group(self, prompt: str) -> list[Command]:
        commands: list[Command] = []
        again: list[Waiting] = []
        for live in [v for v in self.pool.values() if v.sample.prompt == prompt and v.spans]:
            commands.append(self._purge(live, "lag", Account.PURGED))
            again.append(_next_attempt(live))
        for held in list(self.hold[prompt].values()):
            commands.append(self._purge_held(held, "lag", Account.PURGED))
            again.append(_next_attempt(held))
        again.sort(key=lambda waiting: waiting.sample.index)
        for waiting in again:
            if not self._may_issue(waiting):
                last = waiting.sample.attempt - 1
                why = f"was purged by lag at attempt {last}, the last"
                sample = Sample(prompt, waiting.sample.index, last)
                return commands + self.abandon(sample, why)
        self.stream.extend(again)
        return commands

    def _purge(self, live: Live, reason: PurgeReason, account: Account) -> Purge:
        del self.pool[live.sample]
        self.leaving[live.sample] = account
        self.ledger.post(live.length, Account.CARRIED, account)
        self.purges.append(Purge(live.sample, reason))
        return self.purges[-1]

    def _purge_held(self, held: Held, reason: PurgeReason, account: Account) -> Purge:
        del self.hold[held.sample.prompt][held.sample.index]
        self.num_accepted -= 1
        self.ledger.post(held.length, Account.HELD, account)
        self.purges.append(Purge(held.sample, reason))
        return self.purges[-1]


def _next_attempt(member: Live | Held) -> Waiting:
    sample = member.sample
    return Waiting(Sample(sample.prompt, sample.index, sample.attempt + 1), member.losses)
