"""The judge: reads what the client wrote down and what the nemesis killed, and says a verdict.

    python checker.py --history H.jsonl [--history …] --kills K.jsonl [--unharmed U.jsonl]
                      [--model FOLDER] [--judge SHARE] [--json REPORT]

It imports nothing of everstep and believes nothing that the server says about itself. Clock: the
system's CLOCK_MONOTONIC in nanoseconds, one for all processes of a machine.

The records are described in history.py.

Invariants (RELIABILITY.md part 1):

    I1  what was accepted is delivered; an outcome that the client could not know is resolved later
        by the same key, or reported; nobody delivers what nobody submitted
    I2  delivered exactly once: the same answer each time until it is acknowledged, never after
    I3  any two observations of a rollout agree where they overlap, and none goes back
    I4  each token is the one that the definition draws, each logprob the definition's
        (ring_reference.py), and both equal to the bit to those of an unharmed run
    I5  books: columns, usage, versions and segments cover the same tokens; no seed twice
    I8  groups are whole
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from history import History, Life, Record, Report, read_records
from ring_reference import Ring, Sampling, judge

COLUMNS = ("lp_sampled", "lp_temp", "kept_mass")
ENDED = ("finished", "aborted", "failed")
MAX_FAULTS_SHOWN = 20


def check_books(history: History, report: Report) -> None:
    """I1, I2, I8 and the run's end."""
    report.counts["accepted"] = len(history.lives)
    for key in sorted(history.unresolved):
        report.fault("I1", f"key {key}: whether it was accepted was never found out")
    for rollout_id in sorted(history.strangers - history.lives.keys()):
        report.fault("I1", f"{rollout_id} was delivered and never submitted")
    if not history.is_done:
        report.fault("I1", "the client did not come to its end")
    elif history.last_list is None or history.last_list:
        report.fault("I1", f"not acknowledged at the end: {history.last_list}")
    for life in history.lives.values():
        final = life.final
        if final is None:
            report.fault("I1", f"{life.id} was accepted and never delivered")
            continue
        report.counts["delivered"] += 1
        report.counts["tokens"] += len(final["output_ids"])
        if final["state"] not in ENDED or final["state"] == "failed":
            report.fault("I1", f"{life.id} ended as {final['state']}: {final['finish_reason']}")
        if life.acked_at is None:
            report.fault("I2", f"{life.id} was delivered, and its acknowledgement never accepted")
        if any(whole["rollout"] != final for whole in life.wholes[1:]):
            report.fault("I2", f"{life.id} was delivered twice with different answers")
        if (final["group_id"], final["index"]) != (life.group_id, life.index):
            report.fault("I8", f"{life.id} is {final['group_id']}/{final['index']}")
        check_columns(life, final, report)
    check_seeds(history, report)


def check_columns(life: Life, final: Record, report: Report) -> None:
    """I5 within one rollout."""
    num, body = len(final["output_ids"]), life.body
    lengths = {name: len(final[name]) for name in (*COLUMNS, "flags")}
    if set(lengths.values()) != {num}:
        report.fault("I5", f"{life.id}: {num} tokens and {lengths}")
    if final["usage"]["completion_tokens"] != num or sum(n for _, n in final["versions"]) != num:
        report.fault("I5", f"{life.id}: {num} tokens, {final['usage']}, {final['versions']}")
    if final["prompt_ids"] != body["prompt_ids"] or final.get("metadata") != body.get("metadata"):
        report.fault("I5", f"{life.id}: prompt or metadata came back changed")
    segments = final["segments"]
    starts = [segment["start"] for segment in segments]
    if num and (not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= num):
        report.fault("I5", f"{life.id}: segments at {starts} for {num} tokens")
    bounds = [*starts, num]
    by_segment = [
        segment["version"]
        for segment, begin, end in zip(segments, bounds, bounds[1:], strict=False)
        for _ in range(end - begin)
    ]
    by_token = [version for version, count in final["versions"] for _ in range(count)]
    if by_segment != by_token or not all(s["digest"] and s["numerics"] for s in segments):
        report.fault("I5", f"{life.id}: versions {final['versions']} are not those of {segments}")
    report.counts["segments"] += len(segments)
    report.counts["resumed"] += len(segments) > 1
    check_ending(life, final, report)


def check_ending(life: Life, final: Record, report: Report) -> None:
    """A rollout ends where its parameters say, and nowhere else."""
    sampling, ids = life.body["sampling"], final["output_ids"]
    reason = final["finish_reason"]
    matched = reason.get("matched")
    if final["state"] == "aborted":
        if not life.body["metadata"].get("is_cancelled"):
            report.fault("I1", f"{life.id} was aborted, and nobody cancelled it")
        report.counts["cancelled"] += 1
    elif reason["type"] == "length":
        if len(ids) != sampling["max_tokens"]:
            report.fault("I5", f"{life.id}: ended by length after {len(ids)} tokens")
    elif isinstance(matched, int):
        if ids[-1:] != [matched]:
            report.fault("I5", f"{life.id}: ended at id {matched}, its last is {ids[-1:]}")
    elif not isinstance(matched, str) or matched not in sampling["stop"]:
        report.fault("I5", f"{life.id}: ended by {reason}")
    report.counts[f"ended by {reason['type']} {type(matched).__name__}"] += 1


