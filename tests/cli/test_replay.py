"""everstep replay and capsule over rollouts that a real engine made."""

import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep import LLM
from everstep.cli import run
from everstep.engine.config import JournalConfig
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Accept, Ack, End
from everstep.engine.rollout import Rollout, RolloutState, SamplingParams, Segment
from everstep.engine.trajectory import pack, seal

PROMPT = [5, 6, 7, 8, 250, 9]
# everything that can be recorded; a plain one; one that a stop string ended
SAMPLINGS = [
    SamplingParams(
        max_tokens=12,
        ignore_eos=True,
        top_p=0.9,
        record=("lp_raw", "entropy", "kept_ids", "routing"),
        top_logprobs=3,
        prompt_logprobs=2,
    ),
    SamplingParams(max_tokens=12, presence_penalty=0.5, ignore_eos=True),
    SamplingParams(max_tokens=200, ignore_eos=True, stop=("e",)),
]


@pytest.fixture(scope="module")
def rollouts(tiny_checkpoint: Path) -> list[Rollout]:
    with LLM(str(tiny_checkpoint), seed=3, num_threads=1) as llm:
        return llm.generate([PROMPT] * len(SAMPLINGS), SAMPLINGS)


@pytest.fixture
def replay(tiny_checkpoint, tmp_path, capsys):
    """Replay a rollout from a file; returns (exit code, standard output, standard error)."""

    def call(rollout: Rollout, *more: str):
        file = tmp_path / "rollout"
        file.write_bytes(seal(pack(rollout)))
        return call_file(file, *more)

    def call_file(file: Path, *more: str):
        model = ("--model", str(tiny_checkpoint), "--num-threads", "1")
        code = run(["replay", str(file), *model, *more])
        said = capsys.readouterr()
        return code, said.out, said.err

    call.file = call_file
    return call


def copy_of(rollout: Rollout, **changes) -> Rollout:
    return msgspec.structs.replace(rollout, **changes)


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_a_rollout_replays_to_the_bit(replay, rollouts, number) -> None:
    code, out, _ = replay(rollouts[number])
    num = len(rollouts[number].output_ids)
    assert (code, out.splitlines()[-1]) == (
        0,
        f"replayed {num} of {num} tokens: identical to the bit",
    )


def test_to_stops_early(replay, rollouts) -> None:
    code, out, _ = replay(rollouts[0], "--to", "5")
    assert (code, out.splitlines()[-1]) == (0, "replayed 5 of 5 tokens: identical to the bit")


def changed(values: list, at: int, value) -> list:
    return [*values[:at], value, *values[at + 1 :]]


