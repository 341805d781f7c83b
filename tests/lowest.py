"""The lowest versions that pyproject.toml allows, as constraints for pip: `python tests/lowest.py`."""

import re
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# a lower bound and nothing else: an upper one would be a guess about the future
_FORM = re.compile(r"(?P<name>[\w.-]+)(\[\w+\])?>=(?P<version>[\d.]+)(; sys_platform != 'win32')?")


def requirements() -> dict[str, dict[str, str]]:
    """Extra ("" for what is always needed) → distribution → lower bound."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: dict(map(_parse, lines)) for extra, lines in groups.items()}


def constraints(*extras: str) -> list[str]:
    """`name==bound` of the dependencies and these extras."""
    found = requirements()
    merged = {name: version for extra in ("", *extras) for name, version in found[extra].items()}
    return [f"{name}=={version}" for name, version in merged.items()]


def _parse(line: str) -> tuple[str, str]:
    match = _FORM.fullmatch(line)
    assert match is not None, f"pyproject.toml: {line!r} is no plain lower bound"
    return match["name"], match["version"]


if __name__ == "__main__":
    print(*constraints("train", "parquet", "bench", "dev"), sep="\n")
