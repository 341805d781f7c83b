"""The flags of both dialects come to the same settings, or are refused with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import typer

from everstep.cli import app, run
from everstep.dialects import FOREIGN, SWITCHES, SYNONYMS
from everstep.engine.rollout import SamplingParams
from everstep.engine.settings import settings_of
from everstep.flags import Settings, with_settings
from everstep.server.config import ServeConfig

Parse = Callable[..., tuple[ServeConfig, SamplingParams]]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Run a command line of a command with every flag; returns what it came to."""
    seen: list[Any] = []
    probe = typer.Typer()

    @probe.command()
    @with_settings(
        ("engine", "http", "openai", "skip_tokenizer_init"), sampling=SamplingParams(top_p=0.9)
    )
    def command(settings: Settings, sampling: SamplingParams) -> None:
        seen.append((settings.config, sampling))

    def parsed(*arguments: str) -> tuple[ServeConfig, SamplingParams]:
        typer.main.get_command(probe).main(list(arguments), standalone_mode=False)
        return seen.pop()

    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    return parsed


@pytest.mark.parametrize("flags", [f for f in SYNONYMS.items() if len(f[1]) > 1])
def test_synonyms_are_one_setting(parse: Parse, flags: tuple[str, tuple[str, ...]]) -> None:
    path, names = flags
    value = "tiny" if path == "engine.model.path" else "7"
    dotted = "--" + path.replace("_", "-")
    assert parse(dotted, value)[0] != ServeConfig()
    assert len({repr(parse(name, value)[0]) for name in (*names, dotted)}) == 1


def test_every_synonym_names_a_setting_and_no_name_is_used_twice() -> None:
    paths = {setting.path for setting in settings_of(ServeConfig)}
    assert set(SYNONYMS) <= paths
    assert {switch.path for switch in SWITCHES} <= paths
    names = [name for group in SYNONYMS.values() for name in group]
    names += [switch.name for switch in SWITCHES]
    names += [name for flag in FOREIGN for name in flag.names]
    assert len(names) == len(set(names))


def test_a_model_may_stand_first_or_behind_either_flag(parse: Parse) -> None:
    for arguments in (["m"], ["--model", "m"], ["--model-path", "m"], ["m", "--model", "m"]):
        assert parse(*arguments)[0].engine.model.path == "m"
    # a value never becomes the model
    assert parse("--max-num-seqs", "8", "m")[0].engine.batch.max_num_seqs == 8


def test_prefix_caching_is_switched_in_both_dialects(parse: Parse) -> None:
    assert parse("--enable-prefix-caching")[0].engine.kv.prefix_caching
    for name in ("--no-enable-prefix-caching", "--disable-radix-cache"):
        assert not parse(name)[0].engine.kv.prefix_caching
    assert not parse("--engine.kv.prefix-caching", "false")[0].engine.kv.prefix_caching
    assert parse("--skip-tokenizer-init")[0].skip_tokenizer_init


def test_values_of_the_other_dialects_are_understood(parse: Parse) -> None:
    assert parse("--dtype", "float")[0].engine.model.dtype == "float32"
    assert parse("--logprobs-mode", "processed_logprobs")[0].openai.logprobs_mode == "sampled"
    assert parse("--max-model-len", "auto")[0].engine.model.max_model_len is None
    assert parse("--chunked-prefill-size", "-1")[0] == ServeConfig()
    assert parse("--served-model-name", "a", "--served-model-name", "b")[
        0
    ].openai.served_model_name == ("a", "b")


def test_a_chat_template_is_read_from_its_file(parse: Parse, tmp_path: Any) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert parse("--chat-template", str(file))[0].openai.chat_template == "{{ messages }}"
    assert parse("--chat-template", "tool_use")[0].openai.chat_template == "tool_use"


