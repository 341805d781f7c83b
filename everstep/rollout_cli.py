"""`everstep rollout`: C3PO++ from a file of prompts to a file of trajectories."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from .engine.errors import ConfigError
from .engine.rollout import Record, SamplingParams
from .engine.settings import load
from .flags import Settings, with_settings
from .rollout_what_if import what_if
from .trainer_bridge.c3po.config import C3poConfig

app = typer.Typer(name="rollout")
app.command("what-if")(what_if)
# what a trainer can use beside what every trajectory has
_RECORDS: tuple[Record, ...] = ("kept_ids", "routing")
SECTIONS = ("engine", "journal.path", "restart", "skip_tokenizer_init")


class BudgetMode(StrEnum):
    """What Φ counts."""

    GENERATED = "generated"
    COMPLETED = "completed"


class KVAtFlip(StrEnum):
    """What becomes of KV that older weights wrote."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    RECOMPUTE_PROMPT = "recompute-prompt"


class Staging(StrEnum):
    """How weights are loaded beside generation."""

    BACKGROUND = "background"
    FULL = "full"


@app.callback(invoke_without_command=True)
@with_settings(SECTIONS, positional_model=False, sampling=SamplingParams())
def rollout(
    settings: Settings,
    context: typer.Context,
    sampling: SamplingParams,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="IN", help="JSON lines.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Trajectories: OUT.jsonl or OUT.parquet.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", help="Φ: tokens of one iteration.")
    ] = 65536,
    retention: Annotated[
        int,
        typer.Option(
            "--retention",
            metavar="N",
            help="σ: a rollout that was cut more often than this is purged and drawn anew.",
        ),
    ] = 3,
    group: Annotated[
        int, typer.Option("--group", metavar="N", help="Samples of a prompt, delivered together.")
    ] = 8,
    capacity: Annotated[
        int, typer.Option("--capacity", metavar="N", help="Ω: rollouts under way at once.")
    ] = 128,
    mode: Annotated[
        BudgetMode,
        typer.Option(
            "--mode",
            help="What Φ counts: every new token, exactly; or the length of what ended, which "
            "overshoots.",
        ),
    ] = BudgetMode.GENERATED,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations", min=1, metavar="N", help="Stop after so many; default: at the end."
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, metavar="N", help="Passes over the prompts.")
    ] = 1,
    max_lag: Annotated[
        int | None,
        typer.Option(
            "--max-lag", metavar="N", help="Versions that the oldest token of a group may be old."
        ),
    ] = None,
    max_reissues: Annotated[
        int,
        typer.Option(
            "--max-reissues",
            metavar="N",
            help="Attempts of a sample before its prompt is given up.",
        ),
    ] = 8,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL[,URL]",
            help="Everstep servers to sample on, instead of a model in this process.",
            show_default=False,
        ),
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait-s", min=0, metavar="S", help="How long a server that is away is waited for."
        ),
    ] = 120.0,
    admin_key: Annotated[
        str | None,
        typer.Option(
            "--admin-key",
            metavar="KEY",
            help="Of the servers, to give them weights; default: http.admin_key of --config, else "
            "EVERSTEP_ADMIN_KEY.",
            show_default=False,
        ),
    ] = None,
    bridge: Annotated[
        str | None,
        typer.Option(
            "--bridge",
            metavar="ADDRESS",
            help="Send the groups to a trainer that connects here, and serve what it makes of them.",
            show_default=False,
        ),
    ] = None,
    run_name: Annotated[
        str, typer.Option("--run-name", metavar="NAME", help="What the trainer calls this run.")
    ] = "run",
    reward: Annotated[
        Path | None,
        typer.Option(
            "--reward",
            metavar="TOML",
            help="What samples earn (docs/howto/rewards.md): in the output, and for a trainer.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            "--record",
            metavar="NAME[,NAME]",
            help="What else to keep of each token, for a trainer: kept_ids, routing.",
            show_default=False,
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys", metavar="DIR", help="Of `everstep keys`, for the bridge.", show_default=False
        ),
    ] = None,
    weights_bind: Annotated[
        str | None,
        typer.Option(
            "--weights-bind",
            metavar="ADDRESS",
            help="Take the trainer's weights here too; for one on another host.",
            show_default=False,
        ),
    ] = None,
    weights_root: Annotated[
        Path | None,
        typer.Option(
            "--weights-root",
            metavar="DIR",
            help="Folder of what is taken; default: everstep-NAME in /dev/shm.",
            show_default=False,
        ),
    ] = None,
    kv: Annotated[
        KVAtFlip,
        typer.Option("--kv", help="KV of unfinished rollouts when new weights serve."),
    ] = KVAtFlip.KEEP,
    staging: Annotated[
        Staging,
        typer.Option(
            "--staging",
            help="How new weights are loaded beside generation: background takes a stated share of "
            "its time, full as much as may be between two steps.",
        ),
    ] = Staging.BACKGROUND,
    train_wait_s: Annotated[
        float,
        typer.Option(
            "--train-wait-s", min=0, metavar="S", help="How long an iteration may be trained."
        ),
    ] = 3600.0,
) -> None:
    """Sample groups under an exact token budget; after any kill the same command goes on.

    Each iteration samples --budget tokens, no more and no less, from at most --capacity rollouts;
    what is unfinished goes on in the next one (C3PO++). Groups whose samples have all ended are
    written, and the ledger shows where every token is: delivered, carried, held for its group,
    purged, regenerated or cancelled.

    IN holds a prompt per line: {"prompt": text}, {"messages": …} or {"prompt_ids": …}, with `id`,
    `metadata` and `sampling` (fields as in POST /rollouts), which go over the sampling flags. A bad
    line is named at the end and stops nothing. Seeds follow from --seed (0), id, epoch, sample and
    attempt.

    OUT gets a line per sample, groups whole: tokens, three logprobs, kept mass, versions, segments,
    seed, attempt, how many tokens were sampled in which iteration, and what earlier attempts cost;
    with --reward what it earned, so that it can be trained on.
    OUT.run holds the run, OUT.journal (without --server) the rollouts under way.

    Exit code 0: every prompt is delivered, or --iterations is reached; 1: there were bad lines, or
    prompts were given up; 2: the run could not go on; 130: interrupted.

    [dim]everstep rollout --prompts data.jsonl --out out.jsonl --budget 4096 --group 4 --capacity 32[/dim]

    [dim]everstep rollout --prompts data.jsonl --out out.parquet --server http://a:8000,http://b:8000[/dim]
    """
    if context.invoked_subcommand is not None:
        return
    for name, value in (("--prompts", prompts), ("--out", out)):
        if value is None:
            raise ConfigError(f"{name} is missing: name a file (`everstep rollout --help`)")
    assert prompts is not None
    assert out is not None
    config = C3poConfig(
        budget=budget,
        capacity=capacity,
        mode=mode.value,
        retention=retention,
        group=group,
        max_lag=max_lag,
        max_reissues=max_reissues,
    )
    from .rollout_run import RolloutRun
    from .rollout_training import Training
    from .trainer_bridge.rewards.rewards import RewardConfig
    from .weights_receiving import Job

    # without one a trainer is sent what the default makes of each sample
    has_reward = reward is not None or bridge is not None
    rewards = load(RewardConfig, file=reward).config if has_reward else None
    training = weights = None
    of_a_trainer = {"--weights-bind": weights_bind, "--weights-root": weights_root, "--keys": keys}
    for flag, given in of_a_trainer.items():
        if given is not None and bridge is None:
            raise ConfigError(f"{flag} is for a run with a trainer: name --bridge too")
    if weights_bind is not None:
        weights = Job.of(weights_bind, run_name, weights_root, keys, prefix="weights-")
    if bridge is not None:
        training = Training(
            endpoint=bridge,
            run=run_name,
            admin_key=admin_key or settings.config.http.admin_key,
            keys=keys,
            kv=kv.value,
            priority=staging.value,
            deadline_s=train_wait_s,
            weights=weights,
        )
    run = RolloutRun(
        settings,
        config,
        prompts,
        out,
        sampling=replace(sampling, record=_recorded(record)),
        limit=iterations,
        epochs=epochs,
        servers=[] if server is None else server.split(","),
        wait_s=wait_s,
        training=training,
        reward=rewards,
    )
    raise typer.Exit(run.run())


def _recorded(names: str | None) -> tuple[Record, ...]:
    """Raises ConfigError for a name that nothing is recorded by."""
    given = [] if names is None else [name.strip() for name in names.split(",")]
    for name in given:
        if name not in _RECORDS:
            raise ConfigError(f"--record is {name!r}; accepted: {', '.join(_RECORDS)}")
    return tuple(name for name in _RECORDS if name in given)
