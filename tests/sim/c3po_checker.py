"""Keeps the books of a C3PO++ run a second time, from what was told of it. Imports nothing of it.

Φ    tokens of an iteration are the budget's count, never more than it, and all of it unless work
     ran out; over the whole run they are the tokens that the front has
σ    nobody lives on who was cut more often
I5   every token is in one account: those of the controller's ledger, iteration by iteration
I7   versions never go back along a sample
I8   a group is trained once, whole, and every prompt is trained or given up
"""

import copy
from collections import Counter
from typing import Any

ACCOUNTS = ("sampled", "delivered", "purged", "regenerated", "cancelled", "carried", "held")


class Books:
    """Where tokens are, by what was told."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.held: dict[str, int] = {}
        self.cuts: Counter[str] = Counter()
        self.left: dict[str, str] = {}
        """Given up → account of what may still come."""
        self.totals: Counter[str] = Counter()
        self.opening: Counter[str] = Counter()
        self.versions: dict[str, int] = {}
        self.told = self.completed = 0
        """In this iteration: all tokens; whole lengths of those that ended well."""
        self.used = 0
        self.trained: Counter[str] = Counter()
        self.abandoned: set[str] = set()


class C3poChecker:
    """config: budget, mode, retention, group of the run; num_prompts: those that it is given."""

    def __init__(self, config: dict[str, Any], num_prompts: int) -> None:
        self.faults: list[str] = []
        self._config, self._num_prompts = config, num_prompts
        self._now, self._saved = Books(), Books()
        self._lengths: dict[str, int] = {}
        """Rollout of the pool → tokens that the front showed last."""
        self._is_done = False

    def judge(self, events: list[Any]) -> list[str]:
        for event in events:
            if event.who == "c3po":
                handler = getattr(self, f"_on_{event.kind}", None)
                if handler is not None:
                    handler(**event.fields)
        if self._is_done:
            self._judge_end()
        return self.faults

    def _on_saved(self) -> None:
        self._saved = copy.deepcopy(self._now)

    def _on_crash(self, phase: str) -> None:
        """What was told since it saved is forgotten, and will be told again."""
        self._now = copy.deepcopy(self._saved)

    def _on_seen(self, id: str, ids: tuple[int, ...], **fields: Any) -> None:
        self._lengths[id] = len(ids)

    def _on_told(self, sample: str, count: int, version: int) -> None:
        now = self._now
        if version < now.versions.get(sample, 0):
            self.faults.append(f"I7: {sample} grew under version {version} after a newer one")
        now.versions[sample] = version
        now.told += count
        now.totals["sampled"] += count
        if sample in now.left:
            now.totals[now.left[sample]] += count
        else:
            now.live[sample] += count

    def _on_ended(self, sample: str, reason: str, length: int) -> None:
        now = self._now
        if sample in now.left:
            return
        count = now.live.pop(sample, 0)
        if count != length:
            self.faults.append(f"I5: {sample} ended with {length} tokens, told were {count}")
        if reason in ("stop", "length"):
            now.held[sample] = count
            now.completed += length
        else:
            now.totals["cancelled" if reason == "abort" else "regenerated"] += count

    def _on_purges(self, sample: str, reason: str) -> None:
        now = self._now
        account = "cancelled" if reason == "abandoned" else "purged"
        count = now.held.pop(sample) if sample in now.held else now.live.pop(sample, 0)
        now.totals[account] += count
        now.left[sample] = account

    def _on_abandons(self, prompt: str, reason: str) -> None:
        self._now.abandoned.add(prompt)

    def _on_opened(self, iteration: int, id: str, tokens: int) -> None:
        for sample, cuts in self._now.cuts.items():
            if cuts > self._config["retention"] and sample in self._now.live:
                self.faults.append(f"σ: {sample} was cut {cuts} times and lives on")

    def _on_settled(
        self, iteration: int, used: int, tokens: int, state: str, is_short: bool
    ) -> None:
        now, budget = self._now, self._config["budget"]
        where = f"iteration {iteration}"
        if now.told != used:
            self.faults.append(f"Φ: {where}: {now.told} tokens were told, its budget counts {used}")
        counted = used if self._config["mode"] == "generated" else now.completed
        if self._config["mode"] == "generated" and counted > budget:
            self.faults.append(f"Φ: {where}: {counted} tokens, the budget was {budget}")
        if counted < budget and not is_short:
            self.faults.append(f"Φ: {where}: {counted} of {budget} tokens, and work was left")
        if (state == "spent") != (used == tokens):
            self.faults.append(f"Φ: {where}: {used} of {tokens} tokens, and it is {state}")
        now.used += used
        now.told = now.completed = 0
        now.left.clear()
        for sample, count in now.live.items():
            now.cuts[sample] += bool(count)

    def _on_closed(
        self, iteration: int, groups: tuple[Any, ...], books: dict[str, int] | None
    ) -> None:
        now = self._now
        for prompt, samples in groups:
            now.trained[prompt] += 1
            indexes = [int(sample.split(".")[1].split("'")[0]) for sample in samples]
            if indexes != list(range(self._config["group"])):
                self.faults.append(f"I8: group {prompt} was trained as {samples}")
            for sample in samples:
                now.totals["delivered"] += now.held.pop(sample, 0)
        now.totals["carried"] = sum(now.live.values())
        now.totals["held"] = sum(now.held.values())
        own = {name: now.totals[name] - now.opening[name] for name in ACCOUNTS[:5]}
        own |= {name: now.totals[name] for name in ACCOUNTS[5:]}
        if books is None or own != {name: books[name] for name in ACCOUNTS}:
            self.faults.append(
                f"I5: iteration {iteration}: the ledger says {books}, told was {own}"
            )
        now.opening = now.totals.copy()

    def _on_done(self) -> None:
        self._is_done = True

    def _judge_end(self) -> None:
        now = self._now
        for number in range(self._num_prompts):
            times = now.trained[f"p{number}"]
            if times != (f"p{number}" not in now.abandoned):
                self.faults.append(f"I8: p{number} was trained {times} times")
        if sum(self._lengths.values()) != now.used:
            self.faults.append(
                f"Φ: the front has {sum(self._lengths.values())} tokens of the run, "
                f"its budgets count {now.used}"
            )
