"""What `everstep rollout` reads and shows, without an engine: prompts, output, view."""

import contextlib
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.errors import ConfigError
from everstep.engine.rollout import SamplingParams
from everstep.rollout.output import RolloutOutput, write_parquet
from everstep.rollout.prompts import PromptFile
from everstep.rollout.run import purge_warning
from everstep.rollout.view import (
    RolloutView,
    books_rows,
    histogram,
    lengths_text,
    meter,
    picture,
    picture_rows,
)
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.ledger import Books
from everstep.trainer_bridge.run.report import EngineReport, Lengths, Report
from everstep.trainer_bridge.run.words import Position


def write(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read_all(file: PromptFile, count: int = 3) -> tuple[list[str], dict[int, str]]:
    names, bad = [], {}
    while not file.position.is_at_end:
        kept, found, _ = file.read(count)
        names += [one.name for one in kept]
        bad |= found
    return names, bad


# --- settings


@pytest.mark.parametrize(
    ("budget", "capacity", "retention", "max_tokens", "words"),
    [
        (800, 8, 3, 300, []),
        (800, 8, 3, 301, ["more than 300 tokens", "--max-tokens is 301: --retention 4 purges"]),
        (807, 8, 3, 301, ["--retention 3 × --budget 807 ÷ --capacity 8", "--retention 4 purges"]),
        (800, 8, 0, 100, ["more than 0 tokens", "--max-tokens is 100: --retention 1 purges none"]),
        (800, 8, 3, None, ["more than 300 tokens", "set --max-tokens", "raise --retention"]),
        (7, 8, 99, 50, ["more than 0 tokens", "while --budget is below --capacity"]),
    ],
)
def test_who_may_purge_for_length_alone_is_told_so_in_one_line(
    budget: int, capacity: int, retention: int, max_tokens: int | None, words: list[str]
) -> None:
    config = C3poConfig(budget=budget, capacity=capacity, retention=retention)
    warning = purge_warning(config, max_tokens)
    assert (warning is None) == (not words)
    for word in words:
        assert warning is not None
        assert word in warning
        assert "\n" not in warning
    if warning is not None and "purges none" in warning:
        assert max_tokens is not None
        enough = int(warning.split("--retention ")[-1].split()[0])
        raised = C3poConfig(budget=budget, capacity=capacity, retention=enough)
        assert purge_warning(raised, max_tokens) is None


# --- prompts


def test_a_prompt_has_what_its_line_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"id": 7, "prompt_ids": [1, 2], "metadata": {"a": [1, None]}},
        {"prompt": "hi", "sampling": {"top_k": 3, "stop": "x"}, "add_special_tokens": False},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"b": 1}},
    )
    flags = SamplingParams(temperature=0.7, top_k=9, max_tokens=50)
    file = PromptFile(path, flags)
    kept, bad, position = file.read(10)
    first, second, third = map(file.prompt, kept)
    assert not bad
    assert position.is_at_end
    assert [one.name for one in kept] == ["7@0", "line-2@0", "line-3@0"]
    assert (first.id, first.prompt_ids, first.metadata) == ("7", [1, 2], {"a": [1, None]})
    assert first.sampling == flags
    assert second.prompt == "hi"
    assert second.options == {"add_special_tokens": False}
    # the line goes over the flags, field by field
    assert second.sampling == SamplingParams(temperature=0.7, top_k=3, max_tokens=50, stop=("x",))
    assert third.messages == [{"role": "user", "content": "hi"}]
    assert third.options == {"chat_template_kwargs": {"b": 1}}
    file.close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "the line is not JSON"),
        ("[1]", "the line must be a JSON object"),
        ({"prompt": "a", "prompt_ids": [1]}, "exactly one of prompt_ids, prompt, messages"),
        ({"id": "x"}, "got none"),
        ({"prompt": "a", "promt": 1}, "promt is no field here; did you mean prompt?"),
        ({"prompt": 5}, "prompt must be"),
        ({"prompt_ids": []}, "prompt_ids must be"),
        ({"prompt_ids": [1.5]}, "prompt_ids"),
        ({"messages": []}, "messages must be"),
        ({"prompt": "a", "sampling": {"top_p": 2}}, "sampling.top_p must be"),
        ({"prompt": "a", "sampling": {"topp": 1}}, "did you mean sampling.top_p?"),
        ({"prompt": "a", "sampling": [1]}, "sampling must be"),
        ({"prompt": "a", "sampling": {"temperature": 0}}, "temperature is 0"),
        ({"prompt": "a", "sampling": {"seed": 3}}, "sampling.seed"),
        ({"prompt": "a", "id": True}, "id must be text or a number"),
        ({"prompt": "a", "id": ""}, "id must be text or a number"),
        ({"prompt": "a", "id": "taken"}, "is that of an earlier line"),
        ({"prompt": "a", "samples": 3}, "samples is no field here"),
    ],
)
def test_a_bad_line_is_named_and_passed_over(tmp_path: Path, line: Any, words: str) -> None:
    good = {"prompt": "a"}
    path = write(tmp_path / "in.jsonl", {**good, "id": "taken"}, "", line, good)
    file = PromptFile(path, SamplingParams())
    names, bad = read_all(file)
    assert names == ["taken@0", "line-4@0"]
    assert list(bad) == [3]
    assert words in bad[3]
    assert "\n" not in bad[3]
    file.close()


