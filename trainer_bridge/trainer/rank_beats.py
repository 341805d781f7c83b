"""Which rank is gone, when a collective call fails: gloo and NCCL name an address at best.

Each rank counts up in the store that all of them met at, beside whatever it computes. Who finds a
call broken looks who has stopped.
"""

import contextlib
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

BEAT_S = 0.5
# how long a rank may be silent that lives: its machine may be busy
SILENCE_S = 5.0
_STORE_S = 10.0


class Beats:
    """This rank's beats, and a look at the others'. host, port: of the store."""

    def __init__(self, host: str, port: int, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._store = TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=_STORE_S), wait_for_workers=False
        )
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._beat_once()
        self._thread.start()

    def missing(self) -> list[int]:
        """Ranks that do not beat for a while; the first one, where it took the store with it."""
        begun = time.monotonic()
        silent = set(range(self._size)) - {self._rank}
        try:
            before = [self._count(rank) for rank in range(self._size)]
            while silent and time.monotonic() < begun + SILENCE_S:
                time.sleep(BEAT_S / 2)
                silent = {rank for rank in silent if self._count(rank) == before[rank]}
        except RuntimeError:
            # the first rank may have looked as we do, and ended: others were silent before
            is_later = time.monotonic() > begun + 4 * BEAT_S
            return sorted(silent - {0}) if is_later and silent - {0} else [0]
        return sorted(silent)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(_STORE_S)

    def _count(self, rank: int) -> int:
        return int(self._store.add(_key(rank), 0))

    def _beat(self) -> None:
        # whoever hosts the store may end first
        with contextlib.suppress(RuntimeError):
            while not self._is_over.wait(BEAT_S):
                self._beat_once()

    def _beat_once(self) -> None:
        self._store.add(_key(self._rank), 1)


def _key(rank: int) -> str:
    return f"everstep/beat/{rank}"
