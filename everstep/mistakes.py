"""What the parser could not take, in the words of every other error: the flag, what it accepts."""

import re
from collections.abc import Mapping
from typing import Any

from .engine.settings import nearest

_CHOICES = re.compile(r"is not one of (.+?)\.?$")


def explain(error: Exception, message: str) -> str:
    """One line for an error of the parser; its own message where nothing better is known.

    error  of typer's: a flag that there is none of, or a value that is not of its kind (then its
           cause has pydantic's list of what is wrong)
    """
    flag, known = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if flag is not None and known is not None:
        near = nearest(flag, known) if known else None
        return f"no such flag: {flag}" + (
            f"; did you mean {near}?" if near else " (--help lists them)"
        )
    names = getattr(getattr(error, "param", None), "opts", None) or []
    faults = getattr(error.__cause__, "errors", None)
    if not names or faults is None:
        return message
    fault = faults()[0]
    accepted = _accepted(fault)
    return f"{names[0]} must be {accepted}, got {fault['input']!r}" if accepted else message


def _accepted(fault: Mapping[str, Any]) -> str | None:
    bounds, kind = fault.get("ctx", {}), str(fault["type"])
    if kind.startswith("int_"):
        return "a whole number"
    if kind.startswith("float_"):
        return "a number"
    if "ge" in bounds:
        return f"at least {bounds['ge']:g}"
    if "le" in bounds:
        return f"at most {bounds['le']:g}"
    found = _CHOICES.search(str(fault["msg"]))
    if found is None:
        return None
    *others, last = re.findall(r"'([^']*)'", found[1])
    return f"{', '.join(others)} or {last}" if others else str(last)
