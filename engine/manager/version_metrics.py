"""What a front counts and logs of its versions of the weights."""

from .. import log
from ..messages import Flipped, Staged
from ..metrics import Registry


class VersionMetrics:
    """Declared once for `Versions`, which says when something happened."""

    def __init__(self, metrics: Registry) -> None:
        self._stage_s = metrics.histogram(
            "everstep:weight_stage_seconds", "from asked for to ready to be flipped to"
        )
        self._busy_s = metrics.counter(
            "everstep:weight_stage_busy_seconds_total", "of staging, taken from the step loop"
        )
        self._slice_s = metrics.gauge(
            "everstep:weight_longest_slice_seconds", "how long the last staging held up one step"
        )
        self._flip_s = metrics.histogram(
            "everstep:weight_flip_seconds", "last step under the old weights to first under the new"
        )
        self._steps_lost = metrics.counter(
            "everstep:weight_flip_steps_lost_total", "the same in steps, as long as those before"
        )
        self.number = metrics.gauge("everstep:weight_version", "number of the version that serves")
        self.refused = metrics.counter(
            "everstep:weight_refusals_total", "versions that did not pass; the old one went on"
        )

    def note_staged(self, staged: Staged) -> None:
        report = staged.report
        self._stage_s.observe(report.seconds)
        self._busy_s.add(report.busy_seconds)
        self._slice_s.set(report.longest_slice_s)
        log.event(
            "weights.staged",
            version=staged.version,
            digest=staged.digest[:12],
            seconds=round(report.seconds, 3),
            busy_seconds=round(report.busy_seconds, 3),
            longest_slice_ms=round(report.longest_slice_s * 1e3, 2),
            max_delta=report.max_delta,
            experts_reached=report.experts_reached,
        )

    def note_flipped(self, flipped: Flipped) -> None:
        self._flip_s.observe(flipped.stall_s)
        self._steps_lost.add(flipped.steps_lost)
        log.event(
            "weights.flipped",
            version=flipped.version,
            digest=flipped.digest[:12],
            kv=flipped.kv,
            stall_ms=round(flipped.stall_s * 1e3, 2),
            steps_lost=round(flipped.steps_lost, 2),
            kept_rollouts=flipped.kept_rollouts,
            dropped_tokens=flipped.dropped_tokens,
        )
