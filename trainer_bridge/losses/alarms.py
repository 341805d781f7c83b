"""When to look: limits and trends of the mismatch metrics. Torch-free.

The limits are other people's experience, not theorems: a discrepancy of 0.05 is where IcePop's
authors saw training lost (their blog, Sep 2025), e^|D| below 1.05 is NVIDIA's rule for NeMo-RL,
and one or two tokens in a thousand are masked in a healthy run.
KL metrics alone can miss the early phase (arXiv 2605.14220), hence the trends.
"""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct, field

_LIMITED = ("kl_k3", "mask_fraction", "exp_log_ratio_abs")
_FLOORS = {"kl_k3": 0.005, "mask_fraction": 0.001, "log_ratio_abs_mean": 0.005}
"""Metrics whose trend is watched, and below which values it does not matter."""


class AlarmConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Above which values an update is reported."""

    kl_k3: Annotated[float, Meta(gt=0, description="KL of engine and trainer, nats a token")] = 0.05
    mask_fraction: Annotated[float, Meta(gt=0, description="share of masked tokens")] = 0.01
    exp_log_ratio_abs: Annotated[float, Meta(gt=1, description="mean of e^|log ratio|")] = 1.05
    window: Annotated[int, Meta(ge=8, description="updates over which a trend is seen")] = 100
    growth: Annotated[
        float,
        Meta(gt=1, description="newest over oldest quarter of the window that is reported"),
    ] = 2.0


class Alarm(Struct, frozen=True):
    """One thing to look at; `message` is one line."""

    name: str
    value: float
    limit: float
    message: str


class AlarmState(Struct):
    """What survives a restart: the newest values, oldest first, and what was raised already."""

    history: dict[str, list[float]] = field(default_factory=dict)
    raised: list[str] = []


class Alarms:
    """Reports each alarm when it begins to hold, and again only after it ceased to."""

    def __init__(self, config: AlarmConfig, state: AlarmState | None = None) -> None:
        self._config = config
        self.state = state or AlarmState()

    def check(self, update: int, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with this update; `values` are those of `LossMetrics`.

        An update of no tokens has none, and says nothing about what held before.
        """
        if not values:
            return []
        for name in _FLOORS:
            if name in values:
                history = self.state.history.setdefault(name, [])
                history.append(values[name])
                del history[: -self._config.window]
        found = {alarm.name: alarm for alarm in (*self._limits(update, values), *self._trends())}
        new = [alarm for name, alarm in found.items() if name not in self.state.raised]
        self.state.raised = list(found)
        return new

    def _limits(self, update: int, values: Mapping[str, float]) -> list[Alarm]:
        found = []
        for name in _LIMITED:
            limit = getattr(self._config, name)
            if values.get(name, 0.0) > limit:
                message = f"{name} is {values[name]:.4g} at update {update}, above {limit:g}"
                found.append(Alarm(name, values[name], limit, message))
        if invalid := values.get("invalid", 0.0):
            message = f"{invalid:.0f} tokens of update {update} have a logprob that is not finite"
            found.append(Alarm("invalid", invalid, 0.0, message))
        return found

    def _trends(self) -> list[Alarm]:
        found = []
        window, growth = self._config.window, self._config.growth
        quarter = window // 4
        for name, history in self.state.history.items():
            if len(history) < window:
                continue
            first, last = sum(history[:quarter]) / quarter, sum(history[-quarter:]) / quarter
            if last > max(_FLOORS[name], growth * first):
                message = f"{name} grew from {first:.3g} to {last:.3g} over {window} updates"
                found.append(Alarm(f"{name}_trend", last, growth * first, message))
        return found
