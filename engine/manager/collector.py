"""The core's side of a manager: what it is told, what it says, and what is done when it dies.

Tokens become news of growths here. Those of durable rollouts go through the journal (`Keeper`)
before they are shown, all others are shown at once.
"""

import asyncio
import contextlib
import traceback
from collections.abc import Iterable, Sequence
from typing import get_args

import msgspec

from .. import log
from ..backend import Backend
from ..config import RestartConfig
from ..errors import CheckpointError, EngineUnavailable, EverstepError
from ..journal.ops import Origin
from ..messages import (
    Add,
    Cancel,
    Died,
    Flipped,
    FromCore,
    KVChanged,
    Meter,
    Metered,
    Pause,
    Ready,
    Refused,
    Rejected,
    Resume,
    RolloutTokens,
    Staged,
    Staging,
    StateChanged,
    Stats,
    ToCore,
    Tokens,
    tokens_of,
)
from ..metrics import Registry
from ..rollout import FinishReason, KVState, Rollout, RolloutState
from ..tokenizer import Tokenizer
from .budgets import Budgets
from .growth import Growth, News
from .holdings import Holdings
from .keeping import Keeper
from .restart import restart
from .versions import Versions


class Collector:
    """Speaks with one core at a time; every growth that is open is known to it."""

    def __init__(
        self,
        backend: Backend,
        holdings: Holdings,
        tokenizer: Tokenizer | None,
        *,
        keeper: Keeper | None,
        budgets: Budgets,
        versions: Versions,
        restarts: RestartConfig,
        metrics: Registry,
    ) -> None:
        self.stats: Stats | None = None
        """The core's latest."""
        self.failure: str | None = None
        """Why no core will be started any more."""
        self.missing: str | None = None
        """Why the core does not have the weights that it should."""
        self._backend = backend
        self._holdings = holdings
        self._tokenizer = tokenizer
        self._keeper = keeper
        self._budgets = budgets
        budgets.send = self._meter
        self._versions = versions
        versions.check_core = self._check_core
        versions.tell = self._tell_of_weights
        versions.on_change = self._on_weights
        self._restarts = restarts
        self._info: Ready | None = None
        self._last_info: Ready | None = None
        self._origins: dict[str, Origin] = {"computed": Origin(0, "", "", "")}
        """Of a step's tokens, by what they were drawn over; the same objects until that changes."""
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None
        self._num_restarts = metrics.counter("everstep:core_restarts_total", "cores started again")
        self._foreign: set[str] = set()
        """Rollouts that draw over KV of other weights than those that draw."""
        self._num_foreign_tokens = metrics.counter(
            "everstep:foreign_version_kv_tokens_total",
            "tokens drawn over KV that other weights had written",
            ["kv"],
        )

    @property
    def info(self) -> Ready:
        """What the core said when it was ready; raises EngineUnavailable while there is none."""
        if self._info is None:
            raise EngineUnavailable(self.failure or "the engine is loading")
        return self._info

    @property
    def known_info(self) -> Ready:
        """As `info`; while a core is started again, what the last one said."""
        if self._last_info is None or self.failure is not None:
            return self.info
        return self._last_info

    async def start(self) -> Ready:
        """Start the backend. `collect` when everything that is live is held."""
        self._info = self._last_info = await self._start_core()
        return self._info

    async def _start_core(self) -> Ready:
        """With the weights that serve; where those cannot be had, with the model that the server
        was started with, and all rollouts wait for weights."""
        self.missing = None
        version = self._versions.to_start_with
        if version is None:
            return await self._backend.start()
        try:
            return await self._backend.start(version)
        except CheckpointError as error:
            self.missing = str(error)
        return await self._backend.start()

    def collect(self) -> None:
        """Tell the core of all that is live, and listen to it."""
        self._resubmit()
        self._task = asyncio.create_task(self._collect())

    async def close(self) -> None:
        self._is_closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        # nobody waits for an answer that will not be heard
        self._budgets.lose_core()
        await self._backend.close()

    # --- to the core ---------------------------------------------------------------------

    def add(self, growths: Iterable[Growth]) -> None:
        """Hold them and submit those that are live."""
        live = []
        for growth in growths:
            if growth.is_open:
                self._holdings.add(growth)
                live.append(growth)
        # while there is no core they wait: the next one is told of all that is held
        if live and self._info is not None:
            self.tell(*map(self._add, live))

    def tell(self, *messages: ToCore) -> None:
        self._backend.send(messages)

    def end(self, growth: Growth, state: RolloutState, reason: FinishReason) -> None:
        """Its one ending, decided now; shown at once, or when it is in the journal."""
        final = growth.conclude(state, reason)
        if reason.type == "error":
            log.event("rollout.failed", level="error", rollout=final.id, detail=reason.detail)
        if final.is_durable and self._keeper is not None:
            self._keeper.end(growth, final, self._show_ending)
        else:
            self._holdings.end(growth, final)

    def cancel(self, growths: Sequence[Growth]) -> None:
        """End those that are open (state aborted), here and in the core."""
        for growth in growths:
            if growth.is_open:
                self.end(growth, RolloutState.ABORTED, FinishReason("abort"))
        if growths:
            self.tell(Cancel([growth.rollout.id for growth in growths]))

    def resume(self, growths: Iterable[Growth]) -> None:
        """Have these go on, but for those that may not now: not one token may come of them."""
        names = [g.rollout.id for g in growths if g.is_open and not self._is_held(g)]
        if names:
            self.tell(Resume(names))

    def hold(self) -> None:
        """Have rollouts stand still that may not go on now, and the others go on."""
        if self._info is None:
            return
        live = self._holdings.live()
        held = [growth.rollout.id for growth in live if self._is_held(growth)]
        others = {growth.rollout.id for growth in live} - self._holdings.paused - {*held}
        if held:
            self.tell(Pause(held))
        if others:
            self.tell(Resume([g.rollout.id for g in live if g.rollout.id in others]))

    def _is_held(self, growth: Growth) -> bool:
        """Nothing of a durable one can be journaled now; or its weights are missing."""
        if self._versions.waiting_for is not None:
            return True
        return growth.rollout.is_durable and self._keeper is not None and self._keeper.is_held

    def _check_core(self) -> None:
        """Raise EngineUnavailable while there is no core."""
        _ = self.info

    def _tell_of_weights(self, message: ToCore) -> None:
        self._check_core()
        self.tell(message)

    def _on_weights(self) -> None:
        """Another version serves; those that waited for it go on."""
        current, info = self._versions.current, self._info
        if current is not None and info is not None:
            self._info = self._last_info = msgspec.structs.replace(
                info, version=current.number, digest=current.digest, path=current.folder
            )
        self.hold()

    def _meter(self, meter: Meter) -> bool:
        """Limit a pool, if there is a core to be told."""
        if self._info is None or self._is_closing:
            return False
        self.tell(meter)
        return True

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer knows more of them than the configs that a core has read."""
        if self._tokenizer is not None:
            return self._tokenizer.eos_ids
        return tuple(self.known_info.eos_ids)

    def stop_ids(self, rollout: Rollout) -> set[int]:
        """Ids that end it."""
        return rollout.sampling.ending_ids(self.eos_ids)

    def _add(self, growth: Growth) -> Add:
        rollout = growth.rollout
        stop_ids = self.stop_ids(rollout)
        return Add(
            rollout_id=rollout.id,
            prompt_ids=rollout.prompt_ids,
            output_ids=growth.output_ids,
            sampling=rollout.sampling,
            seed=rollout.seed,
            max_tokens=rollout.max_tokens,
            stop_ids=sorted(stop_ids),
            banned_ids=sorted(stop_ids | set(self.eos_ids)),
            priority=rollout.priority,
            client=rollout.client,
            pool=rollout.pool,
            start_paused=self._is_held(growth) or rollout.id in self._holdings.paused,
        )

    # --- from the core -------------------------------------------------------------------

    async def _collect(self) -> None:
        """Take the core's messages until it is closed; start it again when it dies.

        A fault of our own is said to everybody who waits: nobody would ever end them otherwise.
        """
        try:
            await self._take_all()
        except Exception as error:
            log.event("manager.failed", level="error", traceback=traceback.format_exc())
            self.give_up(f"internal error: {type(error).__name__}: {error}")

    async def _take_all(self) -> None:
        deaths = 0
        while True:
            for message in await self._backend.receive():
                if isinstance(message, Died):
                    deaths += 1
                    if not await self._restart(message, deaths):
                        return
                    break
                if isinstance(message, Tokens):
                    deaths = 0
                self._take(message)

    def _take(self, message: FromCore) -> None:
        match message:
            case Tokens():
                self._take_tokens(message)
            case StateChanged():
                for rollout_id, state in message.moves:
                    for growth in self._holdings.live([rollout_id]):
                        growth.move(RolloutState(state))
            case Metered():
                self._budgets.take_answer(message)
            case Rejected():
                for growth in self._holdings.live([message.rollout_id]):
                    reason = FinishReason("error", detail=message.message)
                    self.end(growth, RolloutState.FAILED, reason)
            case Stats():
                self.stats = message
            case KVChanged():
                self._take_kv(message)
            case Staging() | Staged() | Refused() | Flipped():
                self._versions.take(message)
            case _:
                log.event("core.unexpected_message", level="warning", kind=type(message).__name__)

    def _take_tokens(self, message: Tokens) -> None:
        """The outcome of a step. What goes to the journal goes in one piece."""
        info, origins = self.info, self._origins_of(message)
        durable: dict[str, list[tuple[Growth, News]]] = {}

        def take(growth: Growth, tokens: RolloutTokens) -> None:
            news = growth.prepare(tokens, origins[growth.kv], info)
            if news is None:
                return
            if growth.rollout.pool:
                self._budgets.take(growth.rollout.pool, len(news.grown.ids))
            if news.finish is not None:
                self._finish(growth, news.finish)
                if news.finish is not tokens.finish:
                    # a stop string, of which the core knows nothing
                    self.tell(Cancel([growth.rollout.id]))
            elif growth.rollout.is_durable:
                durable.setdefault(growth.kv, []).append((growth, news))
            else:
                self._show(growth)

        # who is not open was cancelled, or ended at a stop string, while the core went on
        for tokens in message.rollouts:
            growth = self._holdings.get(tokens.rollout_id)
            if growth is not None and growth.is_open:
                take(growth, tokens)
        for row in message.plain.rows() if message.plain is not None else ():
            growth = self._holdings.get(row[0])
            if growth is None or not growth.is_open:
                continue
            if not growth.take_plain(row, origins[growth.kv]):
                take(growth, tokens_of(row))
        if self._keeper is not None:
            for kv, fresh in durable.items():
                self._keeper.append(origins[kv], fresh, self._show)
        if message.drawn:
            self._budgets.note_drawn(message.drawn)
        if self._foreign:
            self._count_foreign(message)

    def _show(self, growth: Growth) -> None:
        is_first = not growth.rollout.output_ids
        num_tokens = growth.apply()
        if growth.rollout.pool:
            self._budgets.use(growth.rollout.pool, num_tokens)
        if is_first and growth.rollout.output_ids:
            self._holdings.note_first_token(growth.rollout)
        growth.publish()

    def _show_ending(self, growth: Growth, final: Rollout) -> None:
        """Of a durable one: its last tokens come with it."""
        num_tokens = len(final.output_ids) - len(growth.rollout.output_ids)
        self._holdings.end(growth, final)
        if final.pool:
            self._budgets.use(final.pool, num_tokens)

    def _finish(self, growth: Growth, reason: FinishReason) -> None:
        if not growth.rollout.is_durable:
            self._show(growth)
        failed = reason.type == "error"
        self.end(growth, RolloutState.FAILED if failed else RolloutState.FINISHED, reason)

    def _origins_of(self, message: Tokens) -> dict[str, Origin]:
        origin, info = self._origins["computed"], self.info
        if (origin.version, origin.digest, origin.core) != (
            message.version,
            message.digest,
            info.core_id,
        ):
            self._origins = {
                kv: Origin(message.version, message.digest, info.numerics, info.core_id, kv)
                for kv in get_args(KVState)
            }
        return self._origins

    def _take_kv(self, message: KVChanged) -> None:
        for rollout_id, kv in message.moves:
            for growth in self._holdings.live([rollout_id]):
                growth.kv = kv
        self._foreign = {g.rollout.id for g in self._holdings.live() if g.kv != "computed"}

    def _count_foreign(self, message: Tokens) -> None:
        for tokens in message.each():
            growth = self._holdings.get(tokens.rollout_id)
            if tokens.ids and growth is not None and growth.kv != "computed":
                self._num_foreign_tokens.add(len(tokens.ids), growth.kv)

    # --- a core that dies ----------------------------------------------------------------

    async def _restart(self, died: Died, deaths: int) -> bool:
        """Start the core again and give it what is live; False once that is given up."""
        if self._is_closing:
            return False
        self._info = None
        self._budgets.lose_core()
        self._versions.note_death()
        try:
            info = await restart(self._start_core, died, deaths, self._restarts)
        except EverstepError as error:
            self.give_up(str(error))
            return False
        self._info = self._last_info = info
        self._versions.note_start(info, self.missing)
        self._num_restarts.add()
        log.event("core.restarted", rollouts=len(self._holdings.live()))
        self._resubmit()
        return True

    def _resubmit(self) -> None:
        growths = self._holdings.live()
        self._foreign = set()
        for growth in growths:
            growth.kv = "computed"
            is_paused = growth.rollout.id in self._holdings.paused
            growth.move(RolloutState.PAUSED if is_paused else RolloutState.QUEUED)
        messages: list[ToCore] = [*self._budgets.meters(), *map(self._add, growths)]
        if messages:
            self.tell(*messages)

    def give_up(self, reason: str) -> None:
        """No core will come: all fail, but what is durable, which waits in the journal."""
        self._info, self.failure = None, reason
        self._budgets.lose_core()
        for growth in self._holdings.live():
            if growth.rollout.is_durable:
                growth.publish()
            else:
                self.end(growth, RolloutState.FAILED, FinishReason("error", detail=reason))
