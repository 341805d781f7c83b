"""Rows of a Parquet file (`everstep rollout --out x.parquet`) as the JSON lines that they were."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ...engine.errors import ConfigError, MissingExtra

_ROWS = 256


def json_rows(file: Path, columns: Collection[str]) -> Iterator[bytes]:
    """Each row as JSON, of the columns that are there of those that are named.

    Raises ConfigError for what is no Parquet, MissingExtra without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading {file}") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            there = [name for name in table.schema_arrow.names if name in columns]
            for batch in table.iter_batches(_ROWS, columns=there):
                for row in batch.to_pylist():
                    yield msgspec.json.encode(_plain(row))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(
            f"{file} is no Parquet file: {str(error).partition(chr(10))[0]}"
        ) from None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without what a line would leave out; runs as lists, and free JSON as what it says."""
    found = {name: value for name, value in row.items() if value is not None}
    if isinstance(found.get("metadata"), str):
        # somebody else's column may be text
        with contextlib.suppress(msgspec.DecodeError):
            found["metadata"] = msgspec.json.decode(found["metadata"])
    runs = found.get("versions", [])
    found["versions"] = [list(run.values()) if isinstance(run, dict) else run for run in runs]
    return found