def check_text(history: History, folder: Path, report: Report) -> None:
    """I5 for text: it is that of the tokens, and a stop string ends it where it first appears."""
    words = Words(folder)
    for life in history.lives.values():
        if (final := life.final) is None:
            continue
        text, stops = words.text(final["output_ids"]), life.body["sampling"].get("stop", [])
        matched = (final["finish_reason"] or {}).get("matched")
        if isinstance(matched, int):
            # the token that ended it is not shown
            text = words.text(final["output_ids"][:-1])
        said = final["text"]
        if said != text[: len(said)] or final["text_offset"] != len(said):
            report.fault("I5", f"{life.id}: its text is not that of its tokens")
        before = words.text(final["output_ids"][:-1])
        if any(stop in before for stop in stops):
            report.fault("I5", f"{life.id}: a stop string was passed over")
        if isinstance(matched, str):
            if matched not in text or matched in said:
                report.fault("I5", f"{life.id}: stop string {matched!r} is not where it ends")
        elif any(stop in text for stop in stops):
            report.fault("I5", f"{life.id}: a stop string was passed over at the end")
        elif final["state"] == "finished" and not is_same_text(said, text):
            report.fault("I5", f"{life.id}: {len(said)} characters of {len(text)}")


def is_same_text(said: str, whole: str) -> bool:
    """Half a character at the very end may be left out, or shown as a replacement."""
    return whole.rstrip("\ufffd") == said.rstrip("\ufffd")


