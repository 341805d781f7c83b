"""everstep.LLM: the engine as a Python object, without a server.

    with LLM("default") as llm:
        [rollout] = llm.generate("Once upon a time", SamplingParams(max_tokens=32))
        print(rollout.text)

The manager runs on an event loop of its own thread, so every call below is plain and blocking,
in a script as in a notebook. An error is raised in the caller's thread.
"""

import asyncio
import contextlib
import difflib
import queue
import secrets
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec

from ..engine.backend import Backend
from ..engine.checkpoint.hub import Progress, ignore_progress, resolve
from ..engine.config import EngineConfig
from ..engine.errors import ConfigError, EngineUnavailable, InvalidRequest
from ..engine.manager.intake import Submission
from ..engine.manager.manager import Delta, RolloutManager
from ..engine.messages import Died, Loading, Ready
from ..engine.native import ThreadBackend
from ..engine.preload import preload_torch
from ..engine.rollout import Rollout, SamplingParams, check_prompt
from ..engine.tokenizer import Tokenizer
from .loop_thread import LoopThread

T = TypeVar("T")
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
OnDone = Callable[[], None]

# submissions in flight per running rollout: enough that the core never waits for the front
WINDOW = 4


class MakeBackend(Protocol):
    """How a backend is made: ThreadBackend and ProcessBackend are such."""

    def __call__(
        self, config: EngineConfig, *, on_loading: Callable[[Loading], None]
    ) -> Backend: ...


