"""One record per event: a dotted name, then fields. Text for people, JSON with EVERSTEP_LOG=json.

log.event("rollout.finished", rollout=id, tokens=812, reason="stop")
"""

import json
import logging
import sys
import time
from typing import Literal

_logger = logging.getLogger("everstep")
Level = Literal["debug", "info", "warning", "error"]
# libraries that speak of a server's faults: their lines are to look like ours
_OTHERS = ("uvicorn.error", "asyncio")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        tail = "".join(f" {key}={_word(value)}" for key, value in fields.items())
        line = f"{stamp} {record.levelname.lower():<7} {record.getMessage()}{tail}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        head = {
            "time": record.created,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.exc_info:
            head["traceback"] = self.formatException(record.exc_info)
        return json.dumps(head | fields, default=str)


def _word(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_word = text and text.isprintable() and " " not in text
    return text if is_word else json.dumps(text)


def setup(*, json_lines: bool = False, level: Level = "info") -> None:
    """Send events to standard error. Called once, by the command line and by a core's entry."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json_lines else _TextFormatter())
    _logger.handlers[:] = [handler]
    _logger.setLevel(_LEVELS[level])
    _logger.propagate = False
    for name in _OTHERS:
        other = logging.getLogger(name)
        other.handlers[:] = [handler]
        other.setLevel(logging.WARNING)
        other.propagate = False


def event(name: str, *, level: Level = "info", **fields: object) -> None:
    """Log one event. Without `setup` it goes nowhere below warning, as a library should."""
    _logger.log(_LEVELS[level], name, extra={"fields": fields})
