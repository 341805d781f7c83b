"""A front with its journal and its core, all on one event loop and moved by hand.

Nothing happens by itself: `step` lets the core make steps, `pump` lets the journal commit, so that
tokens may be prepared and not journaled, journaled and not shown, when something is killed.
"""

import asyncio
import codecs
import json
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.config import BatchConfig, ResolvedKV, RestartConfig
from everstep.engine.core.core import Core
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.errors import EverstepError, JournalError, JournalFull
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import NEW, Accept, Append, CloseBudget, End, Op, OpenBudget
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Died, FromCore, Ready, ToCore
from everstep.engine.rollout import FinishReason, Rollout
from everstep.engine.tokenizer import Tokenizer
from tests.fakes import FakeRunner, draw

MakeCore = Callable[[int], tuple[Core, Ready]]

# bytes of é and € apart, words that overlap, an end mark: halves and stop strings are frequent
PIECES = (b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b" c", b"aba")
EOS = len(PIECES)
VOCAB = EOS + 1
STOPS = ("aba", "bab", "é", "€a", "aé", "ab c", "b\ufffd")


def _char(byte: int) -> str:
    """How a byte-level tokenizer.json spells it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in shown:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in shown].index(byte))


@cache
def half_tokenizer() -> Tokenizer:
    vocab = {"".join(map(_char, piece)): index for index, piece in enumerate(PIECES)}
    made = HFTokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
        tokenizer = Tokenizer.from_folder(Path(folder))
    assert tokenizer.eos_ids == (EOS,)
    return tokenizer


def alone(rollout: Rollout, kept: Sequence[int] = ()) -> tuple[list[int], str, FinishReason]:
    """Tokens, text and ending of a rollout that nothing disturbs, the slow and plain way.

    kept  output tokens that it was given (a fork)
    """
    sampling, prompt = rollout.sampling, rollout.prompt_ids
    eos = [] if sampling.ignore_eos else [EOS]
    stops = {*sampling.stop_token_ids, *eos}
    banned = sorted({*stops, EOS})
    ids: list[int] = []
    while True:
        position = len(ids)
        if position < len(kept):
            token = kept[position]
        else:
            bans = banned if position < sampling.min_tokens else []
            token = draw(rollout.seed, [*prompt, *ids], len(prompt), VOCAB, bans).token_id
        ids.append(token)
        is_stop = token in stops
        spoken = ids[:-1] if is_stop and not sampling.include_stop_str_in_output else ids
        cut = _first_stop(spoken, rollout) if spoken is ids else None
        if cut is not None:
            return ids, cut[0], FinishReason("stop", cut[1])
        if is_stop or len(ids) == rollout.max_tokens:
            reason = FinishReason("stop", token) if is_stop else FinishReason("length")
            return ids, _whole_text(spoken, ids, is_stop), reason


def _first_stop(ids: Sequence[int], rollout: Rollout) -> tuple[str, str] | None:
    """(text, stop string) if a stop string is complete in what was decoded after min_tokens."""
    sampling = rollout.sampling
    text, _ = _decoded(ids)
    base = len(_decoded(ids[: sampling.min_tokens])[0])
    ends = [
        (text.index(stop, base) + len(stop), -len(stop), stop)
        for stop in sampling.stop
        if stop in text[base:] and len(ids) > sampling.min_tokens
    ]
    if not ends:
        return None
    end, length, stop = min(ends)
    return text[: end if sampling.include_stop_str_in_output else end + length], stop


def _decoded(ids: Sequence[int]) -> tuple[str, str]:
    """Text that no later token can change, and what would follow if none came."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(PIECES[i] for i in ids if i != EOS))
    return text, decoder.decode(b"", True)


def _whole_text(spoken: Sequence[int], ids: Sequence[int], is_stop: bool) -> str:
    text, tail = _decoded(spoken)
    whole = half_tokenizer().decode(ids)
    return text + tail if not is_stop or whole.startswith(text + tail) else text


