"""Write docs/reference/*.md from what the code says of itself; tests/test_docs.py compares.

python docs/generate.py          write the files
python docs/generate.py --check  exit with 1 if a file differs
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import typer

from everstep import cli, dialects
from everstep.engine.backend import Backend
from everstep.engine.errors import (
    CheckpointError,
    ConfigError,
    EverstepError,
    InvalidRequest,
    MissingExtra,
)
from everstep.engine.journal_memory import MemoryJournal
from everstep.engine.journal_thread import JournalThread
from everstep.engine.manager import RolloutManager
from everstep.engine.messages import Stats
from everstep.engine.metrics import Registry
from everstep.engine.rollout import SamplingParams
from everstep.server.config import ServeConfig
from everstep.server.http import BodyTooLarge
from everstep.server.operations import ALIASES, families
from everstep.server.stream import RolloutFailed
from everstep.settings import settings_of

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- made by docs/generate.py; change the code, then run it -->"
_NEVER_ON_THE_WIRE = (CheckpointError, ConfigError, MissingExtra)
_MARKUP = re.compile(r"\[/?(?:b|dim)\]")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [*lines, *("| " + " | ".join(row) + " |" for row in cells)]


def page(title: str, *parts: str | Sequence[str]) -> str:
    blocks = ["\n".join([part] if isinstance(part, str) else part) for part in parts]
    return "\n\n".join([f"# {title}", _NOTE, *blocks]) + "\n"


def code(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def config() -> str:
    """Every field of ServeConfig, by section, then the fields of SamplingParams."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for setting in settings_of(ServeConfig):
        section, _, name = setting.path.rpartition(".")
        flags = list(dict.fromkeys((*dialects.SYNONYMS.get(setting.path, ()), setting.flag)))
        row = (f"`{name}`", _default(setting.default), setting.accepts, setting.help, code(flags))
        sections.setdefault(section, []).append(row)
    blocks: list[Any] = []
    for section, rows in sections.items():
        blocks.append(f"## {f'`[{section}]`' if section else 'Top level'}")
        blocks.append(table(("field", "default", "accepts", "what", "flags"), rows))
    sampling = [
        (f"`{s.path}`", _default(s.default), s.accepts) for s in settings_of(SamplingParams)
    ]
    return page(
        "Settings",
        "Sources, later ones over earlier ones: the defaults, a TOML file (`--config FILE`), flags.\n"
        "In a file a setting stands in the section of its path, with `_` or `-`; as a flag it is "
        "`--` and its path.\n"
        "A number of bytes or tokens may end in `k`, `m`, `g` (powers of 1000) or `K`, `M`, `G` "
        "(powers of 1024).\n"
        "`everstep doctor` prints every setting, its value, and where the value came from.",
        ["```toml", "[engine.batch]", "max-num-seqs = 64", "", "[http]", "port = 30000", "```"],
        *blocks,
        "## Sampling",
        "Fields of `everstep.SamplingParams`, of a line of a batch, and of a request.\n"
        "Those that `everstep chat --help` lists are flags of `chat` and `batch` too.",
        table(("field", "default", "accepts"), sampling),
        "## Environment",
        table(
            ("variable", "what"),
            [
                (
                    "`EVERSTEP_CACHE`",
                    "folder of the converted default model and of built kernels; else "
                    "`$XDG_CACHE_HOME/everstep`, else `~/.cache/everstep`",
                ),
                ("`EVERSTEP_DEFAULT_WHEEL`", "the default model's wheel, where pip has no index"),
                ("`EVERSTEP_LOG`", "`json`: the server logs one JSON object per event"),
                ("`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`", "as for every user of the hub"),
            ],
        ),
    )


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value in ((), {}):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cli_page() -> str:
    """Every command with its own flags; those of settings are named by section."""
    group = cast(Any, typer.main.get_command(cli.app))
    blocks: list[Any] = []
    for name, command in leaves(group):
        blocks += _command(name, command)
    return page(
        "Command line",
        "`everstep COMMAND --help` shows the same, with all flags of the settings.\n"
        "The user's mistakes end in one line, `error: …`, and exit code 2; Ctrl-C ends in 130.",
        *blocks,
        "## Names of vLLM and SGLang",
        "Other names of a setting; the first column is the setting, the flags are equal.",
        table(
            ("setting", "flags"),
            [(f"`{path}`", code(names)) for path, names in dialects.SYNONYMS.items()]
            + [(f"`{s.path}` = `{s.value}`", code([s.name])) for s in dialects.SWITCHES],
        ),
        "Values that are spelt otherwise there:",
        table(
            ("setting", "theirs", "ours"),
            [(f"`{p}`", f"`{v}`", f"`{ours}`") for (p, v), ours in dialects.RESPELLED.items()],
        ),
        "Flags that set nothing here; another value than an accepted one is refused, exit code 2:",
        table(
            ("flags", "accepted", "why"),
            [(code(f.names), _accepted(f), f.note or f.reason) for f in dialects.FOREIGN],
        ),
    )


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, `bench offline` among them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _accepted(flag: dialects.Foreign) -> str:
    if flag.accepts is None:
        return "any value" if flag.takes_value else "yes"
    return code(flag.accepts) or "never"


