"""Settings: which source wins, and what a fault says."""

from pathlib import Path

import msgspec
import pytest

from everstep.engine.errors import ConfigError
from everstep.engine.settings import Assignment, load, nearest, settings_of
from everstep.server.config import ServeConfig


def given(path: str, value: object) -> list[Assignment]:
    return [Assignment(path, value, "--flag")]


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[engine.kv]\nblock-size = 32\nnum_blocks = 9\n[http]\nport = 1\n")
    resolved = load(ServeConfig, file=file, assignments=given("engine.kv.block_size", "64"))
    assert resolved.config.engine.kv.block_size == 64
    assert resolved.config.engine.kv.num_blocks == 9
    assert resolved.config.http.port == 1
    assert resolved.config.engine.batch.max_num_seqs == 128
    origins = {path: origin for path, _, origin in resolved.lines()}
    assert origins["engine.kv.block_size"] == "--flag"
    assert origins["http.port"] == str(file)
    assert origins["http.host"] == "default"


def test_every_setting_has_a_help_text_and_a_flag() -> None:
    for setting in settings_of(ServeConfig):
        assert setting.help, setting.path
        assert setting.flag.startswith("--")
        assert "_" not in setting.flag


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("32k", 32000), ("32K", 32768), ("none", None)]
)
def test_whole_numbers_take_sizes(text: str, value: int | None) -> None:
    resolved = load(ServeConfig, assignments=given("engine.model.max_model_len", text))
    assert resolved.config.engine.model.max_model_len == value


def test_a_section_that_may_be_absent_is_there_with_its_first_setting() -> None:
    class Section(msgspec.Struct):
        size: int = 3
        name: str = "a"

    class Tree(msgspec.Struct):
        section: Section | None = None

    assert [setting.path for setting in settings_of(Tree)] == ["section.size", "section.name"]
    absent, there = load(Tree), load(Tree, assignments=given("section.name", "b"))
    assert absent.config.section is None
    assert absent.lines()[0] == ("section.size", "null", "default")
    assert there.config.section == Section(size=3, name="b")


def test_lists_are_separated_by_commas() -> None:
    resolved = load(ServeConfig, assignments=given("openai.served_model_name", "a,b"))
    assert resolved.config.openai.served_model_name == ("a", "b")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("engine.kv.block_size", "0", "engine.kv.block_size must be a whole number from 1 to 1024"),
        ("engine.kv.block_size", "many", "got 'many' (from --flag)"),
        ("engine.model.dtype", "fp16", "must be auto, bfloat16 or float32, got 'fp16'"),
        ("engine.kv.prefix_caching", "perhaps", "must be true or false"),
        ("engine.seed", "x", "a whole number or none"),
        ("http.heartbeat_s", "0", "a number above 0, got '0'"),
        ("http.heartbeat_s", "inf", "a number above 0, got 'inf'"),
        ("http.heartbeat_s", "nan", "a number above 0, got 'nan'"),
        ("engine.kv.blok_size", "1", "did you mean engine.kv.block_size?"),
        ("engine.max_num_seqs", "1", "did you mean engine.batch.max_num_seqs?"),
    ],
)
def test_a_fault_names_path_value_and_what_is_accepted(path: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ServeConfig, assignments=given(path, value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(ServeConfig, file=tmp_path / "nix")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match="is not TOML"):
        load(ServeConfig, file=bad)
    bad.write_text("[engine.batch]\nmax_seqs = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml\); did you mean engine\.batch\.max_num_seqs"):
        load(ServeConfig, file=bad)


def test_an_api_key_is_never_shown() -> None:
    resolved = load(ServeConfig, assignments=given("http.api_key", "secret"))
    assert "secret" not in msgspec.json.encode(resolved.lines()).decode()


def test_nearest_finds_what_was_meant() -> None:
    assert nearest("--max-numseqs", ["--max-num-seqs", "--port"]) == "--max-num-seqs"
    assert nearest("--zzz", ["--port"]) is None
