"""What a run of C3PO++ keeps in its run file, beside the controller itself."""

from typing import Literal

from msgspec import Struct

from ...engine.rollout import SamplingParams
from ..c3po.config import C3poConfig
from ..c3po.words import Sample

LeaseState = Literal["asked", "open", "closing", "over", "lost"]
"""asked ▸ open ▸ over, by way of closing where it is given back early; lost: its engine stays away."""


class Header(Struct, kw_only=True):
    """What a run is. `id` is its own; the rest is what the command said.

    source   where the prompts are, for people: what counts is their content (`Position`)
    weights  digest and numerics that every engine serves; None until one is known
    """

    id: str
    source: str
    epochs: int = 1
    seed: int
    sampling: SamplingParams
    config: C3poConfig
    weights: str | None = None


class Position(Struct, frozen=True):
    """How far the prompts were read: lines of an epoch, and a digest of their bytes.

    passed  lines of the epoch before, which was read to its end, and their digest
    """

    epoch: int = 0
    line: int = 0
    digest: str = ""
    is_at_end: bool = False
    passed: int = 0
    passed_digest: str = ""


class KeptPrompt(Struct, frozen=True):
    """A prompt under way, as its line says it."""

    name: str
    line: int
    epoch: int
    raw: bytes


class Spell(Struct, frozen=True, array_like=True):
    """Tokens of one rollout that were sampled in one iteration under one version."""

    iteration: int
    version: int
    count: int


class Place(Struct, kw_only=True):
    """Where a live sample is.

    rollout_id  None: its engine has not answered yet
    is_leaving  it was purged: its last tokens are counted where it went
    """

    sample: Sample
    engine: str
    key: str
    rollout_id: str | None = None
    spells: list[Spell] = []
    is_leaving: bool = False

    @property
    def length(self) -> int:
        return sum(spell.count for spell in self.spells)


class Finished(Struct, kw_only=True):
    """A sample that ended well: its trajectory is the run's from here on.

    reason  stop or length
    data    `engine.trajectory.encode` of it
    """

    sample: Sample
    engine: str
    spells: list[Spell]
    reason: str
    data: bytes


class Fallen(Struct, frozen=True, kw_only=True):
    """An attempt that will not be trained, and what it cost."""

    sample: Sample
    reason: str
    tokens: int


class Lease(Struct, kw_only=True):
    """A slice of an iteration's budget, given to one engine.

    tokens  None: as many as come until it is closed
    places  how many rollouts run at once there; None: all that are there
    used    final once it is over
    """

    number: int
    iteration: int
    engine: str
    tokens: int | None
    key: str
    places: int | None = None
    budget_id: str | None = None
    used: int = 0
    state: LeaseState = "asked"

    @property
    def is_active(self) -> bool:
        return self.state in ("asked", "open", "closing")


class Tally(Struct, kw_only=True):
    """Counts of the run, for its reports.

    grown     tokens of this iteration by engine
    endings   finish reason → [samples, tokens], of what was delivered
    fallen    reason → [attempts, tokens]
    lost_budget  tokens of leases whose engine stayed away: whether they were sampled nobody knows
    """

    iteration: int = 0
    grown: dict[str, int] = {}
    endings: dict[str, list[int]] = {}
    fallen: dict[str, list[int]] = {}
    num_groups: int = 0
    num_trajectories: int = 0
    lost_budget: int = 0
    wall_s: float = 0.0


class OutputMark(Struct, frozen=True):
    """Size of the output that belongs to the groups which were trained."""

    size: int = 0


class Over(Struct, frozen=True):
    """Every prompt is done, and the engines were told: they keep nothing of the run."""


def count(table: dict[str, list[int]], name: str, tokens: int) -> None:
    """One more of a kind."""
    row = table.setdefault(name, [0, 0])
    row[0] += 1
    row[1] += tokens


def key_of(sample: Sample) -> str:
    """Of its record; a prompt's name may hold anything."""
    return f"{sample.index}/{sample.attempt}/{sample.prompt}"
