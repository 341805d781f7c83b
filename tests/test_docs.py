"""The documents name what exists: commands, flags, files, settings."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer

from everstep.cli import app
from everstep.engine.settings import settings_of
from everstep.server.config import ServeConfig
from everstep.trainer_bridge import protocol
from everstep.trainer_bridge.rewards.rewards import RewardConfig
from everstep.trainer_bridge.trainer.config import TrainConfig
from everstep.trainer_bridge.weights import protocol as weight_protocol

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "llms.txt", *ROOT.glob("docs/**/*.md")])
ROOT_COMMAND: Any = typer.main.get_command(app)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every `everstep …` in a bash block."""
    for page in PAGES:
        for language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "bash":
                continue
            for line in re.split(r"\n|&&|\|", text.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                if words[:1] == ["everstep"]:
                    yield str(page.relative_to(ROOT)), words[1:]


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command), those of a group with its name before theirs."""
    for name, command in group.commands.items():
        if not hasattr(command, "commands") or command.invoke_without_command:
            yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")


COMMANDS = dict(commands(ROOT_COMMAND))


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, one word or two, and what follows it."""
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:length]), words[length:]


def unknown_words(words: list[str]) -> list[str]:
    """What of a command line does not exist."""
    if words in (["--help"], ["--version"]):
        return []
    name, rest = command_of(words)
    command = COMMANDS.get(name)
    if command is None:
        return words[:1] or ["(no command)"]
    inner: list[str] = []
    if "--" in rest:
        # a command of ours that this one starts
        rest, inner = rest[: rest.index("--")], rest[rest.index("--") + 2 :]
    known = {"--help"}
    for parameter in command.params:
        known |= set(parameter.opts) | set(parameter.secondary_opts)
    flags = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return [flag for flag in flags if flag not in known] + (unknown_words(inner) if inner else [])


def test_every_command_line_names_a_command_and_its_flags() -> None:
    found = list(command_lines())
    assert {command_of(words)[0] for _, words in found} == set(COMMANDS)
    assert [(page, unknown_words(words)) for page, words in found if unknown_words(words)] == []


def test_a_flag_that_does_not_exist_is_found() -> None:
    assert unknown_words(["chat", "--promt", "hi"]) == ["--promt"]
    assert unknown_words(["chaos", "--", "everstep", "serve", "--prt", "1"]) == ["--prt"]
    assert unknown_words(["chatt"]) == ["chatt"]
    assert unknown_words(["bench", "offlin"]) == ["bench"]
    assert unknown_words(["bench", "serve", "--num-prompt", "3"]) == ["--num-prompt"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize(
    "name", ["cli.md", "config.md", "errors.md", "metrics.md", "rollouts-api.md"]
)
def test_the_reference_is_what_the_code_says(generate: ModuleType, name: str) -> None:
    file = ROOT / "docs" / "reference" / name
    made = generate.PAGES[name]()
    assert file.read_text(encoding="utf-8") == made, "stale: run python docs/generate.py"
    written = {path.name for path in file.parent.glob("*.md")}
    assert set(generate.PAGES) | {"bridge.md"} == written


def test_the_bridge_page_tells_every_field_of_every_message() -> None:
    text = (ROOT / "docs" / "reference" / "bridge.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    unions = (protocol.ToEngine, protocol.ToRank)
    unions += (weight_protocol.ToReceiver, weight_protocol.FromReceiver)
    kinds = [kind for union in unions for kind in get_args(union)]
    assert set(rows) == {kind.__struct_config__.tag for kind in kinds}
    for kind in kinds:
        told = re.findall(r"`(\w+)`", rows[kind.__struct_config__.tag])
        assert told == list(kind.__struct_fields__)
    assert f"Protocol {protocol.PROTOCOL_VERSION}." in text
    for struct in (protocol.TrajectoryGroup, protocol.Member):
        assert "{" + ", ".join(struct.__struct_fields__) + "}" in text


def test_every_setting_is_explained() -> None:
    text = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^## `\[([\w.]+)\]`\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    )
    for setting in settings_of(ServeConfig):
        section, _, name = setting.path.rpartition(".")
        assert f"| `{name}` |" in sections.get(section, text), setting.path
        assert f"`{setting.flag}`" in text, setting.path


def test_toml_examples_are_settings() -> None:
    trees = (ServeConfig, TrainConfig, RewardConfig)
    known = {s.path for tree in trees for s in settings_of(tree)}
    for page in PAGES:
        for language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "toml":
                assert set(_leaves(tomllib.loads(text))) <= known, page


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        path = prefix + key.replace("-", "_")
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path


def test_python_examples_are_python_and_import_what_exists() -> None:
    import everstep

    for page in PAGES:
        for language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                compile(text, str(page), "exec")
                for names in re.findall(r"^from everstep import (.+)$", text, re.MULTILINE):
                    assert set(names.split(", ")) <= set(everstep.__all__), page


def test_the_readme_has_two_commands_and_ci_runs_the_second() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = "pip install torch==2.13.0 && pip install . && everstep chat"
    second = "pip install torch==2.13.0 && pip install -e '.[dev]' && python -m pytest -n 2"
    assert f"```bash\n{first}\n```" in text
    assert f"```bash\n{second}\n```" in text
    steps = [line.replace(" -q", "") for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for part in second.split(" && "):
        assert any(step.startswith(part) for step in steps), part


def test_the_index_for_machines_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "llms.txt").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.suffix == ".md"}
    assert listed == pages