@pytest.mark.parametrize("flag", FOREIGN, ids=lambda flag: flag.names[0])
def test_flags_that_set_nothing_are_met_with_a_note_or_a_reason(
    parse: Parse, capsys: pytest.CaptureFixture[str], flag: Any
) -> None:
    good = flag.accepts[0] if flag.accepts else "0.9"
    for name in flag.names:
        arguments = [name, good] if flag.takes_value else [name]
        if flag.accepts == ():
            assert run(["chat", *arguments]) == 2
            assert "cannot be honoured" in capsys.readouterr().err
            continue
        assert parse(*arguments)[0] == ServeConfig()
        assert capsys.readouterr().err.count("\n") == (1 if flag.note else 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("chat --tp 2", "--tensor-parallel-size 2 cannot be honoured"),
        ("chat --kv-cache-dtype fp8_e4m3", "compute dtype"),
        ("chat --quantization awq", "accepted: fp8, compressed-tensors, none"),
        ("chat --max-numseqs 3", "no such flag: --max-numseqs; did you mean --max-num-seqs?"),
        ("serve --engine.kv.blocksize 3", "did you mean --engine.kv.block-size?"),
        ("serve --chat-template ./nix.jinja", "no such file"),
        ("chat a --model b", "two models: MODEL is 'a', --model is 'b'"),
        ("chat a b", "unexpected extra argument"),
        ("chat --max-num-seqs", "requires an argument"),
        ("chat --top-p 0", "top_p must be a number above 0.0, at most 1.0, got '0'"),
        ("make-checkpoint OUT --size hidden_size", "'hidden_size' must be KEY=VALUE"),
        ("chat --temperature hot", "temperature must be a number from 0.0 to 100.0, got 'hot'"),
        ("chat --block-size 0", "engine.kv.block_size must be"),
        ("nix", "No such command"),
        ("make-checkpoint x --format fp4", "--format must be bf16 or f32"),
        ("verify x --dtype fp8", "no model at"),
        ("serve --host 0.0.0.0", "set http.api_key"),
        ("chat --config nix.toml", "nix.toml: no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert run(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_prompt_in_place_of_the_model_is_told_from_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["chat", "Why is the sky blue?"]) == 2
    assert "a prompt goes to --prompt" in capsys.readouterr().err


def test_no_command_at_all_shows_the_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert "everstep chat" in captured.out
    assert captured.err == ""


def test_batch_invariance_of_vllm_is_acknowledged(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    parse()
    assert "VLLM_BATCH_INVARIANT: always so here" in capsys.readouterr().err


def test_sampling_flags_go_over_the_commands_own_defaults(parse: Parse) -> None:
    assert parse()[1] == SamplingParams(top_p=0.9)
    sampling = parse("--temperature", "0", "--stop", "a", "--stop", "b", "--max-tokens", "5")[1]
    assert sampling == SamplingParams(temperature=0, top_p=0.9, stop=("a", "b"), max_tokens=5)


def test_help_shows_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "chat",
        "batch",
        "serve",
        "train",
        "doctor",
        "verify",
        "convert",
        "quantize",
        "keys",
        "receive-weights",
        "make-checkpoint",
    ]
    for command in (*names, "replay", "capsule"):
        assert run([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"everstep {command}" in text
        assert "--tensor-parallel-size" not in text
    assert len(app.registered_commands) == len(names)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench offline --num-prompts 0", "--num-prompts must be at least 1, got '0'"),
        ("bench offline --num-prompts x", "--num-prompts must be a whole number, got 'x'"),
        ("bench serve --request-rate x", "--request-rate must be a number, got 'x'"),
        ("rollout --mode x", "--mode must be generated or completed, got 'x'"),
        ("rollout --kv x", "--kv must be keep, recompute or recompute-prompt, got 'x'"),
        ("journal export run.db --format x", "--format must be jsonl or trajectory, got 'x'"),
    ],
)
def test_a_value_that_the_parser_refuses_is_told_as_every_other(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
