"""Write docs/reference/*.md from what the code says of itself; tests/test_docs.py compares.

python docs/generate.py          write the files
python docs/generate.py --check  exit with 1 if a file differs
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import typer
from msgspec import NODEFAULT, UNSET, Struct, structs

from everstep import cli, dialects
from everstep.engine.backend import Backend
from everstep.engine.errors import (
    CheckpointError,
    ConfigError,
    EverstepError,
    InvalidRequest,
    MissingExtra,
)
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Stats
from everstep.engine.metrics import Registry
from everstep.engine.rollout import SamplingParams
from everstep.engine.settings import settings_of
from everstep.server.batches.batch_queue import UnknownBatch
from everstep.server.batches.file_store import FilesUnusable, UnknownFile
from everstep.server.config import ServeConfig
from everstep.server.decoding import accepted
from everstep.server.http import BodyTooLarge
from everstep.server.idempotency import MAX_KEY_CHARS
from everstep.server.media import UnsupportedMedia
from everstep.server.operations import ALIASES, families
from everstep.server.rollouts import wire
from everstep.server.rollouts.requests import MAX_WAIT_S
from everstep.server.stream import RolloutFailed
from everstep.trainer_bridge.trainer.config import TrainConfig
from everstep.trainer_bridge.trajectories.files import Line, Words

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
                (
                    "`EVERSTEP_BASE_URL`, `EVERSTEP_API_KEY`",
                    "where `Client` and `AsyncClient` find the server; else `OPENAI_BASE_URL` "
                    "with `OPENAI_API_KEY`, else port 8000 of this machine",
                ),
                ("`EVERSTEP_LOG`", "`json`: the server logs one JSON object per event"),
                ("`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`", "as for every user of the hub"),
            ],
        ),
    )


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value in ((), {}, ""):
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
        if not hasattr(command, "commands") or command.invoke_without_command:
            yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")


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
    shown = (
        EverstepError,
        BodyTooLarge,
        FilesUnusable,
        RolloutFailed,
        UnknownBatch,
        UnknownFile,
        UnsupportedMedia,
    )
    homes = {one.__module__ for one in shown}
    children = [child for child in kind.__subclasses__() if child.__module__ in homes]
    for child in sorted(children, key=lambda c: (c.__module__, c.status, c.__name__)):
        yield from _tree(child, depth + 1)


_CALLS = [
    ("`POST /rollouts`", "`SubmitRequest`", "202 `Submitted`", "key"),
    ("`POST /rollouts/submit`", "`SubmitManyRequest`", "202 `SubmittedMany`", "of each"),
    ("`POST /rollouts/get`", "`GetManyRequest`; `wait` (seconds)", "`RolloutsAnswer`", ""),
    ("`GET /rollouts`", "`state`, `group`, `pool`, `cursor`, `limit`", "`RolloutList`", ""),
    ("`GET /rollouts/{id}`", "`wait` (seconds), `after` (tokens)", "the rollout", ""),
    ("`GET /rollouts/{id}/stream`", "`after` (tokens)", "events of `StreamEvent`", ""),
    ("`POST /rollouts/{id}/pause` `resume` `cancel` `ack`", "nothing", "`Done`", ""),
    ("`POST /rollouts/pause` `resume` `cancel` `ack`", "`Selection`", "`Done`", ""),
    ("`POST /rollouts/{id}/fork`", "`ForkRequest`", "202 `Submitted`", "key"),
    ("`GET` or `POST /rollouts/{id}/export`", "nothing", "the rollout, sealed", ""),
    ("`POST /rollouts/import`", "an export; `allow_other_weights`", "202 `Submitted`", "key"),
    ("`POST /rollouts/budget`", "`BudgetRequest`", "202 `Budget`", "key"),
    ("`GET /rollouts/budget`", "`pool`", "`BudgetList`", ""),
    ("`GET /rollouts/budget/{id}`", "`wait` (seconds)", "`Budget`", ""),
    ("`POST /rollouts/budget/{id}/close`", "nothing", "`Budget`", ""),
]


def rollouts_api() -> str:
    """The routes of /rollouts, and every field of their structs as their source explains it."""
    requests: tuple[str, ...] = ("SubmitRequest", "Sampling", "SubmitManyRequest")
    requests += ("GetManyRequest", "ForkRequest", "Selection", "BudgetRequest")
    answers: tuple[str, ...] = ("Submitted", "SubmittedMany", "Outcome", "Done", "RolloutAnswer")
    answers += ("RolloutUsage", "RolloutsAnswer", "StreamEvent")
    blocks: list[Any] = []
    lists = ("RolloutList", "RolloutSummary", "BudgetList", "Budget")
    for name in (*requests, *answers, *lists):
        kind = getattr(wire, name)
        blocks += [f"## {name}", _paragraph(kind), _fields(kind, is_request=name in requests)]
    return page(
        "Rollouts over HTTP",
        "Durable generations by id; [the how-to](../howto/rollouts.md) shows them at work.\n"
        "`everstep serve --api-key` protects `/rollouts` as it does `/v1`.",
        table(("call", "takes", "gives", "Idempotency-Key"), _CALLS),
        "## Bodies and answers",
        "A body is JSON, or msgpack with `Content-Type: application/msgpack`; another type is 415.\n"
        "Answers follow `Accept`: `application/json` (the default) or `application/msgpack`; "
        "neither is 406.\n"
        "As msgpack a rollout is a `Trajectory` of `everstep.engine.trajectory`, whose per-token "
        "columns are little-endian bytes (int32 ids, float32 logprobs, uint8 flags, routing as it "
        "was recorded); as JSON it is the `RolloutAnswer` below.\n"
        "An export is `application/octet-stream` by default, a sealed `Trajectory` that knows when "
        "it was cut or altered; `Accept` gives it as msgpack or JSON, and import takes all three.\n"
        "No logprob is ever null or NaN: an alternative of probability 0 stands at -9999.0 in JSON, "
        "and only the first token of a prompt, which nothing precedes, has none.\n"
        "A field or a query that is not known is 400, and the message names the nearest one.\n"
        "A field that is null is absent. Errors have the shape of "
        "[every error](errors.md), always as JSON.",
        "## Long polls and streams",
        f"`wait` is at most {MAX_WAIT_S:g} s, a longer one answers then with what there is. With "
        "`after` it answers as soon as there are more tokens than that, without it once the rollout "
        "has ended; of a budget, once it is spent or closed.\n"
        "A stream begins with a `retry:` line, sends a comment every `http.heartbeat_s` while "
        "nothing comes, and ends with the event that has a `finish_reason`.\n"
        "The `id:` of an event is the number of output tokens up to its end: with it as `after`, or "
        "as the header `Last-Event-ID`, the stream goes on behind it, and no token comes twice.\n"
        "An event named `error` holds an error of the server; the rollout itself may go on.\n"
        "Readers that leave end nothing.",
        "## Idempotency-Key",
        f"1 to {MAX_KEY_CHARS} printable ASCII characters, on every call that makes rollouts or opens a budget, and on "
        "`/v1/completions` and `/v1/chat/completions`, whose rollouts are durable then.\n"
        "A key belongs to the API key that sent it and to the route, and is kept for "
        "`journal.retain_keys_s`.\n"
        "The same request again gives the same rollouts, or the same answer, with the header "
        "`idempotent-replayed: true`; whether it is streamed does not matter.\n"
        "Another body is 409 `idempotency_key_reused`.",
        "## States",
        "A named rollout that is not there is 404, one whose state does not allow the call is 409 "
        "`illegal_state`; then nothing was done, to none of those that were named.\n"
        "Pause, cancel and ack of what is paused, has ended, was acknowledged already is fine.\n"
        "Import of what is cut, altered or no rollout is 400 `invalid_trajectory`; of another model, "
        "vocabulary or weights, or of an id that is known here, 409 `conflict`.\n"
        "From its first budget on a pool grows under an open one only: what of it waits is `paused`, "
        "and `waits_for` says `budget`.\n"
        "Under one with `places` at most so many of its rollouts run at once, the first that came; "
        "the others stand by, `paused` likewise.\n"
        "A pool has one open budget at a time, a second one is 409 `conflict`. `used` counts tokens "
        "that are journaled: it is never more than `tokens`, and as many once the state is `spent`.\n"
        "A closed budget counts what was in flight; to close what has ended is fine.\n"
        "A journal without room refuses what is new with 503 `journal_full` and `Retry-After`; "
        "nothing that it holds is lost.",
        *blocks,
    )


def _fields(kind: type[Struct], *, is_request: bool) -> list[str]:
    docs, words = _field_docs(kind), accepted(kind)
    rows = []
    for field in structs.fields(kind):
        row = [f"`{field.name}`", words[field.name], docs.get(field.name, "")]
        if is_request:
            row.insert(2, "required" if field.required else _struct_default(field))
        elif field.default is UNSET:
            row[1] += ", or absent"
        rows.append(row)
    default = ("default",) if is_request else ()
    return table(("field", "value", *default, "what"), rows)


def _struct_default(field: structs.FieldInfo) -> str:
    if field.default is NODEFAULT:
        return "empty"
    return "its defaults" if isinstance(field.default, Struct) else _default(field.default)


def _field_docs(kind: type[Struct]) -> dict[str, str]:
    """The string below a field in the source of its class, bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(Struct)]):
        [node] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for line, following in pairwise(node.body):
            match line, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _paragraph(kind: type[Struct]) -> str:
    return _sentences(" ".join((kind.__doc__ or "").split()))