class LLM:
    """A model in this process; use it as a context manager, or call `close()`.

    model                a folder, a hub id, or "default" (the embedded model)
    config               a whole EngineConfig, where single settings do not suffice
    skip_tokenizer_init  token ids in and out only
    on_progress          told of each stage of loading: (stage, done, total)
    settings             fields of EngineConfig by their own names: max_num_seqs=8, dtype="float32",
                         block_size=16, prefix_caching=False, seed=1, …

    With `seed` the n-th submission of a run draws the same tokens each time; without, a run seed
    is drawn. Raises CheckpointError and ConfigError, in one line each.
    """

    def __init__(
        self,
        model: str = "default",
        *,
        config: EngineConfig | None = None,
        skip_tokenizer_init: bool = False,
        on_progress: Progress = ignore_progress,
        backend: MakeBackend = ThreadBackend,
        **settings: Any,
    ) -> None:
        self.config = configure(model, config, settings)
        preload_torch()
        self._tokenizer: Tokenizer | None = None
        folder = resolve(self.config.model.path, on_progress)
        if not skip_tokenizer_init:
            self._tokenizer = Tokenizer.from_folder(folder)
        located = msgspec.structs.replace(
            self.config, model=msgspec.structs.replace(self.config.model, path=str(folder))
        )

        def on_loading(loading: Loading) -> None:
            on_progress(loading.stage, loading.done, loading.total)

        run_seed = secrets.randbits(63) if self.config.seed is None else self.config.seed
        made = backend(located, on_loading=on_loading)
        self._loop = LoopThread()
        try:
            self._manager: RolloutManager = self._loop.call(_start(made, self._tokenizer, run_seed))
        except BaseException:
            self._loop.stop()
            raise
        self._closing = weakref.finalize(self, _close, self._loop, self._manager, made)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own; raises InvalidRequest with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise InvalidRequest(
                "this LLM was made with skip_tokenizer_init: give token ids, and read output_ids",
                field="prompt",
            )
        return self._tokenizer

    @property
    def info(self) -> Ready:
        """What the core said when it was ready: context, KV blocks, version, numerics, kernels."""
        return self._manager.info

    @property
    def manager(self) -> RolloutManager:
        """The manager; it belongs to the loop's thread: reach it through `run`."""
        return self._manager

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine beside the manager and wait for it; Ctrl-C cancels it."""
        self._check_open(coroutine)
        return self._loop.call(coroutine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        samples: int = 1,
        progress: bool = False,
    ) -> list[Rollout]:
        """Ended rollouts in the order of the prompts; samples of one prompt stand together.

        prompts   one prompt (text, or token ids) or many
        sampling  one for all, or one per prompt. An explicit `seed` holds for every prompt it is
                  given with; its samples derive one each
        samples   rollouts per prompt: result[i * samples + j] is sample j of prompt i, and the
                  samples of a prompt share `group_id`
        progress  show a bar

        Every prompt is checked before the first is run: raises InvalidRequest (ContextTooLong).
        A rollout that failed alone is returned with finish_reason "error", and ends no other.
        """
        return self._generate(
            [self._encode(p) for p in _many(prompts)], sampling, samples, progress
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        samples: int = 1,
        progress: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[Rollout]:
        """`generate` on one conversation or many, put in words by the checkpoint's template."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            self.encode_chat(conversation, tools=tools, **template_kwargs)
            for conversation in conversations
        ]
        return self._generate(prompts, sampling, samples, progress)

    def stream(
        self, prompt: Prompt | Messages, sampling: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Deltas of one rollout as they come; a list of messages is a conversation.

        Leaving the loop early (break, Ctrl-C, closing the iterator) cancels the rollout.
        """
        conversation: Any = prompt
        is_chat = bool(prompt) and isinstance(prompt[0], Mapping)
        prompt_ids = self.encode_chat(conversation) if is_chat else self._encode(conversation)
        submission = Submission(prompt_ids=prompt_ids, sampling=sampling or SamplingParams())
        news: queue.SimpleQueue[Delta | Future[None]] = queue.SimpleQueue()
        future = self._loop.submit(_feed(self._manager, submission, news.put))
        future.add_done_callback(news.put)
        try:
            while not isinstance(item := news.get(), Future):
                yield item
            item.result()
        finally:
            future.cancel()

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, ready to be answered."""
        text = self.tokenizer.render_chat(messages, tools=tools, **template_kwargs)
        return self.tokenizer.encode(text)

    def close(self) -> None:
        """End what runs, free the model, end the threads. Idempotent."""
        self._closing()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return list(prompt)

    def _check_open(self, coroutine: Coroutine[Any, Any, Any] | None = None) -> None:
        if not self._closing.alive:
            if coroutine is not None:
                coroutine.close()
            raise EngineUnavailable("this LLM is closed; make a new one")

    def _generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        samples: int,
        progress: bool,
    ) -> list[Rollout]:
        self._check_open()
        info = self.info
        submissions = []
        for prompt_ids, params in zip(prompts, _per_prompt(sampling, len(prompts)), strict=True):
            params.check(vocab_size=info.vocab_size)
            check_prompt(prompt_ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
            submissions.append(Submission(prompt_ids=prompt_ids, sampling=params, samples=samples))
        window = max(1, WINDOW * self.config.batch.max_num_seqs // max(1, samples))
        with _bar(len(prompts) if progress else 0) as on_done:
            return self._loop.call(_run_all(self._manager, submissions, window, on_done))


def configure(model: str, config: EngineConfig | None, settings: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig with single settings put in by field name; raises ConfigError naming them."""
    tree = msgspec.to_builtins(config or EngineConfig())
    # an explicit config names its model, unless the caller names another
    if config is None or model != "default":
        tree["model"]["path"] = model
    homes = dict.fromkeys(("num_threads", "seed"), tree)
    for section in ("model", "kv", "batch"):
        homes |= {name: tree[section] for name in tree[section] if name != "path"}
    for name, value in settings.items():
        if name not in homes:
            near = difflib.get_close_matches(name, homes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(homes)}"
            raise ConfigError(f"LLM has no setting {name!r}; {hint}")
        homes[name][name] = value
    try:
        return msgspec.convert(tree, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None


def _many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one. An empty list is no prompt at all."""
    if isinstance(prompts, str):
        return [prompts]
    found: Any = prompts
    return [found] if found and isinstance(found[0], int) else found


def _per_prompt(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise InvalidRequest(
            f"sampling: {len(sampling)} for {count} prompts; give one, or one per prompt",
            field="sampling",
        )
    return sampling


async def _start(backend: Backend, tokenizer: Tokenizer | None, run_seed: int) -> RolloutManager:
    manager = RolloutManager(backend, tokenizer, run_seed=run_seed)
    try:
        await manager.start()
    except BaseException:
        await manager.close()
        raise
    return manager


async def _run_all(
    manager: RolloutManager, submissions: Sequence[Submission], window: int, on_done: OnDone
) -> list[Rollout]:
    """Run all, `window` submissions at a time; whatever raises ends the others."""
    room = asyncio.Semaphore(window)
    rollouts: list[Rollout] = []
    waiting: list[asyncio.Task[None]] = []

    async def finish(group: Sequence[Rollout]) -> None:
        for rollout in group:
            await manager.wait(rollout.id)
        room.release()
        on_done()

    try:
        for submission in submissions:
            await room.acquire()
            group = manager.submit(submission)
            rollouts += group
            waiting.append(asyncio.create_task(finish(group)))
        await asyncio.gather(*waiting)
        if not manager.is_healthy:
            _ = manager.info  # raises, with the reason
        return rollouts
    finally:
        for task in waiting:
            task.cancel()
        ids = [rollout.id for rollout in rollouts]
        manager.drop(ids)


async def _feed(
    manager: RolloutManager, submission: Submission, put: Callable[[Delta], None]
) -> None:
    [rollout] = manager.submit(submission)
    try:
        async for delta in manager.stream(rollout.id):
            put(delta)
    finally:
        manager.drop([rollout.id])


@contextlib.contextmanager
def _bar(total: int) -> Iterator[OnDone]:
    """A progress bar on standard error; none for a total of 0."""
    if not total:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)


def _close(loop: LoopThread, manager: RolloutManager, backend: Backend) -> None:
    try:
        loop.call(manager.close())
    except RuntimeError:
        # the interpreter is ending and starts no thread to join the core's; the core was told to
        # end, and must have, for a thread inside torch at the very end aborts the process
        with contextlib.suppress(TimeoutError):
            loop.call(asyncio.wait_for(_last_word(backend), 10))
    loop.stop()


async def _last_word(backend: Backend) -> None:
    """Wait until the core has said that it is gone."""
    while not any(isinstance(message, Died) for message in await backend.receive()):
        pass