FIELDS = {
    "output_ids": lambda r: changed(r.output_ids, 4, (r.output_ids[4] + 1) % 400),
    "lp_sampled": lambda r: changed(r.lp_sampled, 4, r.lp_sampled[4] - 2**-20),
    "lp_temp": lambda r: changed(r.lp_temp, 4, r.lp_temp[4] - 2**-20),
    "kept_mass": lambda r: changed(r.kept_mass, 4, r.kept_mass[4] / 2),
    "flags": lambda r: changed(r.flags, 4, 2),
    "lp_raw": lambda r: changed(r.lp_raw, 4, 0.0),
    "entropy": lambda r: changed(r.entropy, 4, 0.0),
    "kept_ids": lambda r: changed(r.kept_ids, 4, [1]),
    "top": lambda r: changed(r.top, 4, [(1, -1.0)]),
    "routing_weights": lambda r: bytearray(
        r.routing_weights[:-1] + bytes([r.routing_weights[-1] ^ 1])
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_one_changed_value_is_found_and_named(replay, rollouts, field) -> None:
    wrong = copy_of(rollouts[0], **{field: FIELDS[field](rollouts[0])})
    code, out, _ = replay(wrong)
    token = 11 if field == "routing_weights" else 4
    assert code == 1
    assert f"first difference: token {token}, {field}" in out
    assert "this is a bug of everstep" in out


def test_a_changed_prompt_logprob_is_found(replay, rollouts) -> None:
    code, out, _ = replay(copy_of(rollouts[0], prompt_lp=changed(rollouts[0].prompt_lp, 2, -1.0)))
    assert code == 1
    assert "prompt_lp of prompt token 2: recorded -1.0" in out


def test_another_seed_is_another_token(replay, rollouts) -> None:
    code, out, _ = replay(copy_of(rollouts[1], seed=rollouts[1].seed + 1))
    assert code == 1
    assert "output_ids" in out


def test_another_numerics_id_is_said_to_be_the_reason(replay, rollouts) -> None:
    [segment] = rollouts[1].segments
    parts = segment.numerics.split("/")
    other = msgspec.structs.replace(segment, numerics="/".join([*parts[:2], "sse9", *parts[3:]]))
    wrong = copy_of(rollouts[1], segments=[other], lp_temp=changed(rollouts[1].lp_temp, 0, -1.0))
    code, out, _ = replay(wrong)
    assert code == 1
    assert f"kernel level sse9 was recorded, {parts[2]} is here" in out


def segmented(rollout: Rollout, *segments: tuple[int, str]) -> Rollout:
    """Its tokens, as if other weights had made some of them."""
    [first] = rollout.segments
    made = [
        Segment(start, version, digest or first.digest, first.numerics, f"core-{start}")
        for version, (start, digest) in enumerate(segments)
    ]
    bounds = [*(s.start for s in made), len(rollout.output_ids)]
    versions = [
        s.version for s, a, b in zip(made, bounds, bounds[1:], strict=False) for _ in range(b - a)
    ]
    return copy_of(rollout, segments=made, versions=versions)


def test_tokens_of_other_weights_are_given_and_the_rest_is_compared(replay, rollouts) -> None:
    code, out, _ = replay(segmented(rollouts[1], (0, ""), (3, "f" * 64), (8, "")))
    assert code == 0
    lines = out.splitlines()
    assert "tokens 3-7  version 1@ffffffff" in lines[2]
    assert "not replayable here: made by version 1 (ffffffffffff), which is not here" in lines[2]
    assert lines[-1] == (
        "replayed 7 of 12 tokens: identical to the bit; "
        "the other 5 need version 1 (ffffffffffff): --weights"
    )


def test_a_difference_behind_foreign_tokens_is_found(replay, rollouts) -> None:
    wrong = segmented(rollouts[1], (0, "f" * 64), (8, ""))
    wrong.lp_temp = changed(wrong.lp_temp, 9, -1.0)
    code, out, _ = replay(wrong)
    assert code == 1
    assert "first difference: token 9, lp_temp" in out


def test_a_name_cannot_write_to_the_terminal(replay, rollouts) -> None:
    code, out, _ = replay(copy_of(rollouts[1], id="ro\x1b[2J\nreplayed"), "--to", "1")
    assert code == 0
    assert out.splitlines()[0].startswith("ro?[2J?replayed: 6 prompt")


def test_a_rollout_of_other_weights_cannot_be_replayed(replay, rollouts) -> None:
    code, _, err = replay(segmented(rollouts[1], (0, "f" * 64)))
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: none of its tokens can be replayed with this model")
    assert "they need version 0 (ffffffffffff); name the folder with --weights" in last


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_ids": [600] * 12}, "output_ids: token id 600 is outside the vocabulary"),
        ({"prompt_ids": [700]}, "token id 700"),
        ({"prompt_ids": []}, "prompt is empty"),
        ({"sampling": SamplingParams(logit_bias={900: 1.0})}, "logit_bias: token id 900"),
    ],
)
def test_a_forged_rollout_is_refused_in_one_line(replay, rollouts, changes, said) -> None:
    code, _, err = replay(copy_of(rollouts[1], **changes))
    assert code == 2
    assert said in err.splitlines()[-1]


@pytest.fixture
def journal(rollouts, tmp_path) -> Path:
    path = tmp_path / "run.db"
    store = Journal.open(path, JournalConfig())
    begun = [copy_of(r, state=RolloutState.QUEUED, finish_reason=None) for r in rollouts]
    store.commit([Accept(begun)])
    store.commit([End(rollout) for rollout in rollouts])
    store.commit([Ack([rollouts[2].id])])
    store.close()
    return path


def test_an_id_is_taken_from_a_journal(replay, journal, rollouts, tmp_path, capsys) -> None:
    code, out, _ = replay.file(rollouts[0].id, "--journal", str(journal))
    assert (code, out.splitlines()[-1]) == (0, "replayed 12 of 12 tokens: identical to the bit")
    capsule = tmp_path / "bug.capsule"
    assert run(["capsule", rollouts[0].id, "--journal", str(journal), "-o", str(capsule)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{capsule}\n"
    assert "holds tokens;" in said.err
    assert replay.file(capsule)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody"], "'nobody' is no file; to take a rollout from a journal, name it: --journal"),
        (["nobody", "--journal", "no/such"], "--journal no/such: no such file"),
        (["nobody", "--journal", "RUN"], "has no rollout 'nobody'"),
        (["ACKED", "--journal", "RUN"], "was acknowledged"),
        (["pyproject.toml"], "pyproject.toml: neither a capsule"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "capsule"])
def test_a_mistake_is_one_line(journal, rollouts, tmp_path, capsys, command, words, said) -> None:
    names = {"RUN": str(journal), "ACKED": rollouts[2].id}
    words = [names.get(word, word) for word in words]
    more = ["-o", str(tmp_path / "out")] if command == "capsule" else []
    assert run([command, *words, *more]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_forged_file_ends_in_a_line_and_an_exit_code(rollouts, tmp_path_factory, data) -> None:
    """Checksums right, bytes wrong: refused before a model is looked for."""
    body = bytearray(seal(pack(rollouts[0]))[8:-16])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    head = b"EVST" + (1).to_bytes(4, "little") + bytes(body)
    file = tmp_path_factory.mktemp("forged") / "file"
    file.write_bytes(head + hashlib.blake2b(head, digest_size=16).digest())
    assert run(["replay", str(file), "--model", "/no/such/model"]) == 2