def training() -> str:
    """Every field of TrainConfig, by section."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for setting in settings_of(TrainConfig):
        section, _, name = setting.path.rpartition(".")
        row = (f"`{name}`", _default(setting.default), setting.accepts, setting.help)
        sections.setdefault(section, []).append(row)
    blocks: list[Any] = []
    for section, rows in sections.items():
        blocks.append(f"## {f'`[{section}]`' if section else 'Top level'}")
        blocks.append(table(("field", "default", "accepts", "what"), rows))
    return page(
        "Settings of a training run",
        "The TOML file of `everstep train` and of `everstep.trainer_bridge.fsdp_trainer`; "
        "`--set NAME=VALUE` of the former stands above it.",
        ["```toml", *_TRAIN_EXAMPLE, "```"],
        *blocks,
        "## Lines of a source",
        "A line is a JSON object, or a row of Parquet (`pip install 'everstep[parquet]'`); fields "
        "that are not named here are not looked at.",
        _fields(Line, is_request=True),
        "A file `*.evst` (`everstep journal export --format trajectory`) is one response, whose "
        "reward is `reward` in its metadata; with `record: [routing]` its routes can be replayed.",
        "With a table `[reward]` the trainer scores lines that have no `reward`, or all of them with "
        "`source.rescore`; of those it reads",
        _fields(Words, is_request=True),
        *_metrics_file(),
    )


def _metrics_file() -> list[Any]:
    """What a line of metrics.jsonl holds: names that a trainer really gives, or KeyError."""
    from everstep.trainer_bridge.losses.metrics import ALIASES, GROUPS, NAMES
    from everstep.trainer_bridge.trainer.trainer import Report

    fields = [(f"`{name}`", _REPORT[name]) for name in Report.__struct_fields__]
    told = {name for names, _ in _LOSS_METRICS for name in names}
    if told != set(NAMES):
        raise KeyError(f"metrics told and given differ: {sorted(told ^ set(NAMES))}")
    rows = []
    for names, what in _LOSS_METRICS:
        others = (other for name in names for other in ALIASES.get(name, ()))
        shown = (", ".join(f"`{name}`" for name in found) for found in (names, others))
        rows.append((next(shown), what, next(shown)))
    return [
        "## metrics.jsonl",
        "The output folder has a line per iteration, over all ranks; after a kill it goes on without "
        "a gap or a line twice.",
        table(("field", "what"), fields),
        "`metrics` has the names below (empty for objective sft), over all response tokens, and "
        f"with {', '.join(f'`{group}`' for group in GROUPS[1:])} behind a name over those whose "
        "weights were so many versions old. With Δ = lp_old − lp_infer, p and q the two "
        "probabilities and w the weight of a token; a value of no tokens is left out. The last "
        "column is what others call it; [IcePop](../explain/icepop.md#metrics) says what is usual.",
        table(("name", "what", "elsewhere"), rows),
    ]


_REPORT = {
    "version": "of the weights that the iteration made",
    "loss": "of its updates, their mean",
    "lr": "learning rate of the first update",
    "grad_norm": "of each update, before clipping",
    "samples": "responses in the batch, those of no tokens too",
    "tokens": "of their responses that count",
    "rows": "tokens that went through the layers, forward and backward",
    "groups": "in the batch",
    "trained_groups": "groups that taught something; the others stand in denominators alone",
    "reward": "mean over responses that have one; null: none has",
    "reward_std": "of the same rewards",
    "length_max": "tokens of the longest response",
    "seconds": "that scoring and updates took on the first rank",
    "spent": "seconds by part: `wait` for groups, `score` of old and reference logprobs, `train`, "
    "`publish` for engines, `save` of the checkpoint before, if there was one",
    "time_s": "Unix time at its end",
    "metrics": "see below",
}
_LOSS_METRICS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("mask_fraction",), "share of tokens that the correction masked"),
    (("mask_fraction_low", "mask_fraction_high"), "by k too low, too high"),
    (("mask_fraction_gate",), "dropped with their sequence, by a gate"),
    (("mask_fraction_positive", "mask_fraction_negative"), "of tokens with such an advantage"),
    (("log_ratio_abs_mean", "log_ratio_abs_std", "log_ratio_abs_max"), "of abs(Δ)"),
    (("log_ratio_abs_p99",), "99 of 100 tokens are below it, to 9 %"),
    (("kl_k1",), "mean of −Δ, an estimate of KL(π_infer ‖ π_train)"),
    (("kl_k2",), "mean of Δ²/2, another"),
    (("kl_k3",), "mean of e^Δ − 1 − Δ, the one that alarms look at"),
    (("prob_diff_mean", "prob_diff_max"), "of abs(p − q)"),
    (("exp_log_ratio_abs",), "mean of e^abs(Δ): NVIDIA's rule is below 1.03 to 1.05"),
    (("ratio_beyond_2", "ratio_beyond_5"), "share of tokens with abs(Δ) above log 2, log 5"),
    (("ess",), "effective sample size, (Σw)² / (n Σw²)"),
    (("clip_fraction",), "share of tokens where PPO's clip binds"),
    (
        ("proximal_fraction",),
        "under the old policy `exact`, share of tokens whose weights are gone: theirs is proximal",
    ),
    (("entropy", "entropy_masked"), "mean over all tokens, over those that were masked"),
    (("sequences_masked_any", "sequences_masked_all"), "share of sequences with some, all masked"),
    (
        tuple(f"ratio_geometric_{name}" for name in ("min", "p01", "p50", "p99", "max")),
        "of e^mean(Δ) of each sequence",
    ),
    (("lag_mean", "lag_max"), "versions behind"),
    (("mixed_version_sequences",), "share of sequences that several versions sampled"),
    (("kl_reference",), "k3 against the reference model, where there is one"),
    (("invalid",), "tokens with a logprob that is not finite"),
    (("tokens", "sequences"), "how many"),
)


_TRAIN_EXAMPLE = (
    'model = "./Ring-mini-2.0"',
    'output = "./run"',
    "",
    "[source]",
    'path = "./rollouts.jsonl"',
    "",
    "[batch]",
    "groups = 32",
)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "config.md": config,
    "errors.md": errors,
    "metrics.md": metrics,
    "rollouts-api.md": rollouts_api,
    "training.md": training,
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
