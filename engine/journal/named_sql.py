"""Queries by name, from .sql files beside the code: `-- name: add-rollout` begins one."""

import re
from pathlib import Path

_NAME = re.compile(r"^-- name: ([a-z][a-z-]*)$", re.MULTILINE)


def load(path: Path) -> dict[str, str]:
    """Name → SQL. Raises ValueError where a name stands twice or text comes before the first."""
    head, *parts = _NAME.split(path.read_text(encoding="utf-8"))
    if any(line and not line.startswith("--") for line in head.splitlines()):
        raise ValueError(f"{path.name}: SQL before the first name")
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name}: a name stands twice")
    return {name: body.strip() for name, body in zip(names, bodies, strict=True)}
