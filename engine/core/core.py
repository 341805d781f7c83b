"""The step loop of one engine, and its entry as a process of its own.

One iteration: drain the messages, schedule, run, commit, publish. The loop never blocks on its
peer: while what it has to say cannot be sent, it does not step. A core whose front is gone ends.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from .. import log
from ..checkpoint.manifest import Version
from ..config import STAGE_SHARE, EngineConfig, ResolvedKV
from ..errors import CheckpointError, ConfigError, EngineUnavailable, EverstepError
from ..messages import (
    Add,
    Cancel,
    Died,
    Flip,
    FromCore,
    Loading,
    Meter,
    Pause,
    Ready,
    Refused,
    Rejected,
    Resume,
    Shutdown,
    Stage,
    ToCore,
    Unstage,
    decode_to_core,
    encode,
)
from .memory import free_bytes, most_bytes
from .plan import Runner
from .scheduler import Scheduler
from .swap import Stager, Swap

if TYPE_CHECKING:
    from ..checkpoint.ring_config import RingConfig

STATS_EVERY_S = 1.0
# share of the memory that the weights leave free which KV takes where no size is given
KV_SHARE = 0.2
Receive = Callable[[float], Sequence[ToCore]]
Send = Callable[[list[FromCore]], None]


class Core:
    """Scheduler and runner in one loop. Knows nothing of transports."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        stager: Stager | None = None,
        *,
        stage_share: float = STAGE_SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._clock = clock
        self._step_seconds = 0.0
        self._next_stats_s = time.monotonic()
        self._swap: Swap | None = None
        if stager is not None:
            self._swap = Swap(stager, scheduler, share=stage_share, clock=clock)

    def handle(self, message: ToCore) -> list[FromCore]:
        """Take one message; returns what there is to answer at once."""
        match message:
            case Add():
                try:
                    self.scheduler.add(message)
                except EverstepError as error:
                    return [Rejected(message.rollout_id, str(error))]
            case Cancel():
                self.scheduler.cancel(message.rollout_ids)
            case Pause():
                self.scheduler.pause(message.rollout_ids)
            case Resume():
                self.scheduler.resume(message.rollout_ids)
            case Meter():
                return [self.scheduler.meter(message)]
            case Stage() | Flip() | Unstage():
                return self._swap_weights(message)
            case Shutdown():
                raise SystemExit(0)
        return []

    def _swap_weights(self, message: Stage | Flip | Unstage) -> list[FromCore]:
        if self._swap is None:
            if isinstance(message, Unstage):
                return []
            what: Literal["stage", "flip"] = "flip" if isinstance(message, Flip) else "stage"
            return [Refused(message.version, "this core cannot change its weights", what=what)]
        match message:
            case Stage():
                return self._swap.stage(message)
            case Unstage():
                return self._swap.unstage(message.version)
            case Flip():
                return self._swap.flip(message)

    def step(self) -> list[FromCore] | None:
        """One step, and a piece of the next weights; None if there was nothing to do."""
        if self._swap is None or not self._swap.is_busy:
            return self._step()
        events = self._step() or []
        return [*events, *self._swap.work()]

    def _step(self) -> list[FromCore] | None:
        plan = self.scheduler.schedule()
        if not plan.has_work:
            if self._swap is not None:
                self._swap.nothing_to_run()
            return self.scheduler.take_events() or None
        news = [] if self._swap is None else self._swap.before_step()
        started = self._clock()
        result = self.runner.run(plan)
        ended = self._clock()
        self._step_seconds += ended - started
        if self._swap is not None:
            self._swap.after_step(started, ended)
        events = self.scheduler.commit(plan, result)
        return [*news, *events] if news else events

    def loop(self, receive: Receive, send: Send) -> None:
        """Run until Shutdown. `receive(timeout_s)` returns at once if there is something."""
        is_idle = False
        try:
            while True:
                is_idle = self.turn(receive(STATS_EVERY_S if is_idle else 0.0), send)
        except SystemExit:
            return

    def turn(self, messages: Sequence[ToCore], send: Send) -> bool:
        """Take messages, make a step, say what became of both; True: there was nothing to do.

        Raises SystemExit at Shutdown.
        """
        for message in messages:
            answers = self.handle(message)
            if answers:
                send(answers)
        events = self.step()
        if events:
            send(events)
        is_idle = events is None
        if is_idle or time.monotonic() >= self._next_stats_s:
            stats = msgspec.structs.replace(
                self.scheduler.stats(), step_seconds_total=self._step_seconds
            )
            send([stats])
            self._next_stats_s = time.monotonic() + STATS_EVERY_S
        return is_idle


