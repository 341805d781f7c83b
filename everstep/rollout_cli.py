"""`everstep rollout …`: the group of C3PO++'s commands."""

import typer

from .rollout_what_if import what_if

app = typer.Typer(name="rollout", help="Rollouts under an exact token budget (C3PO++).")
app.command("what-if")(what_if)


@app.callback(no_args_is_help=True)
def rollout() -> None:
    """Rollouts under an exact token budget (C3PO++)."""
