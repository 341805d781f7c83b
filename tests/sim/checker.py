"""Judges a history by what was noted of it. Imports nothing of what it judges.

I1  what was accepted ends, and is read to its end; what was refused was not accepted
I2  a group is trained once, with the same bytes however often it was offered
I3  what anybody saw of a rollout is the beginning of what is seen later
I4  a token stamped v, and its logprob, are what v gives after the tokens before it
I5  books balance: columns agree, seeds are used once, endings are where parameters say
I6  a rollout that moved is trained from one place, and ended at the other
I7  versions never go back along a rollout, and none is newer than what was published
I8  a group that is handed over is whole: each sample once
I9  a version is served whole: one digest for one number, none before it was trained

At a crash the journal is looked at, and nobody may have seen more than it holds. Where the power
went and the level of durability allows it, observed tokens may be gone that were not synced: they
come back, under other weights as others.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VOCAB = 24
EOS = 23

Snapshot = Mapping[str, Any]


def recompute(
    seed: int, prompt: Sequence[int], ids: Sequence[int], segments: Sequence[Any]
) -> list[tuple[int, float]]:
    """Every token and its logprob, from what the segments say of weights and KV: a token depends on
    the seed, on all tokens before it, and on the version that wrote the KV of each of them."""
    found: list[tuple[int, float]] = []
    num_prompt, whole = len(prompt), [*prompt, *ids]
    kv = [0] * len(whole)
    ends = [*(segment[0] for segment in segments), len(ids)][1:]
    for (start, version, _, policy), end in zip(segments, ends, strict=True):
        if policy == "computed":
            kv[: num_prompt + start - 1] = [version] * (num_prompt + start - 1)
        elif policy == "recompute-prompt":
            kv[:num_prompt] = [version] * num_prompt
        for at in range(num_prompt + start, num_prompt + end):
            kv[at - 1] = version
            words = array("q", [seed, num_prompt, *whole[:at], *kv[:at]])
            noise = int.from_bytes(
                hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little"
            )
            found.append((noise % VOCAB, -(noise >> 32 & 1023) / 128))
    return found


class Checker:
    """Reads events in order; `faults` is what is wrong with them."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._wanted: dict[str, dict[str, Any]] = {}
        self._accepted: dict[str, tuple[str, ...]] = {}
        """Key → ids."""
        self._of: dict[str, tuple[str, int]] = {}
        """Id → (key, index)."""
        self._refused: set[str] = set()
        self._seen: dict[tuple[str, str], Snapshot] = {}
        """(front, id) → the longest observation."""
        self._out: set[str] = set()
        """Fronts that lost what was not synced, and have not answered since."""
        self._seeds: dict[int, str] = {}
        self._cancelled: set[tuple[str, str]] = set()
        self._imported: dict[str, str] = {}
        self._acked: set[tuple[str, str]] = set()
        self._offered: dict[str, Any] = {}
        self._trained: dict[str, int] = {}
        self._version = 1
        """The newest that was trained."""
        self._forks: dict[str, tuple[str, int]] = {}

    def judge(self, events: Iterable[Any]) -> list[str]:
        for event in events:
            handler = getattr(self, "_on_" + event.kind.replace(" ", "_"), None)
            if handler is not None:
                handler(event.who, **event.fields)
        self._judge_end()
        return self.faults

    def _fault(self, text: str) -> None:
        self.faults.append(text)

    # --- what was asked ------------------------------------------------------------------

    def _on_asks(self, who: str, key: str, **wanted: Any) -> None:
        if self._wanted.setdefault(key, wanted) != wanted:
            self._fault(f"{who} asked for other things under the key {key}")

    def _on_refused(self, who: str, key: str, code: str, why: str) -> None:
        self._refused.add(key)
        if code not in ("rollout_not_found", "invalid_request_error"):
            self._fault(f"I1: key {key} was refused: {code}: {why}")
        if self._wanted[key]["method"] == "submit":
            self._fault(f"I1: key {key} was refused: {why}")

    def _on_accepted(
        self, who: str, key: str, front: str, group: str, ids: tuple[str, ...], replay: bool
    ) -> None:
        known = self._accepted.setdefault(key, ids)
        if known != ids:
            self._fault(f"I2: key {key} gave {ids}, before that {known}")
        wanted = self._wanted[key]
        samples = (
            wanted["request"]["samples"] if wanted["method"] == "submit" else wanted["samples"]
        )
        if len(set(ids)) != samples:
            self._fault(f"I8: key {key} asked for {samples} samples, got {ids}")
        for index, rollout_id in enumerate(ids):
            if self._of.setdefault(rollout_id, (key, index)) != (key, index):
                self._fault(f"I6: {rollout_id} was given twice")

    def _on_cancels(self, who: str, front: str, id: str) -> None:
        self._cancelled.add((front, id))

    def _on_imported(self, who: str, front: str, id: str) -> None:
        self._imported[id] = front

    def _on_acked(self, who: str, front: str, id: str) -> None:
        self._acked.add((front, id))

    def _on_lost(self, who: str, front: str, id: str, why: str) -> None:
        if (front, id) not in self._acked:
            self._fault(f"I1: {id} was accepted by {front} and is not known any more: {why}")

    def _on_fault(self, who: str, what: str) -> None:
        self._fault(what)

    def _on_probed(self, who: str, front: str, id: str, is_known: bool) -> None:
        if is_known:
            self._fault(f"I2: {front} still gives {id}, which was acknowledged")

    # --- what was seen -------------------------------------------------------------------

    def _on_seen(self, who: str, front: str, id: str, **found: Any) -> None:
        before = self._seen.get((front, id))
        self._judge_request(front, id, found)
        self._judge_snapshot(f"{id} at {front}", found, before)
        is_longest = before is None or len(found["ids"]) >= len(before["ids"])
        # what was under way when the power went says nothing of what the journal has to hold
        if is_longest and (front not in self._out or found["finish"] is not None):
            self._seen[front, id] = found
        if found["finish"] is not None:
            self._judge_ending(front, id, found)

    def _judge_snapshot(self, where: str, found: Snapshot, before: Snapshot | None) -> None:
        ids, versions = found["ids"], found["versions"]
        if not len(ids) == len(found["lps"]) == len(versions):
            self._fault(f"I5: {where}: {len(ids)} tokens, other columns differ")
            return
        start = 0
        if before is not None:
            for name in ("seed", "prompt", "max_tokens", "group", "index"):
                if before[name] != found[name]:
                    self._fault(f"I3: {where}: {name} was {before[name]}, is {found[name]}")
            start = min(len(ids), len(before["ids"]))
            for name in ("ids", "lps", "versions"):
                if before[name][:start] != found[name][:start]:
                    self._fault(
                        f"I3: {where}: {name} {before[name][:start]} became {found[name][:start]}"
                    )
            if before["finish"] is not None and (before["finish"], before["ids"]) != (
                found["finish"],
                ids,
            ):
                self._fault(f"I2: {where}: its ending {before['finish']} is another one now")
        if self._is_too_new(versions[start:]):
            self._fault(
                f"I9: {where}: tokens of version {max(versions)}, {self._version} is newest"
            )
        if list(versions) != sorted(versions):
            self._fault(f"I7: {where}: versions go back: {versions}")
        self._judge_segments(where, found)
        if found["forked_from"] is not None:
            # those before it are its parent's; that they are is judged at the end
            start = max(start, found["forked_from"][1])
        if start < len(ids):
            own = recompute(found["seed"], found["prompt"], ids, found["segments"])
            for at in range(start, len(ids)):
                if own[at] != (ids[at], found["lps"][at]):
                    self._fault(
                        f"I4: {where}: token {at} of version {versions[at]} is {ids[at]} "
                        f"({found['lps'][at]}), computed {own[at]}"
                    )
                    break

    def _is_too_new(self, versions: Sequence[int]) -> bool:
        return bool(versions) and max(versions) > self._version

    def _judge_segments(self, where: str, found: Snapshot) -> None:
        stamped: list[int] = []
        segments = found["segments"]
        ends = [*(segment[0] for segment in segments), len(found["ids"])][1:]
        for (start, version, digest, _), end in zip(segments, ends, strict=True):
            stamped += [version] * (end - start)
            if digest != f"{version:064x}":
                self._fault(f"I9: {where}: version {version} has the digest {digest}")
        if stamped != list(found["versions"]):
            self._fault(f"I5: {where}: segments {segments}, versions {found['versions']}")

    def _judge_request(self, front: str, id: str, found: Snapshot) -> None:
        """It is what was asked for, and its seed is its own."""
        if id not in self._of:
            self._fault(f"I1: {id} at {front} was never accepted")
            return
        key, index = self._of[id]
        wanted = self._wanted[key]
        if found["index"] != index:
            self._fault(f"I8: {id} is sample {found['index']}, was sample {index}")
        if wanted["method"] == "fork":
            self._forks[id] = (wanted["id"], wanted["at"])
            return
        request = wanted["request"]
        if found["prompt"] != request["prompt"] or found["max_tokens"] != request["max_tokens"]:
            self._fault(f"I5: {id} runs with {found['prompt']}, {found['max_tokens']}")
        if request["seed"] is None:
            if self._seeds.setdefault(found["seed"], id) != id:
                self._fault(f"I5: {id} and {self._seeds[found['seed']]} share the seed")
        elif request["samples"] == 1 and found["seed"] != request["seed"]:
            self._fault(f"I5: {id}: seed {found['seed']}, asked for {request['seed']}")

    def _judge_ending(self, front: str, id: str, found: Snapshot) -> None:
        kind, matched, detail = found["finish"]
        ids, stops = found["ids"], found["stops"]
        early = [at for at, token in enumerate(ids[:-1]) if token in stops]
        if early:
            self._fault(f"I5: {id}: went on after the stop token at {early[0]}")
        match kind:
            case "abort":
                places = [place for place, name in self._cancelled if name == id]
                # what had ended elsewhere may have been taken along
                is_right = front in places or bool(places and self._imported.get(id) == front)
            case "stop":
                is_right = bool(ids) and ids[-1] == matched and matched in stops
            case "length":
                is_right = len(ids) == found["max_tokens"] and ids[-1] not in stops
            case _:
                is_right = False
        if not is_right:
            self._fault(f"I5: {id} at {front}: {kind} {matched} {detail} after {len(ids)} tokens")

    def _places(self, rollout_id: str) -> list[str]:
        """Fronts at which it was seen."""
        return [front for front, name in self._seen if name == rollout_id]

    def _on_crash(self, who: str, **fields: Any) -> None:
        """Nobody has seen what the journal does not hold, unless the power took it from there."""
        kept = fields.get("kept", {})
        if not fields.get("is_safe", True):
            self._out.add(who)
        for (front, name), found in list(self._seen.items()):
            num = kept.get(name)
            if front != who or num is None or len(found["ids"]) <= num:
                continue
            if fields["is_safe"]:
                self._fault(
                    f"I3: {name}: {len(found['ids'])} tokens were seen, its journal holds {num}"
                )
            elif found["finish"] is None:
                cut = {column: found[column][:num] for column in ("ids", "lps", "versions")}
                self._seen[front, name] = {**found, **cut}

    def _on_ready(self, who: str, **fields: Any) -> None:
        self._out.discard(who)

    # --- the trainer ---------------------------------------------------------------------

    def _on_offered(self, who: str, group: str, rollouts: Mapping[str, Snapshot]) -> None:
        first = self._offered.setdefault(group, rollouts)
        if first != rollouts:
            self._fault(f"I2: group {group} was offered again with other bytes")
        if group in self._wanted and set(rollouts) != set(self._accepted.get(group, ())):
            self._fault(f"I8: group {group} came as {tuple(rollouts)}")
        for rollout in rollouts.values():
            if self._is_too_new(rollout["versions"]):
                self._fault(f"I7: group {group} has tokens of the future")

    def _on_trained(self, who: str, groups: tuple[str, ...], version: int) -> None:
        for group in groups:
            if group in self._trained:
                self._fault(f"I2: group {group} was trained twice")
            self._trained[group] = version
        if version != self._version + 1:
            self._fault(f"I7: version {version} follows {self._version}")
        self._version = version

    # --- what must be so when all is over ------------------------------------------------

    def _judge_end(self) -> None:
        for key, ids in self._accepted.items():
            if key.startswith("c3po/"):
                continue
            if key not in self._trained:
                self._fault(f"I1: group {key} was accepted and never trained")
                continue
            for rollout_id in ids:
                self._judge_trained(key, rollout_id)
        for key in self._wanted:
            if key not in self._accepted and key not in self._refused:
                self._fault(f"I1: whether {key} was accepted was never found out")

    def _judge_trained(self, key: str, rollout_id: str) -> None:
        final = self._offered[key].get(rollout_id)
        if final is None or final["finish"] is None:
            self._fault(f"I8: {rollout_id} was handed over before its end")
            return
        home = self._imported.get(rollout_id)
        for front in self._places(rollout_id):
            found = self._seen[front, rollout_id]
            if (home is None or front == home) and found["ids"] != final["ids"]:
                self._fault(f"I2: {rollout_id}: trained on other tokens than {front} showed")
            if (front, rollout_id) not in self._acked:
                self._fault(f"I6: {rollout_id} was never let go by {front}")
        if rollout_id in self._forks:
            self._judge_fork(rollout_id, final)

    def _judge_fork(self, rollout_id: str, final: Snapshot) -> None:
        parent_id, at = self._forks[rollout_id]
        if final["forked_from"] != (parent_id, at):
            self._fault(f"I5: {rollout_id} was forked from {final['forked_from']}")
        parents = [found for (_, name), found in self._seen.items() if name == parent_id]
        if parents and all(found["ids"][:at] != final["ids"][:at] for found in parents):
            self._fault(f"I3: {rollout_id} does not begin as {parent_id} did")
