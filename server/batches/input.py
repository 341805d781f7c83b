"""A batch's input before it runs, and its records when it is done."""

from collections.abc import Iterator
from pathlib import Path

from ...engine.errors import EverstepError, InvalidRequest
from .lines import explicit_id
from .output import IdSet, decode_record
from .run import Line, read_lines
from .wire import BatchError

MAX_ERRORS = 100


def check_lines(source: Path, endpoint: str) -> tuple[int, list[BatchError]]:
    """Number of lines, and what makes the file no batch for this endpoint (at most 100 things)."""
    errors: list[BatchError] = []
    seen, total = IdSet(), 0
    with open(source, "rb", buffering=1 << 20) as lines:
        for line in read_lines(lines):
            if line.is_blank:
                continue
            total += 1
            try:
                _check_line(line, endpoint, seen)
            except InvalidRequest as error:
                errors.append(error_of(error, line.number))
            if len(errors) == MAX_ERRORS:
                break
    if not total:
        errors.append(BatchError(code="empty_file", message="the input file has no lines"))
    return total, errors


def _check_line(read: Line, endpoint: str, seen: IdSet) -> None:
    line = read.parse()
    custom_id = explicit_id(line)
    if custom_id is None or "body" not in line:
        raise InvalidRequest("a line must have custom_id, method, url and body", field="custom_id")
    if line.get("method") != "POST":
        raise InvalidRequest(f"method must be POST, got {line.get('method')!r}", field="method")
    if line.get("url") != endpoint:
        raise InvalidRequest(
            f"url must be the batch's endpoint {endpoint}, got {line.get('url')!r}", field="url"
        )
    if not seen.add(custom_id):
        raise InvalidRequest(
            f"custom_id {custom_id!r} is that of an earlier line", field="custom_id"
        )


def select(records: Path, *, wants_errors: bool) -> Iterator[bytes]:
    """Lines of a file of records: those with an error, or the others."""
    with open(records, "rb", buffering=1 << 20) as lines:
        for line in lines:
            if (decode_record(line).error is not None) == wants_errors:
                yield line


def error_of(error: Exception, line: int | None = None) -> BatchError:
    code = error.code if isinstance(error, EverstepError) else "internal_error"
    message = str(error) if isinstance(error, EverstepError) else "internal error; see the log"
    field = error.field if isinstance(error, InvalidRequest) else None
    return BatchError(code=code, message=message, param=field, line=line)
