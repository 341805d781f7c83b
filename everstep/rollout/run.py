"""`everstep rollout`: engines, run file, prompts and output are put together and driven."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ..engine.errors import ConfigError, InvalidRequest
from ..engine.messages import Priority
from ..engine.rollout import SamplingParams
from ..flags import Settings
from ..offline import show_table
from ..progress import Stages, duration
from ..server.config import ServeConfig
from ..trainer_bridge.c3po.comparison import retention_without_purges
from ..trainer_bridge.c3po.config import C3poConfig
from ..trainer_bridge.rewards.rewards import RewardConfig
from ..trainer_bridge.run.driver import RolloutDriver
from ..trainer_bridge.run.engine import Engine
from ..trainer_bridge.run.file import RunFile
from ..trainer_bridge.run.folders import remove_versions
from ..trainer_bridge.run.parts import Learner
from ..trainer_bridge.run.report import Report
from ..trainer_bridge.run.scoring import Scorer
from ..trainer_bridge.run.state import RunState, run_path
from ..trainer_bridge.run.words import Header
from ..weights_receiving import ReceiverChild
from .output import RolloutOutput, check_output, lines_path
from .prompts import PromptFile, check_temperature
from .training import Training
from .view import RolloutView, books_rows, waste_text

_SHOWN_TROUBLES = 20


class RolloutRun:
    """One command line, checked: nothing is made before it is known to be right."""

    def __init__(
        self,
        settings: Settings,
        config: C3poConfig,
        prompts: Path,
        out: Path,
        *,
        sampling: SamplingParams,
        limit: int | None,
        epochs: int,
        servers: Sequence[str],
        wait_s: float,
        training: Training | None = None,
        reward: RewardConfig | None = None,
    ) -> None:
        """Raises ConfigError, MissingExtra."""
        config = msgspec.structs.replace(
            config, standby=0 if servers[1:] else config.capacity
        ).check()
        if training is not None:
            training.check()
        if reward is not None:
            reward.check()
        self._training, self._reward = training, reward
        try:
            self._sampling = check_temperature(sampling)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        check_output(out)
        if out.exists() and prompts.exists() and prompts.samefile(out):
            raise ConfigError(f"{out} is the input; name another file for the output (--out)")
        self._settings, self._config, self._out = settings, config, out
        self._prompts, self._limit, self._epochs = prompts, limit, epochs
        self._servers, self._wait_s = _addresses(servers), wait_s
        self._journal_path = self._journal()
        self._source = PromptFile(prompts, self._sampling, epochs=epochs)

    def run(self) -> int:
        """To its end; returns the exit code."""
        with contextlib.closing(self._source), self._opened() as (state, output):
            try:
                asyncio.run(self._drive(state, output))
            except KeyboardInterrupt:
                sys.stderr.write(
                    f"interrupted; the same command goes on "
                    f"({state.tally.num_trajectories} trajectories are written)\n"
                )
                raise
            is_done = state.machine.phase == "done"
            if is_done:
                output.finish(state.output.size)
                self._remove_journal()
                self._remove_weights()
            self._show(state, output)
            if not is_done:
                sys.stderr.write(
                    f"stopped after {state.machine.iteration} iterations with "
                    f"{state.machine.num_begun} rollouts under way; a larger --iterations goes on\n"
                )
        return 1 if state.bad_lines or state.abandoned else 0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[RunState, RolloutOutput]]:
        """Run file and output; where nothing has begun, nothing is left of them."""
        path, is_there = run_path(self._out), run_path(self._out).exists()
        had_output = self._out.exists()
        for written in () if is_there else (self._out, lines_path(self._out)):
            if written.exists() and written.stat().st_size:
                raise ConfigError(
                    f"{written} exists, and there is no {path.name} beside it to go on with; name "
                    "another output, or remove it"
                )
        if not is_there and self._journal_path is not None and self._journal_path.exists():
            raise ConfigError(
                f"{self._journal_path} is of a run whose {path.name} is gone; remove it, or name "
                "another output"
            )
        file = RunFile.open(path)
        is_begun = is_there
        try:
            state = RunState(file, self._header())
            self._source.resume(state.position)
            output = RolloutOutput(self._out)
            try:
                yield state, output
            finally:
                is_begun |= not state.is_new
                output.close()
                if not is_begun and not had_output:
                    output.lines.unlink(missing_ok=True)
        finally:
            file.close()
            if not is_begun:
                path.unlink()
                self._remove_journal()

    def _header(self) -> Header:
        return Header(
            id="",
            source=str(self._prompts.resolve()),
            epochs=self._epochs,
            seed=self._settings.config.engine.seed or 0,
            sampling=self._sampling,
            config=self._config,
        )

    async def _drive(self, state: RunState, output: RolloutOutput) -> None:
        if state.is_over:
            return
        with self._receiver() as receiver:
            await self._drive_engines(state, output, receiver)

    async def _drive_engines(
        self, state: RunState, output: RolloutOutput, receiver: ReceiverChild | None
    ) -> None:
        """receiver  it starts while the engines do"""
        async with self._engines(state) as engines:
            view = RolloutView(limit=self._limit)
            with contextlib.closing(view):
                if receiver is not None:
                    view.note(await asyncio.to_thread(receiver.ready))
                warning = purge_warning(self._config, self._sampling.max_tokens)
                warnings = [] if warning is None else [warning]

                def show(report: Report) -> None:
                    # once engines are there: before, what is said is why they are not
                    if warnings and state.engines:
                        view.note(warnings.pop())
                    view(report)

                async with self._scoring(view.note) as scorer:
                    driver = RolloutDriver(
                        state,
                        engines,
                        self._source,
                        output,
                        learner=self._learner(state, engines, scorer, view.note),
                        score=None if scorer is None else scorer.score,
                        limit=self._limit,
                        on_report=show,
                        on_note=view.note,
                    )
                    await driver.run()

    @contextlib.asynccontextmanager
    async def _scoring(self, on_note: Callable[[str], None]) -> AsyncIterator[Scorer | None]:
        if self._reward is None:
            yield None
            return
        scorer = Scorer(self._reward, on_note)
        await scorer.start()
        try:
            yield scorer
        finally:
            await scorer.close()

    @contextlib.contextmanager
    def _receiver(self) -> Iterator[ReceiverChild | None]:
        job = None if self._training is None else self._training.weights
        if job is None:
            yield None
            return
        with ReceiverChild(job) as receiver:
            yield receiver

    def _learner(
        self,
        state: RunState,
        engines: Sequence[Engine],
        scorer: Scorer | None,
        on_note: Callable[[str], None],
    ) -> Learner | None:
        if self._training is None:
            return None
        assert scorer is not None, "a trainer learns from rewards"
        return self._training.learner(
            self._out.with_name(f"{self._out.name}.spool"),
            state.machine.iteration,
            engines,
            scorer,
            # servers, and a journal that the user named, may start again with what serves
            outlives=bool(self._servers) or self._settings.config.journal.path is not None,
            on_note=on_note,
        )

    @contextlib.asynccontextmanager
    async def _engines(self, state: RunState) -> AsyncIterator[Sequence[Engine]]:
        engines: list[Engine] = []
        training = self._training
        priority: Priority = "background" if training is None else training.priority
        try:
            if self._servers:
                from .http_engine import HttpEngine

                is_known = {place.engine for place in state.places.values()}
                engines = [
                    HttpEngine(
                        url,
                        wait_s=self._wait_s,
                        is_known=url in is_known,
                        admin_key=None if training is None else training.admin_key,
                        is_trained=training is not None,
                        priority=priority,
                    )
                    for url in self._servers
                ]
            else:
                from .embedded import embedded_engine

                config, path = self._embedded_config(), self._journal_path
                assert path is not None
                with Stages() as stages:
                    engines = [await embedded_engine(config, path, stages, priority)]
            yield engines
        finally:
            for engine in engines:
                await engine.close()

    def _embedded_config(self) -> ServeConfig:
        """As set; as many rollouts run at once as are under way, unless that is set too."""
        settings = self._settings
        if "engine.batch.max_num_seqs" in settings.origins:
            return settings.config
        engine = settings.config.engine
        batch = msgspec.structs.replace(engine.batch, max_num_seqs=self._config.capacity)
        engine = msgspec.structs.replace(engine, batch=batch)
        return msgspec.structs.replace(settings.config, engine=engine)

    def _journal(self) -> Path | None:
        """Of the engine in this process; None: there is none."""
        if self._servers:
            return None
        path = self._settings.config.journal.path
        if path == "off":
            raise ConfigError("journal.path is off: a run outlives its process; name a file")
        return self._out.with_name(f"{self._out.name}.journal") if path is None else Path(path)

    def _remove_journal(self) -> None:
        """A journal that nobody named has done its work."""
        path = self._journal_path
        if path is not None and self._settings.config.journal.path is None:
            for suffix in ("-lock", "-wal", "-shm", ""):
                Path(f"{path}{suffix}").unlink(missing_ok=True)

    def _remove_weights(self) -> None:
        """No engine of this host needs them any more."""
        if self._training is not None and self._training.weights is not None:
            remove_versions(Path(self._training.weights.root), [])

    def _show(self, state: RunState, output: RolloutOutput) -> None:
        header, rows = books_rows(state.books, state.machine.total)
        show_table(rows, header=header)
        show_table(summary_rows(state))
        troubles = [f"{self._prompts}:{n}: {text}" for n, text in sorted(state.bad_lines.items())]
        bad = set(state.bad_lines)
        troubles += [
            f"given up: {self._prompts}, {text}"
            for text in state.abandoned.values()
            if not any(text.startswith(f"line {number}:") for number in bad)
        ]
        for trouble in troubles[:_SHOWN_TROUBLES]:
            sys.stderr.write(f"{trouble}\n")
        if len(troubles) > _SHOWN_TROUBLES:
            sys.stderr.write(f"… and {len(troubles) - _SHOWN_TROUBLES} more\n")
        is_done = state.machine.phase == "done"
        sys.stdout.write(f"{output.path if is_done else output.lines}\n")


def purge_warning(config: C3poConfig, max_tokens: int | None) -> str | None:
    """One line where long rollouts may be purged for their length alone: a bias towards short ones.

    max_tokens  None: up to the end of the context
    """
    safe = config.retention * (config.budget // config.capacity)
    if max_tokens is not None and max_tokens <= safe:
        return None
    text = (
        f"warning: rollouts of more than {safe} tokens (--retention {config.retention} × --budget "
        f"{config.budget} ÷ --capacity {config.capacity}) may be purged and drawn anew, which "
        "favours short ones; "
    )
    if not config.budget // config.capacity:
        return f"{text}no --retention prevents it while --budget is below --capacity"
    if max_tokens is None:
        return f"{text}set --max-tokens, for only the context bounds them, or raise --retention"
    enough = retention_without_purges(max_tokens, budget=config.budget, capacity=config.capacity)
    return f"{text}--max-tokens is {max_tokens}: --retention {enough} purges none"


def summary_rows(state: RunState) -> list[tuple[str, str]]:
    """What the run came to."""
    tally, total = state.tally, state.machine.total
    rows = [
        ("iterations", str(state.machine.iteration)),
        ("groups", str(tally.num_groups)),
        ("trajectories", str(tally.num_trajectories)),
    ]
    rows += [
        (f"ended: {reason}", f"{number}, {tokens} tokens")
        for reason, (number, tokens) in sorted(tally.endings.items())
    ]
    rows += [
        (f"fell: {reason}", f"{number}, {tokens} tokens")
        for reason, (number, tokens) in sorted(tally.fallen.items())
    ]
    rows.append(("waste", waste_text(total)))
    if tally.lost_budget:
        rows.append(("lost budget", f"{tally.lost_budget} tokens"))
    if state.bad_lines:
        rows.append(("bad lines", str(len(state.bad_lines))))
    if state.abandoned:
        rows.append(("given up", f"{len(state.abandoned)} prompts"))
    speed = total.sampled / tally.wall_s if tally.wall_s else 0.0
    rows.append(("time", f"{duration(tally.wall_s)}, {speed:.1f} tok/s"))
    return rows


def _addresses(servers: Sequence[str]) -> list[str]:
    """Raises ConfigError for what is no address, or stands twice."""
    found = [url.strip().rstrip("/") for url in servers]
    for url in found:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--server must begin with http:// or https://, got {url!r}")
        if found.count(url) > 1:
            raise ConfigError(f"--server names {url} twice")
    return found
