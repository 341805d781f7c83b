"""The controller of C3PO++: a pure state machine, events in, commands out (PAPER.md §2.2, §2.3).

    begin()     too old ones are purged, a budget is opened, the pool is filled
    grew(…)     tokens count (mode generated); ended(…): a place is filled, the sample is held
    settled()   the budget is spent: what is cut ages, complete groups go to the trainer
    trained(v)  their tokens are delivered, the books close; the next iteration may begin
    turned(v)   the trainer went back to an earlier version: what was sampled since is older by that

It has no clock, does no I/O and draws nothing, so the same events give the same commands, and
`snapshot` at any moment, `restore` and the events since give the same machine. An event that
contradicts what is known raises and changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

import msgspec

from ...engine.errors import ConfigError, IllegalState, LedgerError
from . import words
from .config import C3poConfig
from .ledger import Books
from .samples import Samples
from .words import Command, Ending, Held, Live, Open, Phase, Sample, Span, Stop, Submit, Train


class C3po:
    """One run. The caller carries out what is returned, in its order, and reports what happens."""

    def __init__(self, config: C3poConfig) -> None:
        """Raises ConfigError, naming the field."""
        self.config = config.check()
        self.phase: Phase = "idle"
        self.iteration = 0
        self.version: int | None = None
        """Of the weights that serve, as `trained` or `turned` said last."""
        self.counted = 0
        """C: what counts against Φ in this iteration."""
        self.last_books: Books | None = None
        """Of the last iteration that closed."""
        self._is_stream_ended = False
        self._turned: int | None = None
        self._samples = Samples(group=config.group, max_reissues=config.max_reissues)

    # what is known ------------------------------------------------------------------------------

    @property
    def pool(self) -> Mapping[Sample, Live]:
        """P, in admission order; behind the first Ω those that stand by in the engine. Whom of
        them the engine started is told by their tokens."""
        return MappingProxyType(self._samples.pool)

    @property
    def num_begun(self) -> int:
        """Samples in the pool of which a token was told."""
        return sum(bool(live.spans) for live in self._samples.pool.values())

    @property
    def hold(self) -> Mapping[str, Mapping[int, Held]]:
        """Prompts under way and what is finished of them."""
        return MappingProxyType(self._samples.hold)

    @property
    def stream(self) -> Sequence[Sample]:
        return [waiting.sample for waiting in self._samples.stream]

    @property
    def num_abandoned(self) -> int:
        """Prompts given up so far."""
        return self._samples.num_abandoned

    @property
    def wants_prompts(self) -> int:
        """How many prompts `extend` should bring, so that the pool can be filled once over."""
        if self._is_stream_ended:
            return 0
        missing = self.config.capacity - len(self._samples.stream)
        return max(0, -(-missing // self.config.group))

    @property
    def books(self) -> Books:
        """The iteration so far."""
        return self._samples.ledger.row(self.iteration)

    @property
    def total(self) -> Books:
        """The run so far."""
        return self._samples.ledger.total(self.iteration)

    def outstanding(self) -> list[Command]:
        """What a driver that was restarted carries out again; every one of them is idempotent."""
        again: list[Command] = [*self._samples.purges]
        if self.phase in ("open", "stopping"):
            again.append(self._open())
        again += [Submit(sample) for sample in self._samples.pool]
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
            case words.Reject(sample, reason):
                return self.reject(sample, reason)
            case words.Settled():
                return self.settled()
            case words.Trained(version):
                return self.trained(version)
            case words.Turned(version):
                return self.turned(version)
        assert_never(event)

    def extend(self, prompts: Iterable[str]) -> list[Command]:
        """More prompts at the tail of the stream. Raises Conflict for one that is under way."""
        if self._is_stream_ended:
            raise IllegalState("the stream has ended: no prompt may follow")
        self._samples.extend(list(prompts))
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
        commands: list[Command] = []
        if self.config.max_lag is not None and self.version is not None:
            commands += self._samples.purge_by_lag(self.version - self.config.max_lag)
        commands += self._samples.purge_by_age(self.config.retention)
        self.counted = 0
        self.phase = "open"
        return [*commands, self._open(), *self._fill()]

    def grew(self, sample: Sample, count: int, version: int) -> list[Command]:
        """`count` more tokens of a sample, at least one, all sampled under `version`.

        Raises IllegalState outside of a budget and for a sample that is not in the pool, and
        LedgerError for a token beyond the budget.
        """
        # as often as there are tokens: the words of an error are made when there is one
        if self.phase not in ("open", "stopping"):
            self._expect(f"tokens of {sample}", "open", "stopping")
        if count < 1:
            raise IllegalState(f"{sample} grew by {count} tokens; accepted: at least 1")
        is_counted = self.config.mode == "generated"
        if is_counted and self.counted + count > self.config.budget:
            raise LedgerError(
                f"iteration {self.iteration}: {sample} brings the tokens to "
                f"{self.counted + count}, beyond the budget of {self.config.budget}"
            )
        span = Span(count, version)
        # of weights that were undone, and told late
        self._samples.grow(sample, span if self._turned is None else span.back(self._turned))
        self.counted += count * is_counted
        return self._stop_if_spent()

    def ended(self, sample: Sample, reason: Ending, length: int) -> list[Command]:
        """A sample has ended with `length` tokens in all, which were told before.

        stop, length: it is held for its group. abort, error: another attempt takes its place at
        the head of the stream. Raises LedgerError if `length` is not what was counted.
        """
        if self._samples.leaving.pop(sample, None) is not None:
            return []
        live = self._samples.live(sample)
        if length != live.length:
            raise LedgerError(
                f"iteration {self.iteration}: {sample} ended with {length} tokens, "
                f"counted are {live.length}"
            )
        if reason in ("abort", "error"):
            return self._samples.fail(sample, is_cancelled=reason == "abort") + self._fill()
        self._expect(f"the end of {sample}", "open", "stopping")
        self._samples.finish(sample)
        if self.config.mode == "completed":
            self.counted += length
        return self._stop_if_spent() or self._fill()

    def lost(self, sample: Sample) -> list[Command]:
        """An engine knows nothing of a sample in the pool, or has lost one that is held.

        The same attempt, so the same seed, is issued again at the head of the stream: were it
        drawn anew, crashes, which meet long rollouts most, would favour short ones. Raises
        IllegalState for a member of a group that the trainer has been given.
        """
        if self._samples.leaving.pop(sample, None) is not None:
            return []
        self._expect_kept(sample)
        return self._samples.lose(sample) + self._fill()

    def reject(self, sample: Sample, reason: str) -> list[Command]:
        """No engine can ever run it: the prompt is abandoned, with nothing tried again.

        Raises IllegalState for a sample whose prompt is not under way, or with the trainer.
        """
        self._expect_kept(sample)
        if sample.prompt not in self._samples.hold:
            raise IllegalState(f"{sample} cannot be rejected: its prompt is not under way")
        return self._samples.abandon(sample, reason) + self._fill()

    def settled(self) -> list[Command]:
        """The budget is spent or closed, and every token and ending under it has been told:
        unfinished rollouts age, complete groups go to the trainer (maybe none)."""
        self._expect("settled", "open", "stopping")
        self._samples.check_books(self.iteration)
        self._samples.age()
        self.phase = "training"
        return [self._train()]

    def trained(self, version: int) -> list[Command]:
        """The trainer has them and weights of `version` serve: the iteration's books close.

        Raises IllegalState for a version below the last one, unless that `turned`.
        """
        self._expect("trained", "training")
        if self.version is not None and version < self.version:
            raise IllegalState(f"version {version} after {self.version}: versions never decrease")
        self._samples.deliver()
        self._samples.check_books(self.iteration)
        self.last_books = self._samples.ledger.close(self.iteration)
        self.version, self._turned = version, None
        self.iteration += 1
        self.phase = "done" if self._is_finished else "idle"
        return [words.Done()] if self._is_finished else []

    def turned(self, version: int) -> list[Command]:
        """The trainer went back to `version`, by name and in a new lineage: its weights serve.

        Iterations that this undid are trained again and not sampled again: nothing is counted
        anew. What was sampled under later weights is so much further from those that serve.
        Raises IllegalState unless it is below the last one.
        """
        if self.version is None or version >= self.version:
            raise IllegalState(f"version {version} after {self.version}: that is not back")
        self.version = self._turned = version
        self._samples.turn(version)
        return []

    # at rest ------------------------------------------------------------------------------------

    def snapshot(self) -> words.C3poState:
        """All of it; shares nothing with the machine."""
        samples = self._samples
        state = words.C3poState(
            config=self.config,
            phase=self.phase,
            iteration=self.iteration,
            version=self.version,
            turned=self._turned,
            counted=self.counted,
            is_stream_ended=self._is_stream_ended,
            num_accepted=samples.num_accepted,
            num_abandoned=samples.num_abandoned,
            stream=list(samples.stream),
            pool=list(samples.pool.values()),
            hold=[(prompt, list(members.values())) for prompt, members in samples.hold.items()],
            complete=samples.complete,
            leaving=[(sample, account.value) for sample, account in samples.leaving.items()],
            purges=samples.purges,
            ledger=samples.ledger.snapshot(),
            last_books=self.last_books,
        )
        return _copied(state)

    @classmethod
    def restore(cls, state: words.C3poState, config: C3poConfig | None = None) -> "C3po":
        """The machine that wrote it, under another config if one is given.

        Raises ConfigError for another format, for another `group` while prompts are under way,
        for another `mode` or `budget` in mid-iteration; LedgerError if it does not balance.
        """
        if state.format != words.STATE_FORMAT:
            raise ConfigError(
                f"format is {state.format}; accepted: {words.STATE_FORMAT} "
                "(the state was written by another Everstep)"
            )
        config = config or state.config
        machine = cls(config)
        _check_change(state, config)
        state = _copied(state)
        machine.phase = state.phase
        machine.iteration = state.iteration
        machine.version, machine._turned = state.version, state.turned
        machine.counted = state.counted
        machine.last_books = state.last_books
        machine._is_stream_ended = state.is_stream_ended
        machine._samples = Samples.restore(
            state, group=config.group, max_reissues=config.max_reissues
        )
        machine._samples.check_books(state.iteration)
        return machine

    # inside -------------------------------------------------------------------------------------

    @property
    def _is_finished(self) -> bool:
        return self._is_stream_ended and not self._samples.hold

    def _open(self) -> Open:
        is_bounded = self.config.mode == "generated"
        return Open(self.iteration, self.config.budget if is_bounded else None)

    def _train(self) -> Train:
        return Train(self.iteration, self._samples.groups())

    def _expect(self, what: str, *phases: Phase) -> None:
        if self.phase not in phases:
            raise IllegalState(
                f"iteration {self.iteration} is {self.phase}: {what} belongs to "
                f"{' or '.join(phases)}"
            )

    def _expect_kept(self, sample: Sample) -> None:
        if self.phase == "training" and sample.prompt in self._samples.complete:
            raise IllegalState(f"{sample} is with the trainer: its group is not to be undone")

    def _fill(self) -> list[Command]:
        """Give free places to the stream; `Stop` if the pool is empty and nothing can come."""
        if self.phase != "open":
            return []
        samples = self._samples
        commands: list[Command] = []
        while samples.stream and self._has_room:
            commands.append(Submit(samples.admit()))
        # what waits behind the admission bound may come in the next iteration
        if not samples.pool and (samples.stream or self._is_stream_ended):
            commands += self._stop()
        return commands

    @property
    def _has_room(self) -> bool:
        config, num_submitted = self.config, len(self._samples.pool)
        if num_submitted >= config.capacity + config.standby:
            return False
        if config.max_staleness is None or config.consumer_batch is None:
            return True
        bound = (config.max_staleness + self.iteration + 1) * config.consumer_batch
        return num_submitted + self._samples.num_accepted < bound

    def _stop_if_spent(self) -> list[Command]:
        is_spent = self.phase == "open" and self.counted >= self.config.budget
        return self._stop() if is_spent else []

    def _stop(self) -> list[Command]:
        self.phase = "stopping"
        return [Stop(self.iteration)]


def _copied(state: words.C3poState) -> words.C3poState:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=words.C3poState)


def _check_change(state: words.C3poState, config: C3poConfig) -> None:
    """Raise ConfigError for what a run that has begun can no longer change."""
    fixed = ["group"] if state.hold else []
    if state.phase in ("open", "stopping"):
        fixed += ["mode", "budget"]
    for name in fixed:
        old, new = getattr(state.config, name), getattr(config, name)
        if old != new:
            raise ConfigError(f"{name} is {new!r}; accepted: {old!r}, with which the run has begun")
