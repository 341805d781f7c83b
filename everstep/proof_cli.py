"""`everstep replay | capsule`: commands that let a user check what the engine promises."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import Settings, with_settings

# without a name: its commands stand beside the others
app = typer.Typer()


@app.command()
@with_settings(("engine",), positional_model=False)
def replay(
    settings: Settings,
    source: Annotated[
        str, typer.Argument(metavar="ID|FILE", help="A rollout, a capsule, an export.")
    ],
    journal: Annotated[Path | None, typer.Option(help="The journal that has ID.")] = None,
    to: Annotated[int | None, typer.Option(min=1, help="Only the first TO output tokens.")] = None,
) -> None:
    """Run a journaled rollout again and compare every token and logprob to the bit.

    Tokens that other weights made are given as they were, and reported. Kernel level and dtype
    are those that were recorded, where this machine has them.

    Exit code 0: identical; 1: the first difference is shown, and why; 2: it could not be run.

    [dim]everstep replay ro-5c1f… --journal run.db --model ./Ring-mini-2.0[/dim]

    [dim]everstep replay bug.capsule --model ./Ring-mini-2.0 --to 200[/dim]
    """
    from .replay import run_replay

    raise typer.Exit(run_replay(settings, source, journal, to))


@app.command()
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
