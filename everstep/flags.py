"""Flags of a command: every setting by its dotted path, and the dialects' names for them.

`with_settings` gives a command all of them, so that one parser knows every flag, `--help` shows
those that matter, and a misspelt one is answered with the nearest.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer

from .dialects import FOREIGN, RESPELLED, SWITCHES, SYNONYMS, Foreign, Switch
from .engine.errors import ConfigError
from .engine.rollout import SamplingParams
from .engine.settings import Assignment, Resolved, Setting, load, settings_of
from .environment import wants_batch_invariance
from .server.config import ServeConfig

# how `everstep --help` sorts the commands
MODELS, LEARNING, CHECKS, FOLDERS = "Use a model", "Train a model", "Check and mend", "Checkpoints"

_SECTIONS = {
    "engine.model": "Model",
    "engine.kv": "KV cache",
    "engine.batch": "Batching",
    "engine": "Engine",
    "http": "HTTP",
    "openai": "OpenAI face",
    "journal": "Journal",
    "restart": "Restarts",
}


_SAMPLING_HELP = {
    "temperature": "0 is greedy",
    "top_p": "smallest set of tokens with this probability",
    "top_k": "the k most probable tokens; 0 is no limit",
    "min_p": "tokens with at least this share of the best one's probability",
    "presence_penalty": "for tokens that the output has",
    "frequency_penalty": "for each time that the output has them",
    "repetition_penalty": "over prompt and output; 1 is off",
    "max_tokens": "output tokens at most; default: up to the end of the context",
    "min_tokens": "output tokens at least",
    "stop": "text that ends the output; repeat for more",
    "ignore_eos": "go on after the end-of-sequence token",
}

_SWITCH_NAMES = frozenset(switch.name for switch in SWITCHES)

Settings = Resolved[ServeConfig]
Command = Callable[..., None]


def with_settings(
    sections: Sequence[str],
    *,
    positional_model: bool = True,
    sampling: SamplingParams | None = None,
) -> Callable[[Command], Command]:
    """Give a command the flags of some sections of ServeConfig.

    The command's first parameter receives the resolved `Settings`; MODEL, --config and all flags
    are added to its own parameters. With `sampling` (the command's defaults) it also takes the
    sampling flags, and a parameter of that name.
    """
    chosen = [s for s in settings_of(ServeConfig) if _is_in(s.path, sections)]
    draws = (
        {} if sampling is None else {f"sampling_{s.path}": s for s in _sampling_settings(sampling)}
    )

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command).parameters.values())[1:]
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in own
            if parameter.name != "sampling"
        ]
        added = [*([_model_argument()] if positional_model else []), _config_option()]
        options = {
            f"setting_{i}_{j}": (setting, flag)
            for i, setting in enumerate(chosen)
            for j, flag in enumerate(_names(setting))
        }
        switches = {f"switch_{i}": s for i, s in enumerate(SWITCHES) if _is_in(s.path, sections)}
        foreign = {f"foreign_{i}": flag for i, flag in enumerate(FOREIGN)}
        parameters = [
            *added,
            *own,
            *(_sampling_option(name, s) for name, s in draws.items()),
            *(
                _value_option(name, s, flag, _panel(s.path), is_hidden=flag != _names(s)[0])
                for name, (s, flag) in options.items()
            ),
            *(_switch_option(name, switch) for name, switch in switches.items()),
            *(_foreign_option(name, flag) for name, flag in foreign.items()),
        ]

        def run(**given: Any) -> None:
            for name, flag in foreign.items():
                _meet(flag, given.pop(name))
            if wants_batch_invariance():
                note("VLLM_BATCH_INVARIANT", "always so here")
            assignments = [_assign(s, flag, given.pop(name)) for name, (s, flag) in options.items()]
            assignments += [
                Assignment(s.path, s.value, s.name)
                for name, s in switches.items()
                if given.pop(name)
            ]
            assignments.append(_positional(given.pop("model", None), assignments))
            found = [a for a in assignments if a is not None]
            settings = load(ServeConfig, file=given.pop("config"), assignments=found)
            if sampling is not None:
                drawn = [_drawn(s, given.pop(name)) for name, s in draws.items()]
                given["sampling"] = load(SamplingParams, assignments=drawn).config
            command(settings, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def note(flag: str, text: str) -> None:
    """One line about a flag that sets nothing."""
    typer.echo(f"note: {flag}: {text}", err=True)


def _meet(flag: Foreign, value: Any) -> None:
    """Say the note, or refuse."""
    if value is None or value is False:
        return
    name = flag.names[0]
    if flag.accepts is not None and str(value).lower() not in flag.accepts:
        shown = name if value is True else f"{name} {value}"
        accepted = f" (accepted: {', '.join(flag.accepts)})" if flag.accepts else ""
        raise ConfigError(f"{shown} cannot be honoured: {flag.reason}{accepted}")
    if flag.note:
        note(name, flag.note)


def _assign(setting: Setting, flag: str, value: Any) -> Assignment | None:
    if value is None or value == []:
        return None
    if isinstance(value, list):
        value = ",".join(value)
    value = RESPELLED.get((setting.path, value), value)
    if setting.path == "engine.batch.max_num_batched_tokens" and value == "-1":
        note(f"{flag} -1", "prefill is always chunked; the bits do not depend on it")
        return None
    if setting.path == "openai.chat_template":
        value = _template(value)
    return Assignment(setting.path, value, flag)


def _template(value: str) -> str:
    """The text of a template file; a name or a template itself stays."""
    if "{" in value or "\n" in value:
        return value
    file = Path(value).expanduser()
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if "/" in value or value.endswith(".jinja"):
        raise ConfigError(f"openai.chat_template: {value}: no such file (from --chat-template)")
    return value


def _positional(model: str | None, assignments: Sequence[Assignment | None]) -> Assignment | None:
    if model is None:
        return None
    for other in assignments:
        if other is not None and other.path == "engine.model.path" and other.value != model:
            raise ConfigError(f"two models: MODEL is {model!r}, {other.origin} is {other.value!r}")
    return Assignment("engine.model.path", model, "MODEL")


def _is_in(path: str, sections: Sequence[str]) -> bool:
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def _panel(path: str) -> str:
    while path:
        if path in _SECTIONS:
            return _SECTIONS[path]
        path = path.rpartition(".")[0]
    return "Engine"


def _parameter(name: str, info: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation
    )


def _model_argument() -> inspect.Parameter:
    info = typer.Argument(
        None,
        metavar="MODEL",
        help="A folder, a hub id, or `default`: the embedded model (made on first use).",
        show_default=False,
    )
    return _parameter("model", info, str | None)


def _config_option() -> inspect.Parameter:
    info = typer.Option(
        None,
        "--config",
        metavar="FILE",
        help="TOML file of settings; flags go over it.",
        show_default=False,
    )
    return _parameter("config", info, Path | None)


def _names(setting: Setting) -> tuple[str, ...]:
    """Every flag with a value that sets it; a switch of the same name goes before."""
    names = (*SYNONYMS.get(setting.path, ()), setting.flag)
    return tuple(name for name in names if name not in _SWITCH_NAMES)


def _value_option(
    name: str, setting: Setting, flag: str, panel: str, *, is_hidden: bool = False
) -> inspect.Parameter:
    """One flag with a value. The other names of a setting are hidden options of their own."""
    words = [setting.help or setting.path]
    if not setting.accepts.startswith(("a ", "text")):
        words.append(f"({setting.accepts})")
    if setting.default is not None and setting.default != ():
        words.append(f"(default: {_shown(setting.default)})")
    if flag != setting.flag and "." in setting.path:
        words.append(f"[dim]{setting.flag.removeprefix('--')}[/dim]")
    info = typer.Option(
        None,
        flag,
        metavar="N" if setting.accepts.startswith(("a whole", "a number")) else "VALUE",
        help=" ".join(words),
        rich_help_panel=panel,
        show_default=False,
        hidden=is_hidden,
    )
    return _parameter(name, info, list[str] | None if setting.is_list else str | None)


def _sampling_settings(defaults: SamplingParams) -> list[Setting]:
    return [
        msgspec.structs.replace(
            setting, default=getattr(defaults, setting.path), help=_SAMPLING_HELP[setting.path]
        )
        for setting in settings_of(SamplingParams)
        if setting.path in _SAMPLING_HELP
    ]


def _sampling_option(name: str, setting: Setting) -> inspect.Parameter:
    if isinstance(setting.default, bool):
        info = typer.Option(
            setting.default, setting.flag, help=setting.help, rich_help_panel="Sampling"
        )
        return _parameter(name, info, bool)
    return _value_option(name, setting, setting.flag, "Sampling")


def _drawn(setting: Setting, value: Any) -> Assignment:
    """What a line of sampling comes to: the flag, or the command's own default."""
    given = setting.default if value in (None, []) else value
    return Assignment(setting.path, given, setting.flag)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _switch_option(name: str, switch: Switch) -> inspect.Parameter:
    info = typer.Option(
        False,
        switch.name,
        help=switch.help,
        hidden=not switch.help,
        rich_help_panel=_panel(switch.path),
        show_default=False,
    )
    return _parameter(name, info, bool)


def _foreign_option(name: str, flag: Foreign) -> inspect.Parameter:
    info = typer.Option(
        None if flag.takes_value else False, *flag.names, hidden=True, show_default=False
    )
    return _parameter(name, info, str | None if flag.takes_value else bool)
