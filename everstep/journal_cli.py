"""`everstep journal check | export | compact`: the file of a server that is not running."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .flags import CHECKS

app = typer.Typer()
_commands = typer.Typer(help="Look after a journal while no server uses it.", no_args_is_help=True)
app.add_typer(_commands, name="journal", rich_help_panel=CHECKS)

_Path = Annotated[Path, typer.Argument(metavar="PATH", help="The journal.", show_default=False)]


class Form(StrEnum):
    """How rollouts are written."""

    JSONL = "jsonl"
    TRAJECTORY = "trajectory"


@_commands.command()
def check(path: _Path) -> None:
    """Read every record and say what is not as it was written. Nothing is changed.

    Exit code 0: all is well; 1: damaged, a line for each record; 2: it cannot be read, or a
    process has it open.

    [dim]everstep journal check run.db[/dim]
    """
    from .journal import run_check

    raise typer.Exit(run_check(path))


@_commands.command()
def export(
    path: _Path,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="A file; for trajectory a folder."),
    ] = None,
    form: Annotated[
        Form,
        typer.Option("--format", help="jsonl: one rollout a line; trajectory: a sealed file each."),
    ] = Form.JSONL,
    ended: Annotated[
        bool, typer.Option("--ended", help="Only what has ended and is not acknowledged.")
    ] = False,
) -> None:
    """Write the rollouts out, live ones with the tokens that they have. Nothing is changed.

    Without --output JSON lines go to standard output. A sealed file can be imported into another
    engine (POST /rollouts/import) and replayed.

    Exit code 0: all are written; 1: some could not be read, which is said for each; 2: it cannot
    be read at all, or a process has it open.

    [dim]everstep journal export run.db -o rollouts.jsonl[/dim]

    [dim]everstep journal export run.db --format trajectory -o ./rollouts --ended[/dim]
    """
    from .journal import run_export

    raise typer.Exit(run_export(path, output, is_sealed=form is Form.TRAJECTORY, only_ended=ended))


@_commands.command()
def compact(path: _Path) -> None:
    """Make the file as small as what it must keep.

    A server does so by itself, a little at a time.

    [dim]everstep journal compact run.db[/dim]
    """
    from .journal import run_compact

    run_compact(path)