class Words:
    """Ids to text, by tokenizer.json alone (a byte-level vocabulary; special tokens are silent)."""

    def __init__(self, folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        alphabet = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
        self._bytes = {
            i: bytes(alphabet[c] for c in word) if all(c in alphabet for c in word) else b""
            for word, i in tokenizer["model"]["vocab"].items()
        }
        for entry in tokenizer["added_tokens"]:
            self._bytes[entry["id"]] = b"" if entry["special"] else entry["content"].encode()

    def text(self, ids: list[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")


def check_seeds(history: History, report: Report) -> None:
    """No two rollouts share noise unless the client asked for it."""
    owners: dict[int, str] = {}
    for life in history.lives.values():
        if life.final is None:
            continue
        seed, asked = life.final["seed"], life.body["sampling"].get("seed")
        if asked is not None and life.body["samples"] == 1:
            if seed != asked:
                report.fault("I5", f"{life.id}: seed {seed}, asked {asked}")
        elif seed in owners:
            report.fault("I5", f"{life.id} and {owners[seed]} share the seed {seed}")
        owners.setdefault(seed, life.id)


def check_prefixes(history: History, report: Report) -> None:
    """I3."""
    for life in history.lives.values():
        longest: tuple[list[int], list[float]] = ([], [])
        if life.final is not None:
            longest = (life.final["output_ids"], life.final["lp_sampled"])
        else:
            for record in life.saw:
                if record["after"] + len(record["ids"]) > len(longest[0]) >= record["after"]:
                    longest = tuple(
                        [*old[: record["after"]], *record[name]]
                        for old, name in zip(longest, ("ids", "lp"), strict=True)
                    )  # type: ignore[assignment]
        # (when it was written down, how many tokens had been seen by then)
        known: list[tuple[int, int]] = []
        for record in life.saw:
            report.counts["observations"] += 1
            begin, end = record["after"], record["after"] + len(record["ids"])
            if (record["ids"], record["lp"]) != tuple(column[begin:end] for column in longest):
                report.fault("I3", f"{life.id}: tokens [{begin}, {end}) were seen as others")
                break
            num = record["num"] if record["num"] is not None else end
            seen = max((n for at, n in known if at < record["asked"]), default=0)
            if record["num"] is not None and num < seen:
                report.fault("I3", f"{life.id}: {seen} tokens were seen, then {num}")
                break
            if not known or num > known[-1][1]:
                known.append((record["at"], num))


def check_unharmed(history: History, records: Iterable[Record], report: Report) -> None:
    """I4, first half: the same seeds in a run that nobody disturbed gave the same bits.

    records  of kind "whole": `of` names the rollout of the harmed run
    """
    twins = {record["of"]: record["rollout"] for record in records if record["kind"] == "whole"}
    for life in history.lives.values():
        if (final := life.final) is None:
            continue
        twin = twins.get(life.id)
        if twin is None:
            report.fault("I4", f"{life.id} has no twin in the unharmed run")
            continue
        num = len(final["output_ids"])
        names = ["output_ids", *COLUMNS]
        is_whole = final["state"] == "finished"
        if is_whole and num != len(twin["output_ids"]):
            report.fault("I4", f"{life.id}: {num} tokens, unharmed {len(twin['output_ids'])}")
        for name in names:
            if final[name] != twin[name][:num]:
                at = first_difference(final[name], twin[name])
                report.fault("I4", f"{life.id}: {name} differ from the unharmed run at token {at}")
                break
        if is_whole and (final["text"], final["finish_reason"]) != (
            twin["text"],
            twin["finish_reason"],
        ):
            report.fault("I4", f"{life.id}: text or ending differ from the unharmed run")
        report.counts["tokens equal to the unharmed run"] += num


def first_difference(left: list[Any], right: list[Any]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def check_definition(history: History, folder: Path, share: float, report: Report) -> None:
    """I4, second half: this side's own computation of a share of the rollouts."""
    ring = Ring(folder)
    lives = [life for life in history.lives.values() if life.final and life.final["output_ids"]]
    # those that were resumed first: they are what the run is about
    lives.sort(key=lambda life: -len(life.final["segments"]) if life.final else 0)
    for life in lives[: max(1, round(share * len(lives)))]:
        assert life.final is not None
        sampling = Sampling.of(life.body["sampling"])
        verdict = judge(ring, life.body["prompt_ids"], life.final, sampling)
        report.counts["tokens recomputed"] += verdict.num_judged
        report.counts["tokens not judged (experts nearly tie)"] += verdict.num_unclear
        report.worst_logprob = max(report.worst_logprob, verdict.worst_logprob)
        if verdict.fault:
            report.fault("I4", f"{life.id} (seed {life.final['seed']}): {verdict.fault}")


def check_kills(history: History, kills: Iterable[Record], report: Report) -> None:
    """A run whose kills all missed the streams has shown nothing."""
    counts = report.counts
    spans = []
    for life in history.lives.values():
        seen: list[tuple[int, int]] = [(r["at"], r["after"] + len(r["ids"])) for r in life.saw]
        total = len(life.final["output_ids"]) if life.final else 0
        for opened, closed in life.streams:
            first = min((at for at, num in seen if opened <= at and num), default=None)
            # while it was open, after its first token, before its last
            last = max((at for at, num in seen if num < total), default=None)
            if first is not None and last is not None:
                spans.append((first, min(closed, last)))
    for kill in kills:
        if kill["what"] in ("stop", "full"):
            counts["stops (SIGSTOP)" if kill["what"] == "stop" else "times the disk was full"] += 1
            continue
        counts["kills"] += 1
        counts[f"kills of a {kill['what']}"] += 1
        if kill["how"] != "random":
            counts[f"kills at {kill['how']}"] += 1
        if any(begin <= kill["at"] <= end for begin, end in spans):
            counts["kills in mid-stream"] += 1
            counts[f"kills of a {kill['what']} in mid-stream"] += 1
    if counts["kills"] and not counts["kills in mid-stream"]:
        report.fault("harness", "no kill hit the middle of a token stream")


def check(
    histories: list[Path],
    *,
    kills: Path | None = None,
    unharmed: list[Path] | None = None,
    model: Path | None = None,
    share: float = 1.0,
) -> Report:
    """Everything above, over files."""
    report = Report()
    records = sorted(
        (record for path in histories for record in read_records(path)), key=lambda r: r["at"]
    )
    history = History(records, report)
    check_books(history, report)
    check_prefixes(history, report)
    if kills is not None:
        check_kills(history, read_records(kills), report)
    if unharmed:
        twins = (record for path in unharmed for record in read_records(path))
        check_unharmed(history, twins, report)
    if model is not None:
        check_text(history, model, report)
        check_definition(history, model, share, report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="judge a run of the crash harness")
    parser.add_argument("--history", action="append", type=Path, required=True)
    parser.add_argument("--kills", type=Path)
    parser.add_argument("--unharmed", action="append", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--judge", type=float, default=1.0, help="share of rollouts to recompute")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = check(
        given.history,
        kills=given.kills,
        unharmed=given.unharmed,
        model=given.model,
        share=given.judge,
    )
    for name, number in sorted(report.counts.items()):
        print(f"{number:>10,}  {name}")
    if given.model:
        print(f"{report.worst_logprob:>10.1e}  largest error of a logprob against float64")
    for text in report.faults[:MAX_FAULTS_SHOWN]:
        print(f"FAULT {text}")
    if len(report.faults) > MAX_FAULTS_SHOWN:
        print(f"FAULT … and {len(report.faults) - MAX_FAULTS_SHOWN} more")
    if given.json:
        found = {"counts": report.counts, "faults": report.faults}
        given.json.write_text(json.dumps(found, indent=1))
    print("VERDICT: " + (f"{len(report.faults)} faults" if report.faults else "no fault"))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
