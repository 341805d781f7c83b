"""Flags of `everstep rollout`: each with its name, its words and what it accepts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class BudgetMode(StrEnum):
    """What Φ counts."""

    GENERATED = "generated"
    COMPLETED = "completed"


class KVAtFlip(StrEnum):
    """What becomes of KV that older weights wrote."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    RECOMPUTE_PROMPT = "recompute-prompt"


class StagingPriority(StrEnum):
    """How weights are loaded beside generation."""

    BACKGROUND = "background"
    FULL = "full"


Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="IN", help="JSON lines.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="Trajectories: OUT.jsonl or OUT.parquet.",
        show_default=False,
    ),
]
Budget = Annotated[int, typer.Option("--budget", metavar="N", help="Φ: tokens of one iteration.")]
Retention = Annotated[
    int,
    typer.Option(
        "--retention",
        metavar="N",
        help="σ: a rollout that was cut more often than this is purged and drawn anew.",
    ),
]
Group = Annotated[
    int, typer.Option("--group", metavar="N", help="Samples of a prompt, delivered together.")
]
Capacity = Annotated[
    int, typer.Option("--capacity", metavar="N", help="Ω: rollouts under way at once.")
]
Mode = Annotated[
    BudgetMode,
    typer.Option(
        "--mode",
        help="What Φ counts: every new token, exactly; or the length of what ended, which "
        "overshoots.",
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(
        "--iterations", min=1, metavar="N", help="Stop after so many; default: at the end."
    ),
]
Epochs = Annotated[
    int, typer.Option("--epochs", min=1, metavar="N", help="Passes over the prompts.")
]
MaxLag = Annotated[
    int | None,
    typer.Option(
        "--max-lag", metavar="N", help="Versions that the oldest token of a group may be old."
    ),
]
MaxReissues = Annotated[
    int,
    typer.Option(
        "--max-reissues",
        metavar="N",
        help="Attempts of a sample before its prompt is given up.",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL[,URL]",
        help="Everstep servers to sample on, instead of a model in this process.",
        show_default=False,
    ),
]
WaitS = Annotated[
    float,
    typer.Option(
        "--wait-s", min=0, metavar="S", help="How long a server that is away is waited for."
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        metavar="KEY",
        help="Of the servers, to give them weights; default: http.admin_key of --config, else "
        "EVERSTEP_ADMIN_KEY.",
        show_default=False,
    ),
]
Bridge = Annotated[
    str | None,
    typer.Option(
        "--bridge",
        metavar="ADDRESS",
        help="Send the groups to a trainer that connects here, and serve what it makes of them.",
        show_default=False,
    ),
]
RunName = Annotated[
    str, typer.Option("--run-name", metavar="NAME", help="What the trainer calls this run.")
]
Reward = Annotated[
    Path | None,
    typer.Option(
        "--reward",
        metavar="TOML",
        help="What samples earn (docs/howto/rewards.md): in the output, and for a trainer.",
        show_default=False,
    ),
]
Record = Annotated[
    str | None,
    typer.Option(
        "--record",
        metavar="NAME[,NAME]",
        help="What else to keep of each token, for a trainer: kept_ids, routing.",
        show_default=False,
    ),
]
Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys", metavar="DIR", help="Of `everstep keys`, for the bridge.", show_default=False
    ),
]
WeightsBind = Annotated[
    str | None,
    typer.Option(
        "--weights-bind",
        metavar="ADDRESS",
        help="Take the trainer's weights here too; for one on another host.",
        show_default=False,
    ),
]
WeightsRoot = Annotated[
    Path | None,
    typer.Option(
        "--weights-root",
        metavar="DIR",
        help="Folder of what is taken; default: everstep-NAME in /dev/shm.",
        show_default=False,
    ),
]
Kv = Annotated[
    KVAtFlip,
    typer.Option("--kv", help="KV of unfinished rollouts when new weights serve."),
]
Staging = Annotated[
    StagingPriority,
    typer.Option(
        "--staging",
        help="How new weights are loaded beside generation: background takes a stated share of "
        "its time, full as much as may be between two steps.",
    ),
]
TrainWaitS = Annotated[
    float,
    typer.Option(
        "--train-wait-s", min=0, metavar="S", help="How long an iteration may be trained."
    ),
]