@settings(deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["good", "named", "bad", "blank"]), max_size=12),
    epochs=st.integers(1, 3),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    is_cut=st.booleans(),
)
def test_a_file_that_is_read_in_parts_gives_what_it_gives_at_once(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[str],
    epochs: int,
    counts: list[int],
    is_cut: bool,
) -> None:
    lines: list[Any] = []
    for i, kind in enumerate(kinds):
        made = {"good": {"prompt": "a"}, "named": {"id": f"n{i}", "prompt": "b"}, "bad": "{"}
        lines.append(made.get(kind, ""))
    path = write(tmp_path_factory.mktemp("prompts") / "in.jsonl", *lines)
    if is_cut and lines:
        # the last line has no end
        path.write_text(path.read_text()[:-1])
    whole = PromptFile(path, SamplingParams(), epochs=epochs)
    expected = read_all(whole, 1000)
    whole.close()
    names, bad, position = [], {}, Position()
    for i in range(100):
        # a process for each part
        part = PromptFile(path, SamplingParams(), epochs=epochs)
        part.resume(position)
        kept, found, position = part.read(counts[i % len(counts)])
        part.close()
        names += [one.name for one in kept]
        bad |= found
        if position.is_at_end:
            break
    assert (names, bad) == expected
    assert len(names) == len(set(names))


def test_a_file_that_was_changed_behind_a_run_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", *({"prompt": text} for text in "abcd"))
    file = PromptFile(path, SamplingParams())
    _, _, position = file.read(2)
    file.close()
    # what follows may change
    write(path, *({"prompt": text} for text in "abxyz"))
    file = PromptFile(path, SamplingParams())
    file.resume(position)
    assert [one.line for one in file.read(9)[0]] == [3, 4, 5]
    file.close()
    for texts, why in (
        ("axcd", ": its first 2 lines are not those"),
        ("a", " has 1 lines, and the"),
    ):
        write(path, *({"prompt": text} for text in texts))
        file = PromptFile(path, SamplingParams())
        with pytest.raises(ConfigError, match=f"in.jsonl{why}"):
            file.resume(position)
        file.close()


def test_what_an_epoch_has_read_counts_in_the_next_one_too(tmp_path: Path) -> None:
    def prompts(name: str, texts: str) -> PromptFile:
        path = write(tmp_path / name, *({"prompt": text} for text in texts))
        return PromptFile(path, SamplingParams(), epochs=2)

    file = prompts("in.jsonl", "1234")
    file.read(4)
    _, _, position = file.read(1)
    file.close()
    for texts, is_same in (("1234", True), ("12345", True), ("1x34", False), ("123", False)):
        # it may have moved
        other = prompts("other.jsonl", texts)
        with (
            contextlib.nullcontext() if is_same else pytest.raises(ConfigError, match="the run has")
        ):
            other.resume(position)
        other.close()


def test_prompts_that_can_be_read_once_alone_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is no regular file"):
        PromptFile(tmp_path / "pipe", SamplingParams())


# --- output


