"""Settings: defaults < TOML file < flags → one frozen tree, and where each value came from.

A setting is a leaf of the tree and is named by its path, `engine.kv.block_size`. A fault names the
path, the value, what is accepted and where it was given.
"""

import contextlib
import difflib
import functools
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError

TreeT = TypeVar("TreeT", bound=Struct)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG])(?:i?[bB])?")
_UNITS = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


class Setting(Struct, frozen=True):
    """One leaf of a settings tree."""

    path: str
    type: Any
    default: Any
    help: str
    accepts: str
    """For people: `a whole number from 1 to 1024`."""

    @property
    def flag(self) -> str:
        """`--engine.kv.block-size`."""
        return "--" + self.path.replace("_", "-")

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(part) in (tuple, list) for part in _parts(self.type)[0])


class Assignment(Struct, frozen=True):
    """A value for a path; `origin` says who gave it."""

    path: str
    value: Any
    origin: str


class Resolved(Struct, Generic[TreeT], frozen=True):
    """The tree, and the origin of every leaf that is not a default."""

    config: TreeT
    origins: dict[str, str]

    def lines(self) -> list[tuple[str, str, str]]:
        """(path, value, origin) of every setting, for `doctor`."""
        found = []
        for setting in settings_of(type(self.config)):
            value: Any = self.config
            for name in setting.path.split("."):
                # of a section that is not there
                value = None if value is None else getattr(value, name)
            if setting.path.endswith("api_key") and value is not None:
                value = "(set)"
            text = msgspec.json.encode(value).decode()
            found.append((setting.path, text, self.origins.get(setting.path, "default")))
        return found


def settings_of(tree: type[Struct]) -> list[Setting]:
    """Every leaf, in order of declaration."""
    return list(_settings(tree))


@functools.cache
def _settings(tree: type[Struct]) -> tuple[Setting, ...]:
    return tuple(_walk(tree, ""))


def load(
    tree: type[TreeT], *, file: Path | None = None, assignments: Sequence[Assignment] = ()
) -> Resolved[TreeT]:
    """Put the sources together, later ones over earlier ones. Raises ConfigError, one line."""
    known = {setting.path: setting for setting in settings_of(tree)}
    given = [*(read_toml(file) if file is not None else ()), *assignments]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for assignment in given:
        setting = known.get(assignment.path)
        if setting is None:
            raise ConfigError(_unknown(assignment, known))
        values[setting.path] = _convert(setting, assignment)
        origins[setting.path] = assignment.origin
    return Resolved(msgspec.convert(_nest(values), tree), origins)


def read_toml(file: Path) -> list[Assignment]:
    """The leaves of a TOML file; `max-num-seqs` and `max_num_seqs` are the same name."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    return [Assignment(path, value, str(file)) for path, value in _leaves(data, "")]


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that looks most like it, if one does."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def _walk(tree: type[Struct], prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(tree, include_extras=True)
    for field in msgspec.structs.fields(tree):
        annotation = hints[field.name]
        path = prefix + field.name
        parts, metas, _ = _parts(annotation)
        if len(parts) == 1 and isinstance(parts[0], type) and issubclass(parts[0], Struct):
            # one that may be None is there once a setting of it is given
            yield from _walk(parts[0], f"{path}.")
            continue
        text = next((meta.description for meta in metas if meta.description), "")
        default = field.default
        if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        yield Setting(path, annotation, default, text, _accepts(annotation, parts, metas))


def _parts(annotation: Any) -> tuple[list[Any], list[Meta], bool]:
    """The alternatives of a type, the Meta anywhere in it, and whether None is one of them."""
    if annotation is type(None):
        return [], [], True
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        parts, metas, optional = _parts(annotation.__origin__)
        return (
            parts,
            [*(m for m in annotation.__metadata__ if isinstance(m, Meta)), *metas],
            optional,
        )
    if origin in (typing.Union, types.UnionType):
        found = [_parts(part) for part in typing.get_args(annotation)]
        return (
            [part for parts, _, _ in found for part in parts],
            [meta for _, metas, _ in found for meta in metas],
            any(optional for _, _, optional in found),
        )
    return [annotation], [], False


def _accepts(annotation: Any, parts: Sequence[Any], metas: Sequence[Meta]) -> str:
    words = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            words += [str(value) for value in typing.get_args(part)]
        elif part is bool:
            words += ["true", "false"]
        elif part in (int, float):
            kind = "a whole number" if part is int else "a number"
            words.append(kind + _range(metas))
        elif part is str:
            words.append("text")
        elif typing.get_origin(part) is dict:
            words.append("a table")
        else:
            words.append("a list (repeat the flag, or separate by commas)")
    if _parts(annotation)[2]:
        words.append("none")
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]


def _range(metas: Sequence[Meta]) -> str:
    """` from 0 to 1`, ` above 0, at most 1`, ` of at least 1`, ` above 0`, or nothing."""
    low = next((meta.ge for meta in metas if meta.ge is not None), None)
    above = next((meta.gt for meta in metas if meta.gt is not None), None)
    high = next((meta.le for meta in metas if meta.le is not None), None)
    if above is not None:
        return f" above {above}" + (f", at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else ""


def _convert(setting: Setting, assignment: Assignment) -> Any:
    value = assignment.value
    parts, _, optional = _parts(setting.type)
    if isinstance(value, str):
        if optional and value.lower() in ("none", "null"):
            return None
        if int in parts:
            value = _number(value)
        elif setting.is_list:
            value = [word for word in value.split(",") if word]
    with contextlib.suppress(msgspec.ValidationError):
        found = msgspec.convert(value, setting.type, strict=False)
        # an infinite rate, share or deadline is a mistake
        if not isinstance(found, float) or math.isfinite(found):
            return found
    raise ConfigError(
        f"{setting.path} must be {setting.accepts}, got {assignment.value!r} "
        f"(from {assignment.origin})"
    )


def _number(text: str) -> str | int:
    """`32k` is 32000, `32K` and `32KiB` are 32768, `4G` are 4 GiB; anything else stays as it is."""
    found = _SIZE.fullmatch(text.strip())
    return int(float(found[1]) * _UNITS[found[2]]) if found else text


def _unknown(assignment: Assignment, known: Mapping[str, Setting]) -> str:
    path = assignment.path
    # a name that exists, but in another section, says more than one that looks alike
    same = [p for p in known if p.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    near = (nearest(path, same) or same[0]) if same else nearest(path, list(known))
    hint = f"did you mean {near}?" if near else "`everstep doctor` lists all"
    return f"unknown setting {path} (from {assignment.origin}); {hint}"


def _leaves(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        path = prefix + key.replace("-", "_")
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