def _command(name: str, command: Any) -> Iterator[str | list[str]]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [_argument(p) for p in arguments]
    paragraphs = [" ".join(p.split()) for p in (command.help or "").split("\n\n")]
    text = [p for p in paragraphs if not p.startswith("[dim]")]
    examples = [_MARKUP.sub("", p).split("   ")[0] for p in paragraphs if p.startswith("[dim]")]
    yield f"## {name}"
    yield ["```text", " ".join(["everstep", name, *words, "[OPTIONS]"]), "```"]
    yield "\n\n".join(_sentences(p) for p in text)
    yield ["```bash", *(_example(e) for e in examples), "```"]
    rows = [(f"`{_argument(p)}`", p.help or "") for p in arguments]
    panels: dict[str, list[str]] = {}
    for option in command.params:
        if option.param_type_name == "argument" or option.hidden:
            continue
        panel = option.rich_help_panel
        if panel is None:
            rows.append((_option(option), _help(option)))
        else:
            panels.setdefault(panel, []).append(option.opts[0])
    yield table(("own", "what"), rows)
    if panels:
        yield "Flags of settings, which [config.md](config.md) explains:"
        yield [f"- {panel}: {code(flags)}" for panel, flags in panels.items()]


def _help(option: Any) -> str:
    words = _MARKUP.sub("", option.help or "")
    default = option.default
    is_shown = isinstance(default, int | float | str) and not isinstance(default, bool)
    return f"{words} Default: `{default}`." if is_shown else words


def _example(text: str) -> str:
    """Without the remark that follows some."""
    return text.split("   ")[0].split(" exits with")[0]


def _sentences(paragraph: str) -> str:
    return re.sub(r"\. (?=[A-Z])", ".\n", _MARKUP.sub("", paragraph))


def _argument(parameter: Any) -> str:
    word = parameter.metavar or parameter.name.upper()
    return word if parameter.required else f"[{word}]"


def _option(option: Any) -> str:
    words = code([*option.opts, *option.secondary_opts])
    if getattr(option, "is_flag", False):
        return words
    return f"{words} {option.metavar or 'VALUE'}"


def metrics() -> str:
    """What /metrics shows, as the collector makes it from a core that reports zeros."""
    registry = Registry()
    JournalThread(MemoryJournal(), metrics=registry)
    manager = RolloutManager(cast(Backend, None), None, metrics=registry)
    zeros = {f: 0 for f in Stats.__struct_fields__ if not f.startswith("kv_")}
    manager._core.stats = Stats(**cast(Any, zeros))
    found = families(manager)
    others: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        others.setdefault(name, []).append(alias)
    rows = []
    for name, family in found.items():
        kind = "histogram" if family.histogram else "counter" if family.is_counter else "gauge"
        suffix = "_total" if kind == "counter" else ""
        aliases = code([alias + suffix for alias in others.get(name, [])])
        rows.append((f"`{name}{suffix}`", kind, code(family.labels), family.help, aliases))
    return page(
        "Metrics",
        "`GET /metrics` answers in the text format of Prometheus, without a key.\n"
        "Until the core has reported once, only the metrics of the front are there.\n"
        "The names of vLLM and SGLang are served beside ours with the label `model_name`, so that "
        "dashboards find what they ask for.",
        table(("name", "kind", "labels", "what", "also as"), rows),
    )


def errors() -> str:
    """The tree of errors, with what a client and a shell see of each."""
    rows = []
    for depth, kind in _tree(EverstepError, 0):
        words = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        status = "-" if kind in _NEVER_ON_THE_WIRE else str(kind.status)
        name = "· " * depth + f"`{kind.__name__}`"
        rows.append((name, status, f"`{kind.code}`", "yes" if kind.retryable else "no", words))
    return page(
        "Errors",
        "A message is one line: the field, the value, what is accepted.\n"
        "On the command line every error below ends in `error: MESSAGE` on standard error and exit "
        "code 2.\n"
        "`/v1` answers in OpenAI's form, and repeats the request's `x-request-id` or makes one:",
        [
            "```json",
            '{"error": {"message": "…", "type": "invalid_request_error", '
            '"param": "temperature", "code": "invalid_request_error"}}',
            "```",
        ],
        "`param` is the field of an "
        f"`{InvalidRequest.__name__}`.\n"
        "429 and 503 carry `Retry-After` and `retry-after-ms`.\n"
        "A rollout that fails after its stream began ends the stream with an event that holds the "
        "same object.",
        table(("error", "HTTP", "code", "retry", "when"), rows),
        "Beside these: 401 `invalid_api_key` without the key of `--api-key`; 404 and 405 for routes "
        "and methods that do not exist; 500 `internal_error` for a fault of ours, which the "
        "server's log explains.",
        "## Exit codes",
        table(
            ("code", "when"),
            [
                ("0", "done"),
                (
                    "1",
                    "done, with a bad result: `batch` has error records, `verify` or "
                    "`doctor --determinism` found a difference; or the reader of a pipe went away",
                ),
                ("2", "the user can mend it: one line, `error: …`"),
                ("130", "interrupted by Ctrl-C"),
            ],
        ),
    )


def _tree(kind: type[EverstepError], depth: int) -> Iterator[tuple[int, type[EverstepError]]]:
    yield depth, kind
    # by module, for tests may define errors of their own
    homes = {EverstepError.__module__, BodyTooLarge.__module__, RolloutFailed.__module__}
    children = [child for child in kind.__subclasses__() if child.__module__ in homes]
    for child in sorted(children, key=lambda c: (c.__module__, c.status, c.__name__)):
        yield from _tree(child, depth + 1)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "config.md": config,
    "errors.md": errors,
    "metrics.md": metrics,
}


def main(arguments: Sequence[str]) -> int:
    REFERENCE.mkdir(exist_ok=True)
    stale = 0
    for name, make in PAGES.items():
        file, text = REFERENCE / name, make()
        if "--check" in arguments:
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                sys.stderr.write(f"docs/reference/{name} is stale: python docs/generate.py\n")
                stale = 1
        else:
            file.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