def build(
    config: EngineConfig,
    on_loading: Callable[[Loading], None],
    version: Version | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Core, Ready]:
    """Load the model and make a core of it.

    version  the weights to load; None: those of `config.model.path`, as version 0
    clock    what steps and slices are measured by, in seconds

    Raises CheckpointError, ConfigError, EngineUnavailable: one line each, before anything is served.
    """
    import torch

    from ..checkpoint.checkpoint import Checkpoint
    from ..checkpoint.hub import resolve
    from ..model.runner import ModelRunner
    from ..model.staging import WeightStager
    from ..model.weights import WeightReader, load_weights

    torch.set_num_threads(config.num_threads or num_free_cores())

    def progress(stage: str, done: int, total: int) -> None:
        on_loading(Loading(stage, done, total))

    path = config.model.path if version is None else version.folder
    checkpoint = Checkpoint.open(resolve(path, progress))
    ring, reader = checkpoint.config, WeightReader(checkpoint, config.model)
    weight_bytes = reader.num_bytes
    _check_memory(path, weight_bytes)
    kv = resolve_kv(config, ring, reader.dtype.itemsize, weight_bytes)
    number = 0 if version is None else version.number
    weights = load_weights(checkpoint, config.model, version=number, on_progress=progress)
    checkpoint.close()
    if version is not None and weights.digest != version.digest:
        raise CheckpointError(
            f"{path} holds {weights.digest[:12]}, not {version.words}: its files were changed"
        )
    runner = ModelRunner(weights, kv, config.model)
    progress("warm-up", 0, 1)
    runner.warm_up()
    progress("warm-up", 1, 1)
    scheduler = Scheduler(kv, config.batch)
    scheduler.set_version(weights.digest)
    stager = WeightStager(runner, config.model, free_bytes=free_bytes)
    ready = Ready(
        core_id=f"core-{os.getpid()}",
        vocab_size=ring.vocab_size,
        max_model_len=kv.max_model_len,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        max_num_seqs=config.batch.max_num_seqs,
        version=weights.version,
        digest=weights.digest,
        path=str(checkpoint.folder),
        numerics=runner.numerics,
        eos_ids=list(ring.eos_token_ids),
        num_moe_layers=weights.num_moe_layers,
        num_experts=ring.num_experts,
        num_experts_per_tok=ring.num_experts_per_tok,
        kernels=runner.kernels,
    )
    return Core(scheduler, runner, stager, stage_share=config.stage_share, clock=clock), ready


def num_free_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_memory(path: str, weight_bytes: int) -> None:
    """Raise EngineUnavailable where reading the weights could only end by the system's hand. A core that
    is started again asks again later: others may have gone by then."""
    most = most_bytes()
    if most is not None and weight_bytes > most:
        raise EngineUnavailable(
            f"{path}: its weights take {weight_bytes / 1e9:.1f} GB of memory, "
            f"{most / 1e9:.1f} GB are free (swap included)"
        )


def resolve_kv(
    config: EngineConfig, ring: "RingConfig", itemsize: int, weight_bytes: int
) -> ResolvedKV:
    """Number of blocks and context from what is asked and what the weights will leave free.

    Raises ConfigError where the context that was asked for cannot be held.
    """
    from ..checkpoint.ring_config import context_length

    native = context_length(ring)
    asked = config.model.max_model_len
    if asked is not None and asked > native:
        raise ConfigError(
            f"model.max_model_len: {asked} exceeds the model's context of {native} tokens"
        )
    size = config.kv.block_size
    token_bytes = 2 * ring.num_hidden_layers * ring.num_key_value_heads * ring.head_dim * itemsize
    length = asked or native
    if config.kv.num_blocks is not None:
        blocks = config.kv.num_blocks
    else:
        memory = config.kv.memory_bytes or int(max(0, free_bytes() - weight_bytes) * KV_SHARE)
        most = config.batch.max_num_seqs * -(-length // size) + 1
        blocks = max(2, min(memory // (token_bytes * size), most))
    capacity = (blocks - 1) * size
    if capacity < length:
        if asked is not None:
            raise ConfigError(
                f"model.max_model_len: {asked} tokens need {-(-asked // size) + 1} KV blocks of "
                f"{size}, there are {blocks}; raise kv.num_blocks or kv.memory_bytes, or ask for "
                f"{capacity} or less"
            )
        length = capacity
    return ResolvedKV(
        block_size=size,
        num_blocks=blocks,
        max_model_len=length,
        prefix_caching=config.kv.prefix_caching,
        num_parking_blocks=config.kv.parking_bytes // (token_bytes * size),
        on_pause=config.kv.on_pause,
    )


def main() -> None:
    """Entry of the core's process: one JSON line on standard input says what to run.

    {"endpoint": zmq address to connect to, "config": EngineConfig, "weights": Version or null,
     "json_log": bool}
    Standard input stays open as long as the front lives; its end ends the core.
    """
    import zmq

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_front, daemon=True).start()
    log.setup(json_lines=job["json_log"])
    config = msgspec.convert(job["config"], EngineConfig)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(job["endpoint"])

    def send(messages: list[FromCore]) -> None:
        socket.send(encode(messages))

    def receive(timeout_s: float) -> list[ToCore]:
        found: list[ToCore] = []
        wait = int(timeout_s * 1000)
        while socket.poll(wait):
            found += decode_to_core(socket.recv())
            wait = 0
        return found

    try:
        weights = msgspec.convert(job["weights"], Version | None)
        core, ready = build(config, lambda loading: send([loading]), weights)
        # weights and code live as long as the process: the collector need not walk them each time
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        send([ready])
        core.loop(receive, send)
    except EverstepError as error:
        send([Died(str(error), error.code)])
    except Exception as error:
        log.event("core.died", level="error", error=f"{type(error).__name__}: {error}")
        send([Died(f"{type(error).__name__}: {error}")])
        raise
    finally:
        socket.close()
        zmq.Context.instance().term()


def _end_with_front() -> None:
    while sys.stdin.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
