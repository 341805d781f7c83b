"""A line of the log is one event, whoever speaks and whatever a value holds."""

import json
import logging

import pytest

from everstep.engine import log


@pytest.fixture
def loggers():
    """What `setup` changes, as it was."""
    found = [logging.getLogger(name) for name in ("everstep", "uvicorn.error", "asyncio")]
    kept = [(one, one.handlers[:], one.level, one.propagate) for one in found]
    yield
    for one, handlers, level, propagate in kept:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def test_every_line_is_json_where_that_is_asked_for(loggers, capsys):
    log.setup(json_lines=True)
    log.event("request.failed", path="/a b\n{", count=3)
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["path"], first["count"]) == ("request.failed", "/a b\n{", 3)
    assert (second["event"], second["level"]) == ("Invalid HTTP request received.", "warning")
    assert "ValueError: bad\nvalue" in third["traceback"]


def test_a_value_cannot_begin_a_line_of_its_own(loggers, capsys):
    log.setup()
    log.event("request.failed", path="/a\n00:00:00\terror\tforged", empty="", plain="abc", rate=0.5)
    logging.getLogger("uvicorn.error").info("that much nobody asked for")
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith('path="/a\\n00:00:00\\terror\\tforged" empty="" plain=abc rate=0.5')