class Store(MemoryJournal):
    """Outlives its fronts, as a file does; knows the first form of all that was accepted.

    It counts by itself what its pools grow by, and under which budget.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accepted: dict[str, Rollout] = {}
        # tokens of each rollout; of each budget: what it has, and what its pool grew by under it
        self.lengths: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.used: dict[str, int] = {}
        # pool → its open budget, None: it is metered, and has none; what it grew by before
        self.open: dict[str, str | None] = {}
        self.before: dict[str, int] = {}

    def commit(self, ops: Sequence[Op]) -> None:
        super().commit(ops)
        for op in ops:
            match op:
                case Accept():
                    for rollout in op.rollouts:
                        found = self.read(rollout.id)
                        assert found is not None
                        self.accepted[rollout.id] = found
                        self.lengths[rollout.id] = len(found.output_ids)
                case Append():
                    for grown in op.grown:
                        self._grew(grown.rollout_id, len(grown.ids))
                case End():
                    known = self.lengths[op.rollout.id]
                    self._grew(op.rollout.id, len(op.rollout.output_ids) - known)
                case OpenBudget():
                    budget = op.budget
                    assert self.open.get(budget.pool) is None
                    self.open[budget.pool] = budget.id
                    self.tokens[budget.id], self.used[budget.id] = budget.tokens, 0
                case CloseBudget():
                    self.open = {p: None if b == op.budget_id else b for p, b in self.open.items()}

    def _grew(self, rollout_id: str, count: int) -> None:
        assert count >= 0
        self.lengths[rollout_id] += count
        pool = self.accepted[rollout_id].pool
        if not count:
            return
        if pool not in self.open:
            self.before[pool] = self.before.get(pool, 0) + count
            return
        budget_id = self.open[pool]
        assert budget_id is not None, f"{count} tokens of a metered pool without a budget"
        self.used[budget_id] += count
        assert self.used[budget_id] <= self.tokens[budget_id], "beyond the budget"
        if self.used[budget_id] == self.tokens[budget_id]:
            self.open[pool] = None

    def close(self) -> None:
        return None


class HandJournal:
    """A JournalThread without a thread: `pump` does what was given, in order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.stalled: str | None = None
        self.failure: str | None = None
        self.is_closed = False
        self.on_stall: Callable[[str | None], None] | None = None
        self.pending: deque[tuple[Callable[[], Any], Op | None, asyncio.Future[Any]]] = deque()

    def commit(self, op: Op) -> asyncio.Future[None]:
        if self.stalled is not None and isinstance(op, NEW):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.set_exception(JournalFull(self.stalled))
            return future
        return self._put(lambda: self.store.commit([op]), op)

    async def recover(self) -> Any:
        return await self._call(self.store.recover)

    async def read(self, rollout_id: str) -> Any:
        return await self._call(lambda: self.store.read(rollout_id))

    async def summary(self, rollout_id: str) -> Any:
        return await self._call(lambda: self.store.summary(rollout_id))

    async def read_many(self, rollout_ids: Any) -> Any:
        return await self._call(lambda: [self.store.read(one) for one in rollout_ids])

    async def summaries(self, rollout_ids: Any) -> Any:
        return await self._call(lambda: [self.store.summary(one) for one in rollout_ids])

    async def list(self, query: Any) -> Any:
        return await self._call(lambda: self.store.list(query))

    async def flush(self) -> None:
        await self._put(lambda: None)

    async def close(self) -> None:
        self.pump()
        self.is_closed = True

    async def _call(self, call: Callable[[], Any]) -> Any:
        return call() if self.stalled is not None else await self._put(call)

    def _put(self, call: Callable[[], Any], op: Op | None = None) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.is_closed:
            future.set_exception(JournalError("the journal is closed"))
        else:
            self.pending.append((call, op, future))
        return future

    def pump(self, count: int = 1_000_000, *, is_told: bool = True) -> None:
        """Do so many of what was given. is_told False: the front dies before it hears of it."""
        while self.pending and count and self.stalled is None:
            call, _, future = self.pending.popleft()
            count -= 1
            try:
                result = call()
            except EverstepError as error:
                if is_told:
                    future.set_exception(error)
            else:
                if is_told and not future.done():
                    future.set_result(result)

    def stall(self, reason: str | None) -> None:
        """The disk is full: what is new is refused, all else waits, calls are answered."""
        self.stalled = reason
        waiting, self.pending = self.pending, deque()
        for call, op, future in waiting:
            if reason is None or (op is not None and not isinstance(op, NEW)):
                self.pending.append((call, op, future))
            elif op is None:
                future.set_result(call())
            else:
                future.set_exception(JournalFull(reason))
        if self.on_stall is not None:
            self.on_stall(reason)


