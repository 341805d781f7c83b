"""`everstep replay | capsule | chaos`: commands that let a user check what the engine promises."""

from pathlib import Path
from typing import Annotated

import typer

from .engine.errors import ConfigError
from .flags import CHECKS, Settings, with_settings

# without a name: its commands stand beside the others
app = typer.Typer()


@app.command(rich_help_panel=CHECKS)
@with_settings(("engine",), positional_model=False)
def replay(
    settings: Settings,
    source: Annotated[
        str, typer.Argument(metavar="ID|FILE", help="A rollout, a capsule, an export.")
    ],
    journal: Annotated[Path | None, typer.Option(help="The journal that has ID.")] = None,
    to: Annotated[int | None, typer.Option(min=1, help="Only the first TO output tokens.")] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A version's folder, or one that holds such; repeat for more.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a journaled rollout again and compare every token and logprob to the bit.

    Each segment runs under the version that made it, found in --weights by its digest; where the
    weights changed in mid-rollout, they change again at the same token. Tokens of versions that are
    not there are given as they were, and reported. Kernel level and dtype are those that were
    recorded, where this machine has them.

    Exit code 0: identical; 1: the first difference is shown, and why; 2: it could not be run.

    [dim]everstep replay ro-5c1f… --journal run.db --model ./Ring-mini-2.0[/dim]

    [dim]everstep replay bug.capsule --model ./Ring-mini-2.0 --to 200[/dim]

    [dim]everstep replay ro-5c1f… --journal run.db --weights run/versions[/dim]
    """
    from .replay import run_replay

    raise typer.Exit(run_replay(settings, source, journal, to, weights or []))


@app.command(rich_help_panel=CHECKS)
@with_settings(("engine",), positional_model=False)
def capsule(
    settings: Settings,
    source: Annotated[str, typer.Argument(metavar="ID|FILE", help="A rollout, or an export.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="What to write.")],
    journal: Annotated[Path | None, typer.Option(help="The journal that has ID.")] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Put text and stop strings in.")
    ] = False,
    with_metadata: Annotated[
        bool, typer.Option("--with-metadata", help="Put the rollout's metadata in.")
    ] = False,
) -> None:
    """Pack one rollout into a file that `everstep replay` runs elsewhere: a bug report.

    It holds tokens, numbers, digests and versions; never keys or client names.

    [dim]everstep capsule ro-5c1f… --journal run.db -o bug.capsule[/dim]
    """
    from .replay import run_capsule

    run_capsule(
        settings,
        source,
        journal,
        output,
        with_text=with_text,
        with_metadata=with_metadata,
    )


@app.command(rich_help_panel=CHECKS)
def chaos(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND]", help="Starts the server: everstep serve …"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The server; default: the command's --port, or 8000.")
    ] = None,
    pid: Annotated[int | None, typer.Option(help="Its process, where the port does not say.")] = (
        None
    ),
    kill: Annotated[str, typer.Option(help="core, server, or core,server.")] = "core",
    every: Annotated[str, typer.Option(help="Mean time between kills.")] = "30s",
    duration: Annotated[str, typer.Option(help="How long to kill.")] = "10m",
    restart: Annotated[
        str | None, typer.Option(help="Command that starts the server after it was killed.")
    ] = None,
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Submit nothing; only watch what is there.")
    ] = False,
    width: Annotated[int, typer.Option(min=1, help="Groups of two rollouts at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length of each rollout.")] = 256,
    kill_log: Annotated[Path, typer.Option(help="What was killed and when.")] = Path(
        "chaos-kills.jsonl"
    ),
    seed: Annotated[int | None, typer.Option(help="Of the moments and victims.")] = None,
) -> None:
    """Kill the processes of a running server with SIGKILL, and certify that nothing was lost.

    Its own rollouts are submitted, streamed through the kills, and compared to the bit; what the
    server holds for others is watched. A run in which no kill hit the middle of a stream fails.

    Exit code 0: the certificate holds; 1: it does not; 2: it could not be run.

    [dim]everstep chaos --kill core --every 30s --duration 10m[/dim]   of the server on port 8000

    [dim]everstep chaos --kill core,server --every 5s --duration 2m -- everstep serve ./tiny[/dim]
    """
    import shlex

    from .chaos.run import Plan, run_chaos, seconds_of, url_of, victims_of

    words = list(command or [])
    if words and restart is not None:
        raise ConfigError("--restart and -- COMMAND both start the server; give one")
    plan = Plan(
        url=url_of(url, words or shlex.split(restart or "")),
        pid=pid,
        victims=victims_of(kill),
        every_s=seconds_of(every, "--every"),
        duration_s=seconds_of(duration, "--duration"),
        kill_log=kill_log,
        command=tuple(words or shlex.split(restart or "")),
        owns_server=bool(words),
        has_load=not no_load,
        width=width,
        max_tokens=max_tokens,
        seed=seed,
    )
    raise typer.Exit(run_chaos(plan))
