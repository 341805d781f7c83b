"""`everstep rollout what-if`: what C3PO++ would gain on the lengths of a journal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..trainer_bridge.c3po.simulator import StepCost
    from ..trainer_bridge.c3po.what_if import Answer, Candidate, Question
    from .trace import Reading

DEFAULT_BATCH = 32


def what_if(
    journal: Annotated[
        Path, typer.Option("--journal", metavar="PATH", help="A journal that no server uses.")
    ],
    pool: Annotated[
        str | None, typer.Option("--pool", help="Only the rollouts of this pool; default: all.")
    ] = None,
    group: Annotated[
        int | None, typer.Option("--group", metavar="N", help="Default: as in the journal.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help=f"Prompts of a training step; default: {DEFAULT_BATCH}, or from --budget.",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="N", help="Φ, if it is fixed.")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option("--capacity", metavar="N", help="Ω, if it is fixed.")
    ] = None,
    retention: Annotated[
        int | None, typer.Option("--retention", metavar="N", help="σ, if it is fixed.")
    ] = None,
    max_lag: Annotated[
        int, typer.Option("--max-lag", metavar="N", help="Versions that a token may be old.")
    ] = 8,
    max_purged: Annotated[
        float, typer.Option("--max-purged", metavar="X", help="Share of tokens that may be purged.")
    ] = 0.01,
    training_share: Annotated[
        float,
        typer.Option(
            "--training-share",
            metavar="X",
            help="Of a synchronous step's time; the default is what the paper's figures imply.",
        ),
    ] = 0.44,
    step_ms: Annotated[
        str | None,
        typer.Option(
            "--step-ms", metavar="F,R", help="An engine's step: fixed ms, and ms per rollout in it."
        ),
    ] = None,
) -> None:
    """Replay the lengths of a journal through the controller, and recommend Φ, Ω and σ.

    Nothing is generated and nothing is changed. Finished rollouts count, acknowledged ones too
    while the journal remembers them; one that was cut is taken to be as long as one that went
    further. Speed-ups are simulated, over synchronous rollouts on the same engine.

    [dim]everstep rollout what-if --journal run.db --batch 32[/dim]

    [dim]everstep rollout what-if --journal run.db --budget 65536 --capacity 128 --retention 3[/dim]
    """
    from ..trainer_bridge.c3po.what_if import Question
    from ..trainer_bridge.c3po.what_if import what_if as ask
    from .trace import read_trace

    cost = None if step_ms is None else _cost(step_ms)
    reading = read_trace(journal, pool)
    if cost is not None:
        reading.trace.cost = cost
    if batch is None and budget is None:
        batch = DEFAULT_BATCH
    question = Question(
        group=reading.group if group is None else group,
        batch=batch,
        budget=budget,
        capacity=capacity,
        retention=retention,
        max_lag=max_lag,
        max_purged=max_purged,
        training_share=training_share,
    )
    answer = ask(reading.trace, question)
    typer.echo(report(journal, reading, question, answer, is_given=cost is not None))


def report(
    path: Path, reading: "Reading", question: "Question", answer: "Answer", *, is_given: bool
) -> str:
    """What was read, what was tried, what is recommended."""
    lines = [
        f"{path}: {reading.num_finished} finished rollouts of "
        f"{sum(map(bool, reading.trace.finished))} prompts ({reading.num_acked} acknowledged), "
        f"{reading.num_unfinished} cut, {reading.num_failed} failed and left out",
        f"lengths: mean {answer.mean_length:.0f}, longest {answer.longest} tokens; prompts "
        + (f"{reading.trace.prompt_tokens} tokens" if reading.trace.prompt_tokens else "unknown"),
        _say_cost(reading, is_given=is_given),
    ]
    if len(reading.pools) > 1:
        pools = ", ".join(f"{name!r} {count}" for name, count in reading.pools.items())
        lines.append(f"finished by pool: {pools}; --pool NAME takes one")
    if answer.scale > 1:
        lines.append(
            f"one simulated rollout stands for {answer.scale:.3g}: the real speed-up over a larger "
            "synchronous batch is larger"
        )
    share = f"{100 * question.training_share:.0f} %"
    header = ["Φ", "Ω", "σ", "rollouts", f"step ({share} training)"]
    header += ["purged", "trained / true length", "lag mean, max"]
    lines += ["", *_columns([header, *map(_cells, answer.candidates)]), ""]
    best = answer.best
    flags = f"--budget {best.budget} --capacity {best.capacity} --retention {best.retention}"
    if answer.is_fit:
        lines.append(f"recommended: everstep rollout … {flags} --group {question.group}")
    else:
        lines.append(
            f"none purges at most {100 * question.max_purged:g} % within {question.max_lag} versions; "
            f"least: {flags} --group {question.group}"
        )
        lines.append("a larger budget, a smaller capacity or a larger --max-lag would do")
    return "\n".join(lines)


def _say_cost(reading: "Reading", *, is_given: bool) -> str:
    cost: StepCost | None = reading.trace.cost
    if cost is None:
        return (
            "step: the journal does not say what a rollout in it costs, and none is charged: the "
            "speed-ups are upper bounds (--step-ms F,R says it)"
        )
    text = f"step: {1e3 * cost.fixed_s:.3g} ms and {1e3 * cost.row_s:.3g} ms per rollout, "
    timing = reading.timing
    if is_given or timing is None:
        return text + "as given"
    return text + (
        f"from the times of {timing.num_rollouts} rollouts, {timing.fewest:.0f} to "
        f"{timing.most:.0f} at once (off by {100 * timing.error:.0f} %)"
    )


def _cells(candidate: "Candidate") -> list[str]:
    return [
        str(candidate.budget),
        str(candidate.capacity),
        str(candidate.retention),
        f"{candidate.rollout_speed_up:.2f}×",
        f"{candidate.step_speed_up:.2f}×",
        f"{100 * candidate.purged:.1f} %",
        f"{candidate.length_bias:.2f}",
        f"{candidate.mean_lag:.1f}, {candidate.max_lag}",
    ]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _cost(text: str) -> "StepCost":
    from ..engine.errors import ConfigError
    from ..trainer_bridge.c3po.simulator import StepCost

    try:
        fixed, row = map(float, text.split(","))
    except ValueError:
        fixed, row = -1.0, -1.0
    # not "< 0": nan is neither
    if not (0 < fixed < 1e9 and 0 <= row < 1e9):
        raise ConfigError(
            f"step-ms is {text!r}; accepted: two numbers of milliseconds, the first above 0: 20,1.3"
        )
    return StepCost(fixed_s=fixed / 1e3, row_s=row / 1e3)