class HandBackend:
    """A core that makes a step when it is told to; what it says is heard when that is told."""

    def __init__(self, make_core: MakeCore) -> None:
        self._make_core = make_core
        self.core: Core | None = None
        self.starts = 0
        self._inbox: asyncio.Queue[list[FromCore]] = asyncio.Queue()
        self._unheard: list[list[FromCore]] = []

    async def start(self, _: Version | None = None, /) -> Ready:
        self.starts += 1
        self._unheard = []
        self._inbox = asyncio.Queue()
        self.core, ready = self._make_core(self.starts)
        return ready

    def send(self, messages: Sequence[ToCore]) -> None:
        for message in messages:
            if self.core is not None:
                answers = self.core.handle(message)
                if answers:
                    self._unheard.append(answers)

    async def receive(self) -> list[FromCore]:
        return await self._inbox.get()

    def step(self) -> bool:
        events = None if self.core is None else self.core.step()
        if events:
            self._unheard.append(events)
        return events is not None

    def hear(self) -> None:
        for messages in self._unheard:
            self._inbox.put_nowait(messages)
        self._unheard = []

    def die(self) -> None:
        """What it said and nobody heard is lost with it."""
        if self.core is not None:
            self.core, self._unheard = None, []
            self._inbox.put_nowait([Died("killed")])

    async def close(self) -> None:
        self.core = None


def fake_core(kv: ResolvedKV, batch: BatchConfig, number: int) -> tuple[Core, Ready]:
    scheduler = Scheduler(kv, batch)
    scheduler.set_version("v1")
    ready = Ready(
        core_id=f"core-{number}",
        vocab_size=VOCAB,
        max_model_len=kv.max_model_len,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        max_num_seqs=batch.max_num_seqs,
        version=1,
        digest="v1",
        numerics="fake",
        eos_ids=[EOS],
        num_moe_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Core(scheduler, FakeRunner(kv, vocab_size=VOCAB)), ready


class World:
    """One server's worth: a front over a store that outlives it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make_core: MakeCore,
        tokenizer: Tokenizer | None,
        run_seed: int = 0,
    ) -> None:
        self.loop = loop
        self._run_seed = run_seed
        self.store = Store()
        self._make_core = make_core
        self._tokenizer = tokenizer
        self.start()

    def start(self) -> None:
        self.clients: set[asyncio.Task[Any]] = set()
        self.journal = HandJournal(self.store)
        self.backend = HandBackend(self._make_core)
        journal: Any = self.journal
        self.manager = RolloutManager(
            self.backend,
            self._tokenizer,
            run_seed=self._run_seed,
            restarts=RestartConfig(attempts=None, first_delay_s=1e-4, max_delay_s=1e-4),
            journal=journal,
        )
        self.do(self.manager.start())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it to its end; the journal works meanwhile, the core does not, and what it said
        before is heard when there is nothing else to do."""

        async def body() -> Any:
            task = asyncio.ensure_future(work)
            turn = 0
            while not task.done():
                self.journal.pump()
                await asyncio.sleep(0)
                turn += 1
                if turn > 8:
                    self.backend.hear()
            return task.result()

        result = self.loop.run_until_complete(body())
        self.settle()
        return result

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin it, and let the journal do nothing: its caller may be gone before it is done."""

        async def body() -> None:
            self.clients.add(asyncio.ensure_future(work))

        self.loop.run_until_complete(body())
        self.settle()

    def settle(self) -> None:
        """Let the loop come to rest; the journal does not work."""

        async def rest() -> None:
            for _ in range(12):
                await asyncio.sleep(0)
            while self.backend.core is None or self.manager._core._info is None:
                await asyncio.sleep(1e-4)

        self.loop.run_until_complete(rest())

    def close(self) -> None:
        async def end() -> None:
            await self.manager.close()
            await asyncio.gather(*self.clients, return_exceptions=True)

        self.loop.run_until_complete(end())

    def step(self, count: int = 1) -> bool:
        """Steps of the core; True if there was anything to do."""
        is_busy = False
        for _ in range(count):
            is_busy |= self.backend.step()
            self.backend.hear()
            self.settle()
        return is_busy

    def run_ahead(self, count: int) -> None:
        """Steps of the core of which the front does not hear yet."""
        for _ in range(count):
            self.backend.step()

    def kill_core(self) -> None:
        self.backend.die()
        self.settle()

    def kill_front(self, num_untold: int) -> None:
        """kill -9: what the journal was given and has not done is lost, all memory too."""
        self.journal.pump(num_untold, is_told=False)
        self.journal.pending.clear()
        self.backend.core = None

        async def end() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                if self.is_mine(task):
                    task.cancel()
            await asyncio.gather(*filter(self.is_mine, tasks), return_exceptions=True)

        self.loop.run_until_complete(end())
        self.start()

    def is_mine(self, task: "asyncio.Task[Any]") -> bool:
        manager = self.manager
        keeper = manager._keeper
        assert keeper is not None
        return task is manager._core._task or task in keeper._tasks | self.clients
