"""What a C3PO++ run is told: Φ, Ω, σ, G and the bounds around them."""

from typing import Annotated, Literal, Self

import msgspec
from msgspec import Meta, Struct

from ...engine.errors import ConfigError

Mode = Literal["generated", "completed"]

_ACCEPTED = {
    "mode": "'generated' or 'completed'",
    "budget": "tokens per iteration, an integer from 1",
    "capacity": "rollouts in the pool, an integer from 1",
    "standby": "rollouts that wait in the engine for a place, an integer from 0",
    "retention": "iterations that a cut rollout may live on, an integer from 0",
    "group": "samples per prompt, an integer from 1",
    "max_lag": "versions, an integer from 0, or none",
    "max_staleness": "iterations, an integer from 0, or none",
    "consumer_batch": "samples per training step, an integer from 1, or none",
    "max_reissues": "times, an integer from 0",
}


class C3poConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The controller's settings (PAPER.md §2.2, §2.3)."""

    budget: Annotated[int, Meta(ge=1, description="Φ: tokens of one iteration")]
    capacity: Annotated[int, Meta(ge=1, description="Ω: rollouts in the pool at once")]
    standby: Annotated[
        int,
        Meta(
            ge=0,
            description="rollouts that are submitted ahead: the engine runs Ω of the pool, the first "
            "that were submitted, and starts the next one when a place becomes free",
        ),
    ] = 0
    mode: Annotated[
        Mode,
        Meta(
            description="what Φ counts; generated: every new token, exactly; completed: the whole "
            "length of a rollout when it ends (the paper's listing), which overshoots"
        ),
    ] = "generated"
    retention: Annotated[
        int, Meta(ge=0, description="σ: a rollout that was cut more often than this is purged")
    ] = 3
    group: Annotated[int, Meta(ge=1, description="G: samples of a prompt, trained together")] = 1
    max_lag: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="a group whose oldest token is more versions old is sampled anew; "
                "default: no bound",
            ),
        ]
        | None
    ) = None
    max_staleness: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="admission: at most (max_staleness + iteration + 1) × consumer_batch "
                "samples are running or have ended well; default: no bound",
            ),
        ]
        | None
    ) = None
    consumer_batch: (
        Annotated[int, Meta(ge=1, description="samples that the trainer takes per step")] | None
    ) = None
    max_reissues: Annotated[
        int,
        Meta(
            ge=0,
            description="how often a sample is issued again after a purge, a failure or a loss "
            "before its group is abandoned; 0: a purge removes, as in the paper's listing",
        ),
    ] = 8

    def check(self) -> Self:
        """Return self, or raise ConfigError naming the field, its value and the accepted ones."""
        values = msgspec.structs.asdict(self)
        for name, accepted in _ACCEPTED.items():
            try:
                msgspec.convert({**_LEAST, name: values[name]}, C3poConfig)
            except msgspec.ValidationError:
                raise ConfigError(f"{name} is {values[name]!r}; accepted: {accepted}") from None
        if (self.max_staleness is None) != (self.consumer_batch is None):
            missing = "max_staleness" if self.max_staleness is None else "consumer_batch"
            raise ConfigError(
                f"{missing} is none; accepted: {_ACCEPTED[missing].removesuffix(', or none')} "
                "(max_staleness and consumer_batch bound the admission together: give both, or none)"
            )
        return self


_LEAST = {"budget": 1, "capacity": 1}
