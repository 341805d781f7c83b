"""The JSON files of a model folder, and typed access to their keys."""

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_MISSING = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {path.name}"
        raise CheckpointError(f"{path.parent} is not a model folder: {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {_json_type(data)}; a JSON object is accepted")
    return data


def encode_json(data: dict[str, Any]) -> bytes:
    """As a file of a model folder has it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_bytes(encode_json(data))


class Keys:
    """Typed access to a JSON object; a wrong type or range is a CheckpointError naming the key."""

    def __init__(self, data: dict[str, Any], where: str = "config.json") -> None:
        self.data = data
        self.where = where
        self.defaults_used: list[str] = []

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.data.get(key) is not None

    def wrong(self, key: str, accepted: str) -> CheckpointError:
        value = json.dumps(self.data.get(key))
        shown = value if len(value) <= 80 else value[:77] + "..."
        return CheckpointError(f"{self.where}: {key} is {shown}; accepted: {accepted}")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.data:
            if default is _MISSING:
                raise CheckpointError(f"{self.where}: {key} is missing")
            self.defaults_used.append(key)
            return default
        return self.data[key]

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 1, null: Any = None) -> int:
        """An integer ≥ low; `null` is what JSON null means, if it means anything."""
        value = self._get(key, default)
        if value is None and null is not None:
            value = null
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.wrong(key, f"an integer >= {low}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, low: float = 0.0) -> float:
        """A finite number, > 0 and ≥ low."""
        value = self._get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        # the upper end also keeps integers that no float holds out
        if not good or not 0 < value <= sys.float_info.max or value < low:
            raise self.wrong(key, f"a finite number >= {low:g}" if low else "a finite number > 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def section(self, key: str) -> "Keys | None":
        """The object under a key, or None if missing or null."""
        if not self.has(key):
            return None
        if not isinstance(self.data[key], dict):
            raise self.wrong(key, "an object or null")
        return Keys(self.data[key], f"{self.where}: {key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; missing or null is empty."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings or null")
        return tuple(value)

    def only(self, key: str, *accepted: Any) -> None:
        """The key, if present and not null, must hold one of these values."""
        value = self.data.get(key)
        # `1 == True` and `0 == False` in Python, not in JSON
        if value is not None and not any(
            value == item and type(value) is type(item) for item in accepted
        ):
            raise self.wrong(key, " or ".join(json.dumps(item) for item in accepted))


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
