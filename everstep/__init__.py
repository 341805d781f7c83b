"""Everstep: an exact, durable rollout engine for mixture-of-experts thinking models.

Importing this package costs a few milliseconds and pulls in no third-party module;
the public names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clients.async_client import AsyncClient
    from .clients.client import Client
    from .clients.llm import LLM
    from .engine.rollout import Rollout, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "Rollout", "SamplingParams", "__version__"]

_HOME = {
    "AsyncClient": ".clients.async_client",
    "Client": ".clients.client",
    "LLM": ".clients.llm",
    "Rollout": ".engine.rollout",
    "SamplingParams": ".engine.rollout",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home module and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value
