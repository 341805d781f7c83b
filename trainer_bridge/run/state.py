"""What a run of C3PO++ knows: the controller, where its samples are, and the file of all that.

Events go in here. What an event changes, in the controller and around it, is one commit (`flush`),
and what has to be done in the world follows from the records: a place without a rollout is to be
submitted, a lease without a budget is to be opened, phase `training` has groups to be written. It
is done behind the commit, so a driver that was killed carries on from the records alone.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...engine.rollout import Rollout, derive_seed
from ...engine.trajectory import encode, pack
from ..c3po import words
from ..c3po.c3po import C3po
from ..c3po.leases import emptiest, left_of, slices
from ..c3po.ledger import Books
from ..c3po.words import Sample
from .file import Changes, RunFile
from .records import ONLY, StoredC3po, StoredHeader
from .words import (
    Fallen,
    Finished,
    Header,
    KeptPrompt,
    Lease,
    OutputMark,
    Over,
    Place,
    Position,
    Spell,
    Tally,
    count,
    key_of,
)


class RunState:
    """One run, at rest in its file at every moment."""

    def __init__(self, file: RunFile, header: Header) -> None:
        """Go on with the run in the file, or begin one.

        Raises ConfigError where the file holds a run of other prompts, seed or sampling, or where
        the controller's settings may not change as they did.
        """
        self.engines: list[str] = []
        """Those that can be reached; the driver's to say."""
        self._file = file
        self._header = StoredHeader(file, header)
        self._controller = StoredC3po(file, header.config)
        self.position = file.read("position", ONLY, Position) or Position()
        self.tally = file.read("tally", ONLY, Tally) or Tally()
        self.output = file.read("output", ONLY, OutputMark) or OutputMark()
        self.prompts = {p.name: p for _, p in file.records("prompt", KeptPrompt)}
        # whoever was admitted first is submitted first, whichever process does it
        order = {sample: number for number, sample in enumerate(self.machine.pool)}
        places = [place for _, place in file.records("place", Place)]
        places.sort(key=lambda place: order.get(place.sample, -1))
        self.places = {place.sample: place for place in places}
        self.leases = {lease.number: lease for _, lease in file.records("lease", Lease)}
        self._finished: dict[str, set[Sample]] = {}
        for _, finished in file.records("finished", Finished):
            self._note_finished(finished.sample)
        self._fallen: dict[str, list[Fallen]] = {}
        for _, fallen in file.records("fallen", Fallen):
            self._fallen.setdefault(fallen.sample.prompt, []).append(fallen)
        self.books = [books for _, books in file.records("books", Books)]
        self.abandoned = dict(file.records("abandoned", str))
        """Prompt → why it will never be delivered."""
        self.bad_lines = dict(file.records("bad", str))
        self._is_over = file.read("over", ONLY, Over) is not None
        file.flush()

    # --- what is known -------------------------------------------------------------------

    @property
    def header(self) -> Header:
        return self._header.value

    @property
    def machine(self) -> C3po:
        """The controller; what it is told goes through here."""
        return self._controller.machine

    @property
    def pool(self) -> str:
        """The name of its pool in every engine."""
        return f"rollout-{self.header.id}"

    @property
    def is_over(self) -> bool:
        """Whether every prompt is done, and nothing of the run was left in an engine."""
        return self._is_over

    @property
    def is_new(self) -> bool:
        """Whether no prompt was taken yet."""
        return self.position == Position()

    def live(self) -> dict[str, int]:
        """Samples at each engine that can be reached."""
        counts = Counter(p.engine for p in self.places.values() if not p.is_leaving)
        return {engine: counts[engine] for engine in self.engines}

    def active_leases(self) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.is_active]

    @property
    def left(self) -> int:
        """Tokens of this iteration's budget that can still be leased."""
        return left_of(self.machine.config.budget, self.leases.values())

    def group_id(self, prompt: str) -> str:
        """Of its rollouts in every engine: names of lines may hold what ids may not."""
        kept = self.prompts[prompt]
        return f"{self.pool}-{kept.epoch}-{kept.line}"

    def seed_of(self, sample: Sample, prompt_id: str) -> int:
        epoch = self.prompts[sample.prompt].epoch
        return derive_seed(self.header.seed, prompt_id, epoch, sample.index, sample.attempt)

    def finished(self, sample: Sample) -> Finished:
        """Raises KeyError where it has not ended well."""
        found = self._file.read("finished", key_of(sample), Finished)
        if found is None:
            raise KeyError(sample)
        return found

    def fallen_of(self, sample: Sample) -> list[Fallen]:
        """Earlier attempts of a sample, in order."""
        known = [f for f in self._fallen.get(sample.prompt, ()) if f.sample.index == sample.index]
        return sorted(known, key=lambda fallen: fallen.sample)

    # --- what happens --------------------------------------------------------------------

    def serve(self, weights: str) -> None:
        """What the engines serve. Raises ConfigError where the run was begun with other weights."""
        self._header.serve(weights)

    def extend(self, prompts: Sequence[KeptPrompt], position: Position) -> None:
        """More prompts of the stream; where `position` is at the end, no more will follow."""
        changes = self._file.changes
        for prompt in prompts:
            self.prompts[prompt.name] = prompt
            changes.put("prompt", prompt.name, prompt)
        self.position = position
        changes.put("position", ONLY, position)
        if prompts:
            names = tuple(prompt.name for prompt in prompts)
            self._apply(words.Extend(names), changes)
        if position.is_at_end:
            self._apply(words.EndStream(), changes)

    def begin(self) -> None:
        """The next iteration."""
        changes = self._file.changes
        self.tally.iteration = self.machine.iteration
        self.tally.grown = {}
        changes.drop_all("lease")
        self.leases.clear()
        self._apply(words.Begin(), changes)
        self._controller.write()

    def submitted(self, found: Sequence[tuple[Place, str]]) -> None:
        """Their engines have them under these ids. One that was lost meanwhile is elsewhere now, and
        has another id there."""
        changes = self._file.changes
        for place, rollout_id in found:
            if self.places.get(place.sample) is place:
                place.rollout_id = rollout_id
                changes.put("place", key_of(place.sample), place)

    def saw(self, rollouts: Sequence[tuple[Sample, Rollout]]) -> None:
        """Rollouts as they are now: what grew, and what has ended."""
        changes = self._file.changes
        for sample, rollout in rollouts:
            place = self.places.get(sample)
            if place is not None and place.rollout_id == rollout.id:
                self._saw(place, rollout, changes)

    def lost(self, rollouts: Sequence[tuple[Sample, str]]) -> None:
        """Their engine knows nothing of these rollouts: they are sampled again. It may be told
        twice, when the sample is placed anew by then."""
        changes = self._file.changes
        for sample, rollout_id in rollouts:
            place = self.places.get(sample)
            if place is not None and place.rollout_id == rollout_id:
                self._lose(sample, changes)

    def leave(self, engine: str) -> tuple[int, int]:
        """An engine stays away: its samples are sampled again, what it holds of the budget is
        lost. Returns the number of samples, and of tokens of which nobody knows whether they were
        sampled.
        """
        samples = [sample for sample, place in self.places.items() if place.engine == engine]
        unknown = 0
        changes = self._file.changes
        self._tell_hidden(engine, samples, changes)
        for lease in [v for v in self.active_leases() if v.engine == engine]:
            unknown += self._lose_lease(lease, changes)
        for sample in samples:
            self._lose(sample, changes)
        changes.put("tally", ONLY, self.tally)
        return len(samples), unknown

    def forget_lease(self, lease: Lease) -> None:
        """Its engine knows nothing of it."""
        if lease.is_active:
            changes = self._file.changes
            self._lose_lease(lease, changes)
            changes.put("tally", ONLY, self.tally)

    def _lose_lease(self, lease: Lease, changes: Changes) -> int:
        """Returns its tokens of which nobody knows whether they were sampled."""
        lease.used, lease.state = -self.unexplained().get(lease.engine, 0), "lost"
        changes.put("lease", lease.number, lease)
        unknown = 0 if lease.tokens is None else lease.tokens - lease.used
        self.tally.lost_budget += unknown
        return unknown

    def _tell_hidden(self, engine: str, samples: Sequence[Sample], changes: Changes) -> None:
        """Tokens that leases say were sampled, of rollouts that cannot be read any more. Whose
        they are nobody knows, and it is all one: all of them are lost."""
        hidden = self.unexplained().get(engine, 0)
        if hidden > 0:
            place = self.places[samples[0]]
            version = place.spells[-1].version if place.spells else self.machine.version or 0
            self._grow(place, version, hidden)
            self._apply(words.Grew(place.sample, hidden, version), changes)

    def _lose(self, sample: Sample, changes: Changes) -> None:
        place = self.places.pop(sample, None)
        if place is None:
            return
        changes.drop("place", key_of(sample))
        if not place.is_leaving:
            self._fall(sample, "lost", place.length, changes)
            self._apply(words.Lost(sample), changes)

    def refused(self, sample: Sample, line: int, message: str) -> None:
        """An engine cannot run it, whatever it is given."""
        changes = self._file.changes
        self._bad_line(line, message, changes)
        place = self.places.get(sample)
        if place is None:
            return
        if not place.is_leaving:
            # its siblings leave with it
            self._apply(words.Reject(sample, "is refused"), changes)
        del self.places[sample]
        changes.drop("place", key_of(sample))

    def bad_line(self, line: int, message: str) -> None:
        changes = self._file.changes
        self._bad_line(line, message, changes)

    def settled(self) -> None:
        """All that happened under the iteration's leases was told, and who was to leave has left."""
        assert not any(place.is_leaving for place in self.places.values())
        changes = self._file.changes
        self._forget_idle(changes)
        self._apply(words.Settled(), changes)

    def trained(self, train: words.Train, version: int, output: OutputMark, wall_s: float) -> None:
        """The groups are in the output, which has this size now."""
        changes = self._file.changes
        for group in train.groups:
            self.tally.num_groups += 1
            self._deliver(group, changes)
        self.tally.wall_s += wall_s
        self.output = output
        changes.put("output", ONLY, output)
        self._apply(words.Trained(version), changes)
        books = self.machine.last_books
        assert books is not None
        self.books.append(books)
        changes.put("books", books.iteration, books)
        self._controller.write()

    def turned(self, version: int) -> None:
        """The trainer went back to this version; engines serve it from now on."""
        changes = self._file.changes
        self._apply(words.Turned(version), changes)

    def over(self) -> None:
        """Nothing of the run is left in an engine."""
        self._is_over = True
        changes = self._file.changes
        changes.put("over", ONLY, Over())

    # --- leases --------------------------------------------------------------------------

    def deal(self) -> None:
        """Lease what is left of the budget to engines that have rollouts and hold no lease."""
        active = {lease.engine for lease in self.active_leases()}
        live = self.live()
        idle = [engine for engine in self.engines if engine not in active]
        dealt: dict[str, int | None]
        if self.machine.config.mode == "completed":
            dealt = {engine: None for engine in idle if live[engine]}
        else:
            dealt = dict(slices(self.left, live, idle))
        if dealt:
            changes = self._file.changes
            for engine, tokens in dealt.items():
                number = len(self.leases)
                iteration = self.machine.iteration
                key = f"{self.pool}/{iteration}/{number}"
                lease = Lease(
                    number=number,
                    iteration=iteration,
                    engine=engine,
                    tokens=tokens,
                    places=self.machine.config.capacity,
                    key=key,
                )
                self.leases[number] = lease
                changes.put("lease", number, lease)

    def move_lease(self, lease: Lease, **changed: object) -> None:
        """Change fields of a lease."""
        for name, value in changed.items():
            setattr(lease, name, value)
        changes = self._file.changes
        changes.put("lease", lease.number, lease)

    def unexplained(self) -> dict[str, int]:
        """Engine → tokens that its leases say were used and nobody has told of, where any are."""
        used: Counter[str] = Counter()
        for lease in self.leases.values():
            used[lease.engine] += lease.used
        found = {e: used[e] - self.tally.grown.get(e, 0) for e in used.keys() | self.tally.grown}
        return {engine: count for engine, count in found.items() if count}

    @property
    def has_news(self) -> bool:
        """Whether there is something to flush."""
        return bool(self._file.changes)

    def flush(self) -> None:
        """Make durable what was told. Nothing that follows from it may be done before."""
        self._file.flush()

    def close(self) -> None:
        """What was told since the last flush is forgotten."""
        self._file.close()

    # --- inside --------------------------------------------------------------------------

    def _apply(self, event: words.Event, changes: Changes) -> None:
        for command in self._controller.apply(event):
            self._obey(command, changes)
        changes.put("tally", ONLY, self.tally)
        self._controller.tidy()

    def _obey(self, command: words.Command, changes: Changes) -> None:
        match command:
            case words.Submit(sample):
                self._place(sample, changes)
            case words.Purge(sample, reason):
                self._purge(sample, reason, changes)
            case words.Abandoned(prompt, sample, reason):
                kept = self.prompts[prompt]
                self.abandoned[prompt] = f"line {kept.line}: {sample} {reason}"
                changes.put("abandoned", prompt, self.abandoned[prompt])
            case words.Open() | words.Stop() | words.Train() | words.Done():
                # what these ask for follows from the phase
                pass

    def _place(self, sample: Sample, changes: Changes) -> None:
        assert self.engines, f"{sample} is admitted, and no engine can be reached"
        siblings = Counter(p.engine for s, p in self.places.items() if s.prompt == sample.prompt)
        losses = self.machine.pool[sample].losses
        place = Place(
            sample=sample,
            engine=emptiest(self.live(), siblings),
            key=f"{self.pool}/{key_of(sample)}/{losses}",
        )
        self.places[sample] = place
        changes.put("place", key_of(sample), place)

    def _purge(self, sample: Sample, reason: str, changes: Changes) -> None:
        place = self.places.get(sample)
        if place is not None:
            place.is_leaving = True
            changes.put("place", key_of(sample), place)
            tokens = place.length
        else:
            tokens = sum(spell.count for spell in self.finished(sample).spells)
            self._finished[sample.prompt].discard(sample)
            changes.drop("finished", key_of(sample))
        self._fall(sample, reason, tokens, changes)

    def _saw(self, place: Place, rollout: Rollout, changes: Changes) -> None:
        sample = place.sample
        for version, number in _runs(rollout.versions[place.length :]):
            self._grow(place, version, number)
            self._apply(words.Grew(sample, number, version), changes)
        if not rollout.state.is_ended:
            changes.put("place", key_of(sample), place)
            return
        del self.places[sample]
        changes.drop("place", key_of(sample))
        reason = rollout.finish_reason
        assert reason is not None
        if not place.is_leaving:
            if reason.type in ("stop", "length"):
                self._keep(place, rollout, reason.type, changes)
            else:
                self._fall(sample, reason.type, place.length, changes)
        self._apply(words.Ended(sample, reason.type, place.length), changes)

    def _grow(self, place: Place, version: int, number: int) -> None:
        iteration, spells = self.machine.iteration, place.spells
        grown = self.tally.grown
        grown[place.engine] = grown.get(place.engine, 0) + number
        if spells and (spells[-1].iteration, spells[-1].version) == (iteration, version):
            number += spells.pop().count
        spells.append(Spell(iteration, version, number))

    def _keep(self, place: Place, rollout: Rollout, reason: str, changes: Changes) -> None:
        sample = place.sample
        finished = Finished(
            sample=sample,
            engine=place.engine,
            spells=place.spells,
            reason=reason,
            data=encode(pack(rollout)),
        )
        self._note_finished(sample)
        changes.put("finished", key_of(sample), finished)

    def _note_finished(self, sample: Sample) -> None:
        self._finished.setdefault(sample.prompt, set()).add(sample)

    def _fall(self, sample: Sample, reason: str, tokens: int, changes: Changes) -> None:
        fallen = Fallen(sample=sample, reason=reason, tokens=tokens)
        self._fallen.setdefault(sample.prompt, []).append(fallen)
        count(self.tally.fallen, reason, tokens)
        changes.put("fallen", f"{key_of(sample)}/{self._num_fallen(sample)}", fallen)

    def _num_fallen(self, sample: Sample) -> int:
        return sum(fallen.sample == sample for fallen in self._fallen.get(sample.prompt, ()))

    def _deliver(self, group: words.TrainGroup, changes: Changes) -> None:
        for member in group.samples:
            self.tally.num_trajectories += 1
            count(self.tally.endings, self.finished(member.sample).reason, member.length)
        self._forget(group.prompt, changes)

    def _forget_idle(self, changes: Changes) -> None:
        """Records of prompts that were given up, once none of their samples is anywhere."""
        placed = {sample.prompt for sample in self.places}
        for prompt in [p for p in self.prompts if p not in self.machine.hold and p not in placed]:
            self._forget(prompt, changes)

    def _forget(self, prompt: str, changes: Changes) -> None:
        """All records of a prompt."""
        self.prompts.pop(prompt, None)
        changes.drop("prompt", prompt)
        for sample in self._finished.pop(prompt, ()):
            changes.drop("finished", key_of(sample))
        numbers: Counter[Sample] = Counter()
        for fallen in self._fallen.pop(prompt, ()):
            numbers[fallen.sample] += 1
            changes.drop("fallen", f"{key_of(fallen.sample)}/{numbers[fallen.sample]}")

    def _bad_line(self, line: int, message: str, changes: Changes) -> None:
        self.bad_lines[line] = message
        changes.put("bad", line, message)


def _runs(versions: Sequence[int]) -> list[tuple[int, int]]:
    """[(version, number of tokens)]."""
    runs: list[tuple[int, int]] = []
    for version in versions:
        if runs and runs[-1][0] == version:
            runs[-1] = (version, runs[-1][1] + 1)
        else:
            runs.append((version, 1))
    return runs


def run_path(output: Path) -> Path:
    """The run file of an output: beside it."""
    return output.with_name(f"{output.name}.run")
