"""The protocol between a manager and whatever generates: a core, or a fake in tests."""

from collections.abc import Sequence
from typing import Protocol

from .checkpoint.manifest import Version
from .messages import FromCore, Ready, ToCore


class Backend(Protocol):
    """Carries messages to one core and back, in order. Used from one asyncio loop."""

    async def start(self, weights: Version | None = None, /) -> Ready:
        """Start the core and wait until it takes work.

        weights  those that it is to serve; None: the model that the backend was made with

        Calls `on_loading` (given to the constructor) for each `Loading`.
        Raises CheckpointError, ConfigError or EngineDied with the core's own message.
        """
        ...

    def send(self, messages: Sequence[ToCore]) -> None:
        """Queue messages for the core; never blocks."""
        ...

    async def receive(self) -> list[FromCore]:
        """The next messages of the core, at least one. `Died` is the last that ever comes."""
        ...

    async def close(self) -> None:
        """End the core (politely, then not) and free what it held. Idempotent."""
        ...
