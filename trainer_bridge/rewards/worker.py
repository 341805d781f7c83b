"""The process that scores: `python -m everstep.trainer_bridge.rewards.worker`.

Frames on standard input and output: four bytes of length (little-endian), then msgpack. First
comes a `RewardConfig` and goes `Ready` or `Unusable`; then for each `RewardSample` one `Scored` or
`Failed`. What a reward prints goes to standard error.
"""

import os
import queue
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from ...engine.errors import EverstepError
from .rewards import (
    Reward,
    RewardConfig,
    RewardError,
    RewardSample,
    described,
    make_reward,
    number_of,
)

_LENGTH = struct.Struct("<I")


class Ready(Struct, tag="ready", frozen=True):
    """The reward is imported."""


class Unusable(Struct, tag="unusable", frozen=True):
    """It cannot be; `code` is that of an EverstepError."""

    code: str
    message: str


class Scored(Struct, tag="scored", frozen=True):
    reward: float


class Failed(Struct, tag="failed", frozen=True):
    message: str


FromWorker = Ready | Unusable | Scored | Failed


def frame(message: object) -> bytes:
    """A message with its length before it."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """How many bytes follow a frame's first four."""
    return int(_LENGTH.unpack(head)[0])


HEAD_BYTES = _LENGTH.size


def main() -> None:
    """Serve until standard input closes, in the middle of a reward too."""
    incoming = _frames(sys.stdin.buffer)
    # a reward that prints must not write between our frames
    outgoing = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    _prefer_for_killing()
    _put_working_folder_last()
    config = msgspec.msgpack.decode(incoming.get(), type=RewardConfig)
    reward = _load(config, outgoing)
    if reward is None:
        return
    while True:
        sample = msgspec.msgpack.decode(incoming.get(), type=RewardSample)
        outgoing.write(frame(_score(reward, sample)))


def _frames(stream: BinaryIO) -> "queue.SimpleQueue[bytes]":
    """Frames as a thread reads them; the end of the stream ends the process at once."""
    found: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        while len(head := stream.read(HEAD_BYTES)) == HEAD_BYTES:
            found.put(stream.read(length_of(head)))
        # whoever wanted the reward is gone; a reward that hangs would outlive it otherwise
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return found


def _load(config: RewardConfig, outgoing: BinaryIO) -> Reward | None:
    try:
        reward = make_reward(config)
    except EverstepError as error:
        outgoing.write(frame(Unusable(error.code, str(error))))
    except BaseException as error:
        outgoing.write(frame(Unusable("config_error", _unimportable(config, error))))
    else:
        outgoing.write(frame(Ready()))
        return reward
    return None


def _unimportable(config: RewardConfig, error: BaseException) -> str:
    what = config.function.path if config.name == "function" else config.name
    return f"reward {what} cannot be imported: {described(error)}"


def _score(reward: Reward, sample: RewardSample) -> Scored | Failed:
    try:
        return Scored(number_of(reward(sample)))
    except RewardError as error:
        return Failed(str(error))
    except BaseException as error:
        # SystemExit too: a reward does not end the worker
        return Failed(described(error))


def _prefer_for_killing() -> None:
    """Where memory runs out the kernel takes this process, not the engine or the trainer."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _put_working_folder_last() -> None:
    """The user's modules are found, but hide no installed package (`-m` puts the folder first)."""
    folder = os.getcwd()
    sys.path[:] = [place for place in sys.path if place not in ("", folder)]
    sys.path.append(folder)


if __name__ == "__main__":
    main()
