"""`everstep rollout`: C3PO++ from a file of prompts to a file of trajectories."""

import typer
from msgspec.structs import replace

from ..engine.errors import ConfigError
from ..engine.rollout import Record, SamplingParams
from ..engine.settings import load
from ..flags import Settings, with_settings
from ..trainer_bridge.c3po.config import C3poConfig
from . import flags
from .what_if import what_if

app = typer.Typer(name="rollout")
app.command("what-if")(what_if)
# what a trainer can use beside what every trajectory has
_RECORDS: tuple[Record, ...] = ("kept_ids", "routing")
SECTIONS = ("engine", "journal.path", "restart", "skip_tokenizer_init")


@app.callback(invoke_without_command=True)
@with_settings(SECTIONS, positional_model=False, sampling=SamplingParams())
def rollout(
    settings: Settings,
    context: typer.Context,
    sampling: SamplingParams,
    prompts: flags.Prompts = None,
    out: flags.Out = None,
    budget: flags.Budget = 65536,
    retention: flags.Retention = 3,
    group: flags.Group = 8,
    capacity: flags.Capacity = 128,
    mode: flags.Mode = flags.BudgetMode.GENERATED,
    iterations: flags.Iterations = None,
    epochs: flags.Epochs = 1,
    max_lag: flags.MaxLag = None,
    max_reissues: flags.MaxReissues = 8,
    server: flags.Server = None,
    wait_s: flags.WaitS = 120.0,
    admin_key: flags.AdminKey = None,
    bridge: flags.Bridge = None,
    run_name: flags.RunName = "run",
    reward: flags.Reward = None,
    record: flags.Record = None,
    keys: flags.Keys = None,
    weights_bind: flags.WeightsBind = None,
    weights_root: flags.WeightsRoot = None,
    kv: flags.Kv = flags.KVAtFlip.KEEP,
    staging: flags.Staging = flags.StagingPriority.BACKGROUND,
    train_wait_s: flags.TrainWaitS = 3600.0,
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
    from ..trainer_bridge.rewards.rewards import RewardConfig
    from ..weights_receiving import Job
    from .run import RolloutRun
    from .training import Training

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
