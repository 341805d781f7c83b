"""The console script. Nothing is imported before an interruption is caught."""

import os
import sys

from . import __version__


def main() -> None:
    """Run the command line of this process, and end with its exit code."""
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        sys.stdout.write(f"everstep {__version__}\n")
        return 0
    from .engine.config import PATIENCE

    # here, since the conversion of the default model and `doctor --determinism` load torch before
    # any backend could say it
    os.environ.update(PATIENCE | dict(os.environ))
    from .cli import run

    return run(arguments)
