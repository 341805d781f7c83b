"""Keeps the books of a driven run a second time: from its output, and from what the journals of its
engines hold in the end. Imports nothing of what it judges.

Φ    no iteration's budgets were used beyond it, in sum over engines; and all of it was, unless the
     pool was empty or a lost engine had the rest
I1   the run comes to its end; nothing of it is left in an engine
I2   what is delivered is what the engine showed last; each trajectory once, each group in one piece
I5   every token that an engine sampled is delivered, or counted as waste, once
I8   a group is whole; every prompt is delivered, given up or bad
σ    nobody lived on who was cut more often
     iterations come in their order, in the file and along a trajectory; the trainer gets what is
     written, iteration by iteration
"""

from collections import Counter
from itertools import groupby, pairwise
from typing import Any

_METER = "meter"


class DriverChecker:
    """config: budget, mode, retention, group; num_prompts, epochs: of its prompts."""

    def __init__(self, config: dict[str, Any], num_prompts: int, epochs: int) -> None:
        self.faults: list[str] = []
        self._config = config
        self._wanted = {f"p{n}@{e}" for e in range(epochs) for n in range(num_prompts)}
        self._seen: dict[tuple[str, str], dict[str, Any]] = {}
        self._offered: dict[int, dict[str, Any]] = {}
        self._used: Counter[int] = Counter()
        """Iteration → tokens that budgets count."""
        self._sampled: Counter[tuple[str, str]] = Counter()
        """(engine, rollout) → tokens, as its journal has them."""
        self._is_counted = True
        """Whether no journal has forgotten a rollout."""
        self._left: list[str] = []
        self._has_stayed_away = False
        self._done: dict[str, Any] | None = None

    def judge(self, events: list[Any]) -> list[str]:
        for event in events:
            if event.who in ("driver", "trainer", "audit"):
                handler = getattr(self, f"_on_{event.kind}", None)
                if handler is not None:
                    handler(event.fields)
        # that it goes on is a fault that others see
        if self._done is not None:
            self._judge(self._done)
        return self.faults

    def _fault(self, text: str) -> None:
        self.faults.append(text)

    # --- what was noted ------------------------------------------------------------------

    def _on_seen(self, found: dict[str, Any]) -> None:
        if found["finish"] is not None:
            self._seen[found["front"], found["id"]] = found

    def _on_says(self, found: dict[str, Any]) -> None:
        self._has_stayed_away |= " stays away " in found["text"]

    def _on_offered(self, found: dict[str, Any]) -> None:
        if found["group"].startswith("r"):
            self._offered[int(found["group"][1:])] = found["rollouts"]

    def _on_done(self, found: dict[str, Any]) -> None:
        if self._done is not None and self._done != found:
            self._fault("I2: a run that was done is another one now")
        self._done = found

    def _on_journal(self, found: dict[str, Any]) -> None:
        """What the journal of an engine holds of the run in the end."""
        for key, budget in found["budgets"]:
            if key.endswith(f"/{_METER}"):
                if budget["used"]:
                    self._fault(f"Φ: {found['front']}: tokens before the first lease")
            else:
                self._used[int(key.split("/")[1])] += budget["used"]
            if budget["state"] == "open":
                self._left.append(f"{found['front']}: budget {key}")
        for rollout_id, num_tokens, is_ended, is_acked in found["rollouts"]:
            self._sampled[found["front"], rollout_id] = num_tokens
            if not is_ended or not is_acked:
                self._left.append(f"{found['front']}: {rollout_id}")
        self._is_counted &= found["is_whole"]

    # --- what must be so when all is over ------------------------------------------------

    def _judge(self, done: dict[str, Any]) -> None:
        lines = done["lines"]
        self._judge_groups(lines, done)
        for line in lines:
            self._judge_line(line)
        self._judge_trainer(lines)
        self._judge_budgets(done)
        self._judge_books(lines, done)
        left = [one for one in self._left if one.split(":")[0] not in done["away"]]
        if left:
            self._fault(f"I1: of the run is left: {left}")

    def _judge_groups(self, lines: list[dict[str, Any]], done: dict[str, Any]) -> None:
        group = self._config["group"]
        names = []
        for at in range(0, len(lines), group):
            piece = lines[at : at + group]
            found = {f"{line['prompt_id']}@{line['epoch']}" for line in piece}
            if [line["index"] for line in piece] != list(range(group)) or len(found) != 1:
                self._fault(f"I8: lines {at}–{at + group - 1} are no group: {sorted(found)}")
            names += sorted(found)
        bad = {f"p{line - 1}" for line in done["bad_lines"]}
        missing = {name for name in self._wanted if name.split("@")[0] not in bad}
        missing -= {*names, *done["abandoned"]}
        if missing:
            self._fault(f"I8: never delivered: {sorted(missing)}")
        for name, times in Counter([*names, *done["abandoned"]]).items():
            if times > 1 or name not in self._wanted:
                self._fault(f"I2: {name} was delivered or given up {times} times")
        iterations = [line["iteration"] for line in lines]
        if iterations != sorted(iterations):
            self._fault(f"I2: iterations in the output: {iterations}")

    def _judge_line(self, line: dict[str, Any]) -> None:
        where = f"{line['rollout_id']} at {line['engine']}"
        seen = self._seen.get((line["engine"], line["rollout_id"]))
        versions = [version for version, count in line["versions"] for _ in range(count)]
        own = (tuple(line["output_ids"]), tuple(line["lp_sampled"]), tuple(versions))
        if seen is None:
            self._fault(f"I2: {where} was delivered and never seen to its end")
        elif own != (seen["ids"], seen["lps"], seen["versions"]):
            self._fault(f"I2: {where}: {own} was delivered, {seen} was seen")
        told = [version for _, version, count in line["iterations"] for _ in range(count)]
        if told != versions:
            self._fault(f"I5: {where}: by iteration {line['iterations']}, versions {versions}")
        spells = [iteration for iteration, _, _ in line["iterations"]]
        if spells != sorted(spells) or (spells and spells[-1] > line["iteration"]):
            self._fault(f"I5: {where}: iterations {spells}, delivered in {line['iteration']}")
        if spells and spells[-1] - spells[0] > self._config["retention"]:
            self._fault(f"σ: {where} was carried over {spells[-1] - spells[0]} iterations")

    def _judge_trainer(self, lines: list[dict[str, Any]]) -> None:
        """It was given what is in the file, in that order."""
        if not self._offered:
            return
        numbers = list(self._offered)
        if numbers != list(range(len(numbers))):
            self._fault(f"I2: the trainer was given iterations {numbers}")
        written = {
            iteration: [line["rollout_id"] for line in found]
            for iteration, found in groupby(lines, key=lambda line: line["iteration"])
        }
        for iteration, rollouts in self._offered.items():
            if list(rollouts) != written.get(iteration, []):
                self._fault(
                    f"I2: iteration {iteration}: {list(rollouts)} was trained, "
                    f"{written.get(iteration)} was written"
                )

    def _judge_budgets(self, done: dict[str, Any]) -> None:
        if self._config["mode"] != "generated":
            return
        budget, short = self._config["budget"], 0
        for books in done["books"]:
            iteration, used = books["iteration"], self._used[books["iteration"]]
            if used > budget:
                self._fault(f"Φ: iteration {iteration}: {used} tokens, the budget was {budget}")
            if books["sampled"] > used:
                self._fault(
                    f"Φ: iteration {iteration}: {books['sampled']} tokens were told, budgets "
                    f"count {used}"
                )
            # who is alone in the pool and has no token yet is in no account
            if books["carried"]:
                short += budget - books["sampled"]
        if short > done["tally"]["lost_budget"]:
            self._fault(
                f"Φ: {short} tokens less than the budgets, of {done['tally']['lost_budget']} is "
                "known that they are lost"
            )

    def _judge_books(self, lines: list[dict[str, Any]], done: dict[str, Any]) -> None:
        total, fallen = done["total"], done["tally"]["fallen"]
        delivered = sum(len(line["output_ids"]) for line in lines)
        if total["delivered"] != delivered:
            self._fault(f"I5: {delivered} tokens are written, the ledger says {total}")
        if total["carried"] or total["held"]:
            self._fault(f"I5: nothing is under way, the ledger says {total}")
        for before, after in pairwise(done["books"]):
            ends, begins = (
                (before["carried"], before["held"]),
                (after["opening_carried"], after["opening_held"]),
            )
            if ends != begins:
                self._fault(f"I5: books end with {ends}, the next begin with {begins}")
        used = sum(self._used.values())
        is_lost = self._has_stayed_away or done["tally"]["lost_budget"]
        if total["sampled"] > used or (total["sampled"] != used and not is_lost):
            self._fault(f"Φ: {used} tokens in budgets, the ledger says {total}")
        if not is_lost and "lost" in fallen:
            self._fault(f"I1: no engine stayed away, and attempts were lost: {fallen}")
        if not self._is_counted:
            return
        if sum(self._sampled.values()) != used:
            self._fault(f"Φ: {used} tokens in budgets, {sum(self._sampled.values())} in rollouts")
        kept = sum(self._sampled[line["engine"], line["rollout_id"]] for line in lines)
        if kept != delivered:
            self._fault(f"I2: {delivered} tokens are delivered, engines have {kept} of these")
        wasted = total["purged"] + total["regenerated"] + total["cancelled"]
        if not is_lost and used - kept != wasted:
            self._fault(f"I5: engines have {used - kept} tokens of others, the ledger {wasted}")
