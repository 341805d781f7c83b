"""What a journal should be, in plain Python: states, operations, invariants.

Nothing of everstep is imported. A model is a value: operations return another one. A journal that
was opened after a crash must look like the model after some prefix of the operations, and how short
that prefix may be is what a durability level promises.

I1   what was accepted is live, ended, or acknowledged
I2   an ending is delivered with the same bytes until it is acknowledged
I3   any two observations of a rollout are prefix-ordered
I5   books balance: numbers, counts of tokens, submissions
I6   an id is there once
I7   a budget has used what its pool grew by while it was open, and no more than it has
I10  no answer from a record that is not what was written
"""

from dataclasses import dataclass, replace

Token = tuple[int, float, float, float, int]
"""id, lp_sampled, lp_temp, kept_mass, flags."""
Origin = tuple[int, str]
"""version, digest."""


@dataclass(frozen=True)
class Rollout:
    number: int
    id: str
    group: str
    index: int
    state: str = "queued"
    tokens: tuple[Token, ...] = ()
    origins: tuple[Origin, ...] = ()
    """One per token."""
    text: str = ""
    is_acked: bool = False

    @property
    def is_live(self) -> bool:
        return self.state in ("queued", "paused")

    @property
    def is_metered(self) -> bool:
        return self.index == 0


@dataclass(frozen=True)
class Budget:
    """Of the one pool that there is: the first samples of all groups."""

    id: str
    tokens: int
    used: int = 0
    state: str = "open"

    @property
    def left(self) -> int:
        return self.tokens - self.used


@dataclass(frozen=True)
class Model:
    """rollouts in order of acceptance; keys: (key, ids) in order; budgets in order of opening."""

    rollouts: tuple[Rollout, ...] = ()
    budgets: tuple[Budget, ...] = ()
    keys: tuple[tuple[str, tuple[str, ...]], ...] = ()
    flips: tuple[Origin, ...] = ()
    is_all_paused: bool = False
    num_accepted: int = 0
    next_number: int = 1

    # --- operations ----------------------------------------------------------------------

    def accept(self, *names: tuple[str, str, int], key: str | None = None) -> "Model":
        """names: (id, group, index)."""
        state = "paused" if self.is_all_paused else "queued"
        new = tuple(
            Rollout(self.next_number + at, *name, state=state) for at, name in enumerate(names)
        )
        keys = self.keys if key is None else (*self.keys, (key, tuple(r.id for r in new)))
        return replace(
            self,
            rollouts=self.rollouts + new,
            keys=keys,
            num_accepted=self.num_accepted + 1,
            next_number=self.next_number + len(new),
        )

    def take_in(self, rollout: Rollout) -> "Model":
        """An import, with the tokens that it has."""
        state = "paused" if self.is_all_paused and rollout.is_live else rollout.state
        new = replace(rollout, number=self.next_number, state=state)
        return replace(
            self,
            rollouts=(*self.rollouts, new),
            num_accepted=self.num_accepted + 1,
            next_number=self.next_number + 1,
        )

    def append(self, name: str, tokens: tuple[Token, ...], origin: Origin) -> "Model":
        rollout = self.find(name)
        budgets, budget = self.budgets, self.open_budget()
        if budget is not None and rollout.is_metered:
            used = budget.used + len(tokens)
            state = "spent" if used == budget.tokens else "open"
            budgets = (*budgets[:-1], replace(budget, used=used, state=state))
        grown = replace(
            rollout,
            tokens=rollout.tokens + tokens,
            origins=rollout.origins + (origin,) * len(tokens),
        )
        return replace(self._with(grown), budgets=budgets)

    def open(self, name: str, tokens: int, key: str) -> "Model":
        return replace(
            self,
            budgets=(*self.budgets, Budget(name, tokens)),
            keys=(*self.keys, (key, (name,))),
        )

    def close(self) -> "Model":
        return replace(
            self, budgets=(*self.budgets[:-1], replace(self.budgets[-1], state="closed"))
        )

    def finish(self, name: str, text: str) -> "Model":
        return self._with(replace(self.find(name), state="finished", text=text))

    def mark(self, state: str, names: tuple[str, ...] | None) -> "Model":
        """Pause (state "paused") or resume ("queued"); names None: all."""
        chosen = tuple(
            replace(r, state=state) if r.is_live and (names is None or r.id in names) else r
            for r in self.rollouts
        )
        is_all_paused = self.is_all_paused if names is not None else state == "paused"
        return replace(self, rollouts=chosen, is_all_paused=is_all_paused)

    def acknowledge(self, name: str) -> "Model":
        return self._with(replace(self.find(name), is_acked=True, tokens=(), origins=(), text=""))

    def flip_to(self, origin: Origin) -> "Model":
        return replace(self, flips=(*self.flips, origin))

    def compact(self) -> "Model":
        """Names of acknowledged ones are kept for no time at all; budgets and keys for long."""
        return replace(self, rollouts=tuple(r for r in self.rollouts if not r.is_acked))

    # --- questions -----------------------------------------------------------------------

    def find(self, name: str) -> Rollout:
        return next(r for r in self.rollouts if r.id == name)

    def open_budget(self) -> Budget | None:
        return self.budgets[-1] if self.budgets and self.budgets[-1].state == "open" else None

    def live(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.is_live]

    def ended(self) -> list[Rollout]:
        return [r for r in self.rollouts if not r.is_live and not r.is_acked]

    def _with(self, rollout: Rollout) -> "Model":
        return replace(
            self, rollouts=tuple(rollout if r.id == rollout.id else r for r in self.rollouts)
        )


def violations(seen: Model, allowed: list[Model], final: Model) -> list[str]:
    """Which invariants the observation breaks; [] if it is one of the allowed states.

    final  the state after all operations, done or not
    """
    # next_number cannot be observed
    if any(replace(seen, next_number=model.next_number) == model for model in allowed):
        return []
    found = []
    by_id = {r.id: r for r in seen.rollouts}
    if len(by_id) < len(seen.rollouts):
        found.append("I6: an id is there twice")
    always = set.intersection(*({r.id for r in model.rollouts} for model in allowed))
    found += [f"I1: {name} was accepted and is gone" for name in sorted(always - set(by_id))]
    for rollout in seen.rollouts:
        last = next((r for r in final.rollouts if r.id == rollout.id), None)
        if last is not None and rollout.is_live and not last.is_acked:
            tokens = list(zip(rollout.tokens, rollout.origins, strict=True))
            if tokens != list(zip(last.tokens, last.origins, strict=True))[: len(tokens)]:
                found.append(f"I3: {rollout.id} has tokens that were never its own")
        for model in allowed:
            same = [r for r in model.rollouts if r.id == rollout.id and r.state == rollout.state]
            if rollout.state == "finished" and same and same[0] != rollout:
                found.append(f"I2: the ending of {rollout.id} is another one")
                break
    if any(
        replace(seen, next_number=model.next_number, budgets=model.budgets) == model
        for model in allowed
    ):
        found.append(f"I7: {seen.budgets}")
    if seen.num_accepted not in {model.num_accepted for model in allowed}:
        found.append(f"I5: {seen.num_accepted} submissions")
    return found or [f"no prefix of what was done: {seen}"]
