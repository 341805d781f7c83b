"""A command of ours that ends with whoever started it, however that ends:

    python -m everstep.demo.child train rl.toml

Standard input is the leash: its other end is held by the parent alone, and nobody writes to it.
"""

import os
import signal
import sys
import threading


def main() -> int:
    # a shell's background job, and so whatever it starts, is born deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from ..cli import run
    from ..engine.config import PATIENCE

    os.environ.update(PATIENCE | dict(os.environ))
    return run(sys.argv[1:])


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    # what was killed goes on from its files, like anything else here
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
