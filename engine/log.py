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
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        tail = "".join(f" {key}={_word(value)}" for key, value in fields.items())
        return f"{stamp} {record.levelname.lower():<7} {record.getMessage()}{tail}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        head = {
            "time": record.created,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        return json.dumps(head | fields, default=str)


def _word(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if " " in text or not text else text


def setup(*, json_lines: bool = False, level: Level = "info") -> None:
    """Send events to standard error. Called once, by the command line and by a core's entry."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json_lines else _TextFormatter())
    _logger.handlers[:] = [handler]
    _logger.setLevel(_LEVELS[level])
    _logger.propagate = False


def event(name: str, *, level: Level = "info", **fields: object) -> None:
    """Log one event. Without `setup` it goes nowhere below warning, as a library should."""
    _logger.log(_LEVELS[level], name, extra={"fields": fields})