def test_what_was_written_and_never_counted_is_cut(tmp_path: Path) -> None:
    output = RolloutOutput(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_bytes(b"counted\nnot cou")
    output.close()
    output = RolloutOutput(tmp_path / "out.jsonl")
    output.cut(8)
    assert output.write([]) == 8
    output.close()
    assert (tmp_path / "out.jsonl").read_bytes() == b"counted\n"
    output = RolloutOutput(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="has 8 bytes, and the run has written 9"):
        output.cut(9)
    output.close()


def test_half_a_parquet_file_is_not_left_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "out.parquet.lines"
    lines.write_bytes(b"")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="no space left on the disk"):
        write_parquet(lines, tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == [lines]


# --- view


def report(**values: Any) -> Report:
    usual = {
        "iteration": 2,
        "phase": "open",
        "mode": "generated",
        "budget": 4096,
        "used": 1024,
        "capacity": 32,
        "num_live": 30,
        "num_held": 5,
        "num_waiting": 12,
        "num_groups": 3,
        "num_trajectories": 24,
        "num_abandoned": 0,
        "num_bad_lines": 0,
        "live": [10, 20, 400],
        "ended": [],
        "total": Books(iteration=2, sampled=10000, delivered=6000, purged=1000, carried=3000),
        "lost_budget": 0,
        "version": 4,
        "staleness": 2,
        "ages": {0: 20, 2: 10},
        "engines": [EngineReport("here", False, 30, 1024, 4096)],
        "tokens_per_s": 123.4,
        "elapsed_s": 65.0,
        "last_books": Books(iteration=1, sampled=4096, delivered=3000, carried=1096),
    }
    return Report(**{**usual, **values})


def test_the_picture_names_pools_budget_lengths_speed_waste_and_staleness() -> None:
    rows = dict(picture_rows(report(), 10))
    assert rows["iteration"] == "2 of 10, open; 1 min 05 s"
    assert rows["Φ"] == "█" * 10 + "░" * 30 + "  1024/4096 generated"
    assert rows["pool"] == "30/32 under way, 5 held for their groups, 12 waiting"
    assert rows["delivered"] == "3 groups, 24 trajectories"
    assert rows["running"].endswith("p50 20, p90 400, max 400")
    assert rows["ended"].endswith("-")
    assert rows["speed"] == "123 tok/s"
    assert "delivered 6000  carried 3000  held 0  purged 1000" in rows["tokens"]
    assert rows["waste"] == "1000 of 10000 tokens (10.0%)"
    assert rows["staleness"] == "2 versions; cut so often: 20 × 0, 10 × 2"
    assert "trouble" not in rows
    two = [EngineReport("http://a", False, 9, 5, 64), EngineReport("http://b", True, 0, 0, 0)]
    rows = dict(picture_rows(report(num_bad_lines=1, engines=two), None))
    assert rows["trouble"] == "1 bad lines, 0 prompts given up"
    assert rows["http://a"] == "9 under way, lease 5/64"
    assert rows["http://b"] == "stays away"


def test_the_picture_fits_a_terminal_of_100_columns() -> None:
    from rich.console import Console

    big = Books(iteration=2, sampled=10**9, delivered=10**9, purged=10**8, carried=10**7)
    stream = io.StringIO()
    console = Console(file=stream, width=100, highlight=False)
    console.print(picture(report(total=big, ended=list(range(4000))), None))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "everstep rollout" in lines[0]


def test_plain_lines_come_when_an_iteration_is_over_or_ten_seconds_are() -> None:
    now_s = 0.0
    stream = io.StringIO()
    view = RolloutView(stream, clock=lambda: now_s)
    view(report())
    now_s = 9.0
    view(report())
    assert stream.getvalue() == ""
    now_s = 10.0
    view(report())
    assert stream.getvalue() == (
        "iteration 2  Φ 1024/4096  pool 30/32  held 5  lengths p50 20, p90 400, max 400  "
        "123 tok/s\n"
    )
    view(report(iteration=3, last_books=Books(iteration=2, sampled=4096, delivered=4096)))
    assert (
        stream.getvalue()
        .splitlines()[1]
        .startswith(
            "iteration 2: 4096 sampled | delivered 4096, carried 0, held 0, purged 0, "
            "regenerated 0, cancelled 0 | 24 trajectories"
        )
    )
    view.note("e1 stays away")
    assert stream.getvalue().splitlines()[2] == "e1 stays away"
    view.close()


@given(st.lists(st.integers(0, 10**6), max_size=200))
def test_lengths_are_shown_whatever_they_are(lengths: list[int]) -> None:
    found = Lengths.of(lengths)
    text = histogram(lengths)
    assert len(text) == 24
    if found is None:
        assert lengths_text(lengths) == "-"
        return
    assert found.p50 <= found.p90 <= found.most == max(lengths)
    assert 2 * sum(length <= found.p50 for length in lengths) >= len(lengths)
    assert 2 * sum(length < found.p50 for length in lengths) <= len(lengths)
    assert (text.strip() == "") == (not found.most)


@given(st.integers(0, 10**7), st.integers(1, 10**6))
def test_the_meter_has_one_width(used: int, budget: int) -> None:
    assert len(meter(used, budget)) == 40
    assert (meter(used, budget) == "█" * 40) == (used >= budget)


def test_the_ledger_ends_with_the_run() -> None:
    books = [Books(iteration=i, sampled=10, delivered=10) for i in range(30)]
    header, rows = books_rows(books, Books(iteration=30, sampled=300, delivered=300))
    assert header[:3] == ("it.", "sampled", "delivered")
    assert rows[0][0] == "…"
    assert rows[-1][:3] == ("run", "300", "300")
    assert [row[0] for row in rows[1:-1]] == [str(i) for i in range(10, 30)]
