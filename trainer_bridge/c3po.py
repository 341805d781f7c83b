"""The controller of C3PO++: a pure state machine, events in, commands out (PAPER.md §2.2, §2.3).

    begin()     too old ones are purged, a budget is opened, the pool is filled
    grew(…)     tokens count (mode generated); ended(…): a place is filled, the sample is held
    settled()   the budget is spent: what is cut ages, complete groups go to the trainer
    trained(v)  their tokens are delivered, the books close; the next iteration may begin

It has no clock, does no I/O and draws nothing, so the same events give the same commands, and
`snapshot` at any moment, `restore` and the events since give the same machine. An event that
contradicts what is known raises and changes nothing.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

import msgspec

from ..engine.errors import ConfigError, Conflict, IllegalState, LedgerError
from . import c3po_words as words
from .c3po_config import C3poConfig
from .c3po_words import (
    Abandoned,
    Command,
    Ending,
    Held,
    Live,
    Open,
    Phase,
    Purge,
    PurgeReason,
    Sample,
    Span,
    Stop,
    Submit,
    Train,
    TrainGroup,
    TrainSample,
    Waiting,
)
from .ledger import Account, Books, Ledger


class C3po:
    """One run. The caller carries out what is returned, in its order, and reports what happens."""

    def __init__(self, config: C3poConfig) -> None:
        """Raises ConfigError, naming the field."""
        self.config = config.check()
        self.phase: Phase = "idle"
        self.iteration = 0
        self.version: int | None = None
        """Of the weights that serve, as `trained` said last."""
        self.counted = 0
        """C: what counts against Φ in this iteration."""
        self.num_abandoned = 0
        self.last_books: Books | None = None
        self._is_stream_ended = False
        self._num_accepted = 0
        self._stream: deque[Waiting] = deque()
        self._pool: dict[Sample, Live] = {}
        # every prompt that is neither delivered nor abandoned, with its finished members by index
        self._hold: dict[str, dict[int, Held]] = {}
        self._complete: list[str] = []
        self._leaving: dict[Sample, Account] = {}
        self._purges: list[Purge] = []
        self._ledger = Ledger()

    # what is known ------------------------------------------------------------------------------

    @property
    def pool(self) -> Mapping[Sample, Live]:
        """P, in admission order."""
        return MappingProxyType(self._pool)

    @property
    def hold(self) -> Mapping[str, Mapping[int, Held]]:
        """Prompts under way and what is finished of them."""
        return MappingProxyType(self._hold)

    @property
    def stream(self) -> Sequence[Sample]:
        return [waiting.sample for waiting in self._stream]

    @property
    def wants_prompts(self) -> int:
        """How many prompts `extend` should bring, so that the pool can be filled once over."""
        if self._is_stream_ended:
            return 0
        return max(0, -(-(self.config.capacity - len(self._stream)) // self.config.group))

    @property
    def books(self) -> Books:
        """The iteration so far."""
        return self._ledger.row(self.iteration)

    @property
    def total(self) -> Books:
        """The run so far."""
        return self._ledger.total(self.iteration)

    def outstanding(self) -> list[Command]:
        """What a driver that was restarted carries out again; every one of them is idempotent."""
        again: list[Command] = [*self._purges]
        if self.phase in ("open", "stopping"):
            again.append(self._open())
        again += [Submit(sample) for sample in self._pool]
        if self.phase == "stopping":
            again.append(Stop(self.iteration))
        elif self.phase == "training":
            again.append(self._train())
        elif self.phase == "done":
            again.append(words.Done())
        return again

    # events -------------------------------------------------------------------------------------

    def apply(self, event: words.Event) -> list[Command]:
        """An event as a value; see the method of its name."""
        match event:
            case words.Extend(prompts):
                return self.extend(prompts)
            case words.EndStream():
                return self.end_stream()
            case words.Begin():
                return self.begin()
            case words.Grew(sample, count, version):
                return self.grew(sample, count, version)
            case words.Ended(sample, reason, length):
                return self.ended(sample, reason, length)
            case words.Lost(sample):
                return self.lost(sample)
            case words.Settled():
                return self.settled()
            case words.Trained(version):
                return self.trained(version)
        assert_never(event)

    def extend(self, prompts: Iterable[str]) -> list[Command]:
        """More prompts at the tail of the stream. Raises Conflict for one that is under way."""
        prompts = list(prompts)
        if self._is_stream_ended:
            raise IllegalState("the stream has ended: no prompt may follow")
        seen = {sample.prompt for sample in self._leaving}
        for prompt in prompts:
            if prompt in self._hold or prompt in seen:
                raise Conflict(f"prompt {prompt!r} is under way; a second epoch needs another name")
            seen.add(prompt)
        for prompt in prompts:
            self._hold[prompt] = {}
            self._stream.extend(Waiting(Sample(prompt, i)) for i in range(self.config.group))
        return self._fill()

    def end_stream(self) -> list[Command]:
        """No prompt will follow. Idempotent."""
        self._is_stream_ended = True
        return self._fill()

    def begin(self) -> list[Command]:
        """The next iteration: purges, then `Open`, then what fills the pool. `Done` if nothing is
        left. Raises IllegalState while one is under way."""
        self._expect("begin", "idle", "done")
        if self._is_finished:
            self.phase = "done"
            return [words.Done()]
        commands = self._purge_by_lag() + self._purge_by_age()
        self.counted = 0
        self.phase = "open"
        return [*commands, self._open(), *self._fill()]

    def grew(self, sample: Sample, count: int, version: int) -> list[Command]:
        """`count` more tokens of a sample, at least one, all sampled under `version`.

        Raises IllegalState outside of a budget and for a sample that is not in the pool, and
        LedgerError for a token beyond the budget.
        """
        self._expect(f"tokens of {sample}", "open", "stopping")
        if count < 1:
            raise IllegalState(f"{sample} grew by {count} tokens; accepted: at least 1")
        is_counted = self.config.mode == "generated"
        if is_counted and self.counted + count > self.config.budget:
            raise LedgerError(
                f"iteration {self.iteration}: {sample} brings the tokens to "
                f"{self.counted + count}, beyond the budget of {self.config.budget}"
            )
        if sample in self._leaving:
            self._ledger.post(count, Account.SAMPLED, self._leaving[sample])
        else:
            self._grow(self._live(sample), count, version)
        self.counted += count * is_counted
        return self._stop_if_spent()

    def ended(self, sample: Sample, reason: Ending, length: int) -> list[Command]:
        """A sample has ended with `length` tokens in all, which were told before.

        stop, length: it is held for its group. abort, error: another attempt takes its place at
        the head of the stream. Raises LedgerError if `length` is not what was counted.
        """
        if self._leaving.pop(sample, None) is not None:
            return []
        live = self._live(sample)
        if length != live.length:
            raise LedgerError(
                f"iteration {self.iteration}: {sample} ended with {length} tokens, "
                f"counted are {live.length}"
            )
        if reason in ("abort", "error"):
            return self._failed(live, reason)
        self._expect(f"the end of {sample}", "open", "stopping")
        del self._pool[sample]
        members = self._hold[sample.prompt]
        members[sample.index] = Held(sample, live.spans, live.losses)
        if len(members) == self.config.group:
            self._complete.append(sample.prompt)
        self._ledger.post(length, Account.CARRIED, Account.HELD)
        self._num_accepted += 1
        if self.config.mode == "completed":
            self.counted += length
        return self._stop_if_spent() or self._fill()

    def lost(self, sample: Sample) -> list[Command]:
        """An engine knows nothing of a sample in the pool, or has lost one that is held.

        The same attempt, so the same seed, is issued again at the head of the stream: were it
        drawn anew, crashes, which meet long rollouts most, would favour short ones. Raises
        IllegalState for a member of a group that the trainer has been given.
        """
        if self._leaving.pop(sample, None) is not None:
            return []
        held = self._hold.get(sample.prompt, {}).get(sample.index)
        if held is not None and held.sample == sample:
            if self.phase == "training" and sample.prompt in self._complete:
                raise IllegalState(f"{sample} cannot be lost: its group is with the trainer")
            del self._hold[sample.prompt][sample.index]
            if sample.prompt in self._complete:
                self._complete.remove(sample.prompt)
            self._num_accepted -= 1
            source, losses, length = Account.HELD, held.losses, held.length
        else:
            live = self._live(sample)
            del self._pool[sample]
            source, losses, length = Account.CARRIED, live.losses, live.length
        waiting = Waiting(sample, losses + 1)
        if self._may_issue(waiting):
            self._ledger.post(length, source, Account.REGENERATED)
            self._stream.appendleft(waiting)
            return self._fill()
        self._ledger.post(length, source, Account.CANCELLED)
        return self._abandon(sample, f"lost {losses + 1} times") + self._fill()

    def settled(self) -> list[Command]:
        """The budget is spent or closed, and every token and ending under it has been told:
        unfinished rollouts age, complete groups go to the trainer (maybe none)."""
        self._expect("settled", "open", "stopping")
        self._check_books()
        self._leaving.clear()
        for live in self._pool.values():
            live.retention += bool(live.spans)
        self.phase = "training"
        return [self._train()]

    def trained(self, version: int) -> list[Command]:
        """The trainer has them and weights of `version` serve: the iteration's books close.

        Raises IllegalState for a version below the last one.
        """
        self._expect("trained", "training")
        if self.version is not None and version < self.version:
            raise IllegalState(f"version {version} after {self.version}: versions never decrease")
        for prompt in self._complete:
            members = self._hold.pop(prompt).values()
            count = sum(held.length for held in members)
            self._ledger.post(count, Account.HELD, Account.DELIVERED)
        self._complete.clear()
        self._purges.clear()
        self._check_books()
        self.last_books = self._ledger.close(self.iteration)
        self.version = version
        self.iteration += 1
        self.phase = "done" if self._is_finished else "idle"
        return [words.Done()] if self._is_finished else []

    # at rest ------------------------------------------------------------------------------------

    def snapshot(self) -> words.C3poState:
        """All of it; shares nothing with the machine."""
        state = words.C3poState(
            config=self.config,
            phase=self.phase,
            iteration=self.iteration,
            version=self.version,
            counted=self.counted,
            is_stream_ended=self._is_stream_ended,
            num_accepted=self._num_accepted,
            num_abandoned=self.num_abandoned,
            stream=list(self._stream),
            pool=list(self._pool.values()),
            hold=[(prompt, list(members.values())) for prompt, members in self._hold.items()],
            complete=self._complete,
            leaving=[(sample, account.value) for sample, account in self._leaving.items()],
            purges=self._purges,
            ledger=self._ledger.snapshot(),
            last_books=self.last_books,
        )
        return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=words.C3poState)

    @classmethod
    def restore(cls, state: words.C3poState, config: C3poConfig | None = None) -> "C3po":
        """The machine that wrote it, under another config if one is given.

        Raises ConfigError for a newer format, another `mode` in mid-iteration, another `group`;
        LedgerError if the state does not balance.
        """
        if state.format != words.STATE_FORMAT:
            raise ConfigError(
                f"state has format {state.format}; accepted: {words.STATE_FORMAT} "
                "(written by another Everstep)"
            )
        _check_change(state, config or state.config)
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=words.C3poState)
        machine = cls(config or state.config)
        machine.phase = state.phase
        machine.iteration = state.iteration
        machine.version = state.version
        machine.counted = state.counted
        machine.num_abandoned = state.num_abandoned
        machine.last_books = state.last_books
        machine._is_stream_ended = state.is_stream_ended
        machine._num_accepted = state.num_accepted
        machine._stream = deque(state.stream)
        machine._pool = {live.sample: live for live in state.pool}
        machine._hold = {
            prompt: {held.sample.index: held for held in members} for prompt, members in state.hold
        }
        machine._complete = state.complete
        machine._leaving = {sample: Account(account) for sample, account in state.leaving}
        machine._purges = state.purges
        machine._ledger = Ledger(state.ledger)
        machine._check_books()
        return machine

    # inside -------------------------------------------------------------------------------------

    @property
    def _is_finished(self) -> bool:
        return self._is_stream_ended and not self._hold

    def _open(self) -> Open:
        is_bounded = self.config.mode == "generated"
        return Open(self.iteration, self.config.budget if is_bounded else None)

    def _train(self) -> Train:
        groups = []
        for prompt in self._complete:
            members = sorted(self._hold[prompt].values(), key=lambda held: held.sample.index)
            groups.append(
                TrainGroup(prompt, tuple(TrainSample(m.sample, tuple(m.spans)) for m in members))
            )
        return Train(self.iteration, tuple(groups))

    def _expect(self, what: str, *phases: Phase) -> None:
        if self.phase not in phases:
            raise IllegalState(
                f"iteration {self.iteration} is {self.phase}: {what} belongs to "
                f"{' or '.join(phases)}"
            )

    def _live(self, sample: Sample) -> Live:
        live = self._pool.get(sample)
        if live is None:
            raise IllegalState(f"{sample} is not in the pool of iteration {self.iteration}")
        return live

    def _grow(self, live: Live, count: int, version: int) -> None:
        spans = live.spans
        if spans and version < spans[-1].version:
            raise IllegalState(
                f"{live.sample} grew under version {version} after {spans[-1].version}: "
                "versions never decrease along a rollout"
            )
        self._ledger.post(count, Account.SAMPLED, Account.CARRIED)
        if spans and version == spans[-1].version:
            spans[-1] = Span(spans[-1].count + count, version)
        else:
            spans.append(Span(count, version))

    def _fill(self) -> list[Command]:
        """Give free places to the stream; `Stop` if the pool is empty and nothing can come."""
        commands: list[Command] = []
        while self.phase == "open" and self._stream and self._has_room:
            waiting = self._stream.popleft()
            self._pool[waiting.sample] = Live(waiting.sample, [], losses=waiting.losses)
            commands.append(Submit(waiting.sample))
        # what waits behind the admission bound may come in the next iteration
        if self.phase == "open" and not self._pool and (self._stream or self._is_stream_ended):
            commands += self._stop()
        return commands

    @property
    def _has_room(self) -> bool:
        config = self.config
        if len(self._pool) >= config.capacity:
            return False
        if config.max_staleness is None or config.consumer_batch is None:
            return True
        bound = (config.max_staleness + self.iteration + 1) * config.consumer_batch
        return len(self._pool) + self._num_accepted < bound

    def _stop_if_spent(self) -> list[Command]:
        is_spent = self.phase == "open" and self.counted >= self.config.budget
        return self._stop() if is_spent else []

    def _stop(self) -> list[Command]:
        self.phase = "stopping"
        return [Stop(self.iteration)]

    def _may_issue(self, waiting: Waiting) -> bool:
        return waiting.sample.attempt + waiting.losses <= self.config.max_reissues

    def _failed(self, live: Live, reason: Ending) -> list[Command]:
        sample = live.sample
        del self._pool[sample]
        waiting = _next_attempt(sample, live.losses)
        is_regenerated = reason == "error" and self._may_issue(waiting)
        account = Account.REGENERATED if is_regenerated else Account.CANCELLED
        self._ledger.post(live.length, Account.CARRIED, account)
        if not self._may_issue(waiting):
            why = "was cancelled" if reason == "abort" else "failed"
            return self._abandon(sample, f"{why}, attempt {sample.attempt}") + self._fill()
        self._stream.appendleft(waiting)
        return self._fill()

    def _purge_by_age(self) -> list[Command]:
        commands: list[Command] = []
        for live in [v for v in self._pool.values() if v.retention > self.config.retention]:
            # its group may have been abandoned for a sibling just now
            if live.sample not in self._pool:
                continue
            commands.append(self._purge(live, "age", Account.PURGED))
            waiting = _next_attempt(live.sample, live.losses)
            if self._may_issue(waiting):
                self._stream.append(waiting)
            else:
                why = f"purged by age, attempt {live.sample.attempt}"
                commands += self._abandon(live.sample, why)
        return commands

    def _purge_by_lag(self) -> list[Command]:
        """Groups whose oldest token is more than `max_lag` versions old are sampled anew."""
        if self.config.max_lag is None or self.version is None:
            return []
        oldest: dict[str, int] = {}
        members: list[Live | Held] = [*self._pool.values()]
        members += (held for found in self._hold.values() for held in found.values())
        for member in members:
            if member.spans:
                prompt, version = member.sample.prompt, member.spans[0].version
                oldest[prompt] = min(version, oldest.get(prompt, version))
        commands: list[Command] = []
        for prompt, version in oldest.items():
            if self.version - version > self.config.max_lag:
                commands += self._drop_group(prompt)
        return commands

    def _drop_group(self, prompt: str) -> list[Command]:
        """Purge the members of the group that have tokens, and issue them again at the tail."""
        commands: list[Command] = []
        waiting: list[Waiting] = []
        for live in [v for v in self._pool.values() if v.sample.prompt == prompt and v.spans]:
            commands.append(self._purge(live, "lag", Account.PURGED))
            waiting.append(_next_attempt(live.sample, live.losses))
        for held in self._hold[prompt].values():
            self._ledger.post(held.length, Account.HELD, Account.PURGED)
            waiting.append(_next_attempt(held.sample, held.losses))
        self._num_accepted -= len(self._hold[prompt])
        self._hold[prompt].clear()
        waiting.sort(key=lambda one: one.sample.index)
        for one in waiting:
            if not self._may_issue(one):
                why = f"purged by lag, attempt {one.sample.attempt - 1}"
                return commands + self._abandon(one.sample, why)
        self._stream.extend(waiting)
        return commands

    def _purge(self, live: Live, reason: PurgeReason, account: Account) -> Purge:
        del self._pool[live.sample]
        self._leaving[live.sample] = account
        self._ledger.post(live.length, Account.CARRIED, account)
        self._purges.append(Purge(live.sample, reason))
        return self._purges[-1]

    def _abandon(self, sample: Sample, reason: str) -> list[Command]:
        """The prompt is given up; what its other members have is cancelled."""
        prompt = sample.prompt
        commands: list[Command] = [
            self._purge(live, "abandoned", Account.CANCELLED)
            for live in list(self._pool.values())
            if live.sample.prompt == prompt
        ]
        for held in self._hold[prompt].values():
            self._ledger.post(held.length, Account.HELD, Account.CANCELLED)
        self._num_accepted -= len(self._hold[prompt])
        del self._hold[prompt]
        self._stream = deque(w for w in self._stream if w.sample.prompt != prompt)
        self.num_abandoned += 1
        return [*commands, Abandoned(prompt, sample, reason)]

    def _check_books(self) -> None:
        self._ledger.balance(
            self.iteration,
            carried=sum(live.length for live in self._pool.values()),
            held=sum(held.length for members in self._hold.values() for held in members.values()),
        )


def _next_attempt(sample: Sample, losses: int) -> Waiting:
    return Waiting(Sample(sample.prompt, sample.index, sample.attempt + 1), losses)


def _check_change(state: words.C3poState, config: C3poConfig) -> None:
    """Raise ConfigError for what a run that has begun can no longer change."""
    config.check()
    fixed = ["group"] if state.hold else []
    if state.phase in ("open", "stopping"):
        fixed += ["mode", "budget"]
    for name in fixed:
        old, new = getattr(state.config, name), getattr(config, name)
        if old != new:
            raise ConfigError(
                f"{name} is {new!r}, but the run has begun with it; accepted: {old!r}"
            )
