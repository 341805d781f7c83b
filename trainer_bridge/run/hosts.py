"""A version of the weights on every engine of a run, or on none.

    stage   everywhere; a refusal anywhere gives up what was staged, and nothing changes
    flip    everywhere; an engine that is killed in between is behind, and catches up later

All of it may be asked for again, after any kill: an engine that serves the version already says so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import Struct

from ...engine.checkpoint.manifest import Version
from ...engine.errors import EngineUnavailable, EverstepError
from ...engine.messages import Flipped, KVPolicy, StageReport

OnStaged = Callable[[], Awaitable[None]]


class Prepared(Struct, frozen=True):
    """A version that an engine has checked and can flip to. is_back: by a rollback."""

    report: StageReport
    is_back: bool


class Host(Protocol):
    """An engine that serves versions. Every call may raise EngineUnavailable."""

    name: str

    async def serves(self, version: Version) -> bool:
        """Whether it serves exactly this version now."""
        ...

    async def stage(self, version: Version) -> Prepared:
        """Load and check it. A trainer that began a new life, from a checkpoint, names a new
        lineage: then it is prepared as what is gone back to, by its name.

        Raises WeightsRefused, CheckpointError; what serves goes on serving.
        """
        ...

    async def flip(self, version: Version, kv: KVPolicy) -> Flipped:
        """Serve what was staged. An engine that has lost it since stages it again, and raises as
        `stage` does."""
        ...

    async def unstage(self) -> None:
        """Give up what is staged."""
        ...


class Served(Struct, frozen=True):
    """What came of a version.

    note  a line for people; "": every engine served it already
    away  engine → why it did not answer: it is behind the others
    """

    note: str
    away: dict[str, str]


async def serve(
    hosts: Sequence[Host], version: Version, kv: KVPolicy, on_staged: OnStaged | None = None
) -> Served:
    """Have every engine serve it from now on, or none.

    on_staged  done when all have staged it, before the first flips

    Raises WeightsRefused or CheckpointError, naming the engine, and then nothing has changed;
    EngineUnavailable where no engine answers.
    """
    away: dict[str, str] = {}
    behind = [host for host, yes in await _ask(hosts, away, version) if not yes]
    staged: list[tuple[Host, Prepared]] = []
    refused: tuple[Host, EverstepError] | None = None
    answers = await asyncio.gather(*(h.stage(version) for h in behind), return_exceptions=True)
    for host, answer in zip(behind, answers, strict=True):
        if isinstance(answer, Prepared):
            staged.append((host, answer))
        elif isinstance(answer, EngineUnavailable):
            away[host.name] = str(answer)
        elif isinstance(answer, EverstepError):
            refused = refused or (host, answer)
        else:
            raise answer
    if refused is not None:
        await asyncio.gather(*(host.unstage() for host, _ in staged), return_exceptions=True)
        raise _named(*refused, is_one=len(hosts) == 1)
    if staged and on_staged is not None:
        await on_staged()
    flipped = await _flip(staged, version, kv, away, is_one=len(hosts) == 1)
    if len(away) == len(hosts):
        raise EngineUnavailable("; ".join(f"{name}: {why}" for name, why in away.items()))
    return Served(_note(version, staged, flipped, len(hosts)), away)


async def _ask(
    hosts: Sequence[Host], away: dict[str, str], version: Version
) -> list[tuple[Host, bool]]:
    """Those that answer, and whether they serve it."""
    found: list[tuple[Host, bool]] = []
    answers = await asyncio.gather(*(h.serves(version) for h in hosts), return_exceptions=True)
    for host, answer in zip(hosts, answers, strict=True):
        if isinstance(answer, bool):
            found.append((host, answer))
        elif isinstance(answer, EngineUnavailable):
            away[host.name] = str(answer)
        else:
            raise answer
    return found


async def _flip(
    staged: Sequence[tuple[Host, Prepared]],
    version: Version,
    kv: KVPolicy,
    away: dict[str, str],
    *,
    is_one: bool,
) -> list[Flipped]:
    flips = (host.flip(version, kv) for host, _ in staged)
    found: list[Flipped] = []
    failed: EverstepError | None = None
    answers = await asyncio.gather(*flips, return_exceptions=True)
    for (host, _), answer in zip(staged, answers, strict=True):
        if isinstance(answer, Flipped):
            found.append(answer)
        elif isinstance(answer, EngineUnavailable):
            away[host.name] = str(answer)
        elif isinstance(answer, EverstepError):
            failed = failed or _named(host, answer, is_one=is_one)
        else:
            raise answer
    if failed is not None:
        raise failed
    return found


def _named(host: Host, error: EverstepError, *, is_one: bool) -> EverstepError:
    """The same error, with the engine's name where there are several."""
    if not is_one:
        error.args = (f"{host.name}: {error}", *error.args[1:])
    return error


def _note(
    version: Version,
    staged: Sequence[tuple[Host, Prepared]],
    flipped: Sequence[Flipped],
    num_hosts: int,
) -> str:
    """The slowest and the worst of them all."""
    if not flipped:
        return ""
    reports = [prepared.report for _, prepared in staged]
    back = " of a new lineage" if any(prepared.is_back for _, prepared in staged) else ""
    where = "" if num_hosts == 1 else f" on {len(flipped)} of {num_hosts} engines"
    return (
        f"version {version.number}{back} serves{where}: "
        f"staged in {max(r.seconds for r in reports):.2f} s, "
        f"canaries differ by {max(r.max_delta for r in reports):.2g} at most, "
        f"stall {1e3 * max(f.stall_s for f in flipped):.1f} ms"
    )
