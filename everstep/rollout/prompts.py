"""The prompts of `everstep rollout`: JSON lines, epoch after epoch, read as a stream.

A line is {"prompt": text} or {"messages": […]} or {"prompt_ids": […]}, with an `id` (else it is
`line-N`), `metadata`, and `sampling` in the names of POST /rollouts. A line that is none is named
and passed over; it stops nothing.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, Struct

from ..clients.flows import sampling_fields
from ..engine.errors import ConfigError, InvalidRequest
from ..engine.rollout import Record, SamplingParams
from ..server.batches.lines import parse_line
from ..server.batches.output import IdSet
from ..server.batches.run import MAX_LINE_BYTES, Line, read_lines
from ..server.decoding import decode_own
from ..server.json_values import check_metadata
from ..server.openai.generation import sampling_of
from ..server.openai.wire import Message, TokenId, Tool
from ..server.rollouts.wire import Sampling, prompt_field
from ..trainer_bridge.run.engine import Prompt
from ..trainer_bridge.run.words import KeptPrompt, Position

_OPTIONS = (
    *("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    "add_special_tokens",
)


class PromptLine(Struct, frozen=True, kw_only=True):
    """A line; exactly one of prompt_ids, prompt and messages, as in POST /rollouts."""

    id: str | int | None = None
    prompt_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] = []
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    sampling: Sampling = Sampling()
    metadata: Any = None


class PromptFile:
    """The file, open at one position; a `Source` of the driver.

    sampling  what holds where a line says nothing
    """

    def __init__(self, path: Path, sampling: SamplingParams, *, epochs: int = 1) -> None:
        """Raises ConfigError where the file cannot be read."""
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file of JSON lines")
        if not path.is_file():
            raise ConfigError(
                f"{path} is no regular file: a run reads its prompts again when it goes on; write "
                "them into one"
            )
        self._path = path
        self._sampling = sampling
        self._epochs = epochs
        self._epoch = 0
        self._passed = 0, ""
        try:
            self._file = _opened(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        self._rewind()

    def resume(self, position: Position) -> None:
        """Stand where an earlier run stood. Raises ConfigError where the lines before are others.

        A run that was at its end goes on where there are more epochs now. The file may have moved,
        and may have got more lines.
        """
        if position == Position():
            return
        self._skip(position.passed, position.passed_digest)
        self._passed = position.passed, position.passed_digest
        self._epoch = position.epoch
        self._rewind()
        self._skip(position.line, position.digest)

    def _skip(self, lines: int, digest: str) -> None:
        """Read so many, which are known by their digest."""
        while self._number < lines:
            line = self._next()
            if line is None:
                break
            # bad ones were named when they were read
            with contextlib.suppress(InvalidRequest):
                self._name_of(line)
        if self._number != lines:
            raise ConfigError(
                f"{self._path} has {self._number} lines, and the run has read {lines}; give it the "
                "same file, or name another output"
            )
        if lines and self._digest.hexdigest() != digest:
            raise ConfigError(
                f"{self._path}: its first {lines} lines are not those that the run has read; give "
                "it the same file, or name another output"
            )

    def read(self, count: int) -> tuple[list[KeptPrompt], dict[int, str], Position]:
        """Up to `count` more that can be parsed, bad lines on the way, and where it stands then."""
        found: list[KeptPrompt] = []
        bad: dict[int, str] = {}
        while len(found) < count and self._epoch < self._epochs:
            line = self._next()
            if line is None:
                self._passed = self._number, self._digest.hexdigest()
                self._epoch += 1
                self._rewind()
                continue
            if line.is_blank:
                continue
            try:
                name = self._name_of(line)
                kept = KeptPrompt(f"{name}@{self._epoch}", line.number, self._epoch, line.raw)
                self.prompt(kept)
            except InvalidRequest as error:
                bad[line.number] = str(error)
            else:
                found.append(kept)
        return found, bad, self.position

    @property
    def position(self) -> Position:
        is_at_end = self._epoch >= self._epochs
        digest = self._digest.hexdigest()
        return Position(self._epoch, self._number, digest, is_at_end, *self._passed)

    def prompt(self, kept: KeptPrompt) -> Prompt:
        """The prompt that a line asks for. Raises InvalidRequest naming the field."""
        fields = {k: v for k, v in parse_line(kept.raw).items() if v is not None}
        flags = sampling_fields(self._sampling)
        own = fields.get("sampling")
        if own is None or isinstance(own, dict):
            fields["sampling"] = flags | {k: v for k, v in (own or {}).items() if v is not None}
        line = decode_own(fields, PromptLine, inner=("sampling",))
        prompt_field(line)
        check_metadata(line.metadata)
        return Prompt(
            id=kept.name.rpartition("@")[0],
            prompt_ids=line.prompt_ids,
            prompt=line.prompt,
            messages=fields.get("messages"),
            options={name: fields[name] for name in _OPTIONS if name in fields},
            sampling=_sampling(line.sampling, own or {}, self._sampling.record),
            metadata=line.metadata,
        )

    def close(self) -> None:
        self._file.close()

    def _rewind(self) -> None:
        self._file.seek(0)
        self._lines = read_lines(self._file)
        self._number = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._ids = IdSet()

    def _next(self) -> Line | None:
        line = next(self._lines, None)
        if line is not None:
            self._number = line.number
            self._digest.update(line.raw or str(line.num_bytes).encode())
        return line

    def _name_of(self, line: Line) -> str:
        """Its id; raises InvalidRequest where an earlier line has it."""
        if line.num_bytes > MAX_LINE_BYTES:
            raise InvalidRequest(
                f"the line has {line.num_bytes} bytes, at most {MAX_LINE_BYTES} are read"
            )
        wanted = parse_line(line.raw).get("id")
        if isinstance(wanted, bool) or wanted == "" or not isinstance(wanted, str | int | None):
            raise InvalidRequest(f"id must be text or a number, got {wanted!r}", field="id")
        name = f"line-{line.number}" if wanted is None else str(wanted)
        if not self._ids.add(name):
            raise InvalidRequest(f"id {name!r} is that of an earlier line", field="id")
        return name


def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=1 << 20)


def _sampling(
    sampling: Sampling, given: Mapping[str, Any], record: Sequence[Record]
) -> SamplingParams:
    """As the engine takes it; raises InvalidRequest for what has no place in training."""
    if given.get("seed") is not None:
        raise InvalidRequest(
            "sampling.seed: each sample's seed follows from --seed, the line's id, the epoch, the "
            "sample and the attempt; leave it out",
            field="sampling.seed",
        )
    params = sampling_of(
        sampling,
        max_tokens=sampling.max_tokens,
        num_top=sampling.top_logprobs or None,
        mode=sampling.logprobs_mode or "raw",
        num_prompt_top=sampling.prompt_logprobs,
        record=record,
    )
    return check_temperature(params)


def check_temperature(sampling: SamplingParams) -> SamplingParams:
    """Raise InvalidRequest for greedy sampling: a group of it is one answer, and has no ratio."""
    if sampling.temperature == 0.0:
        raise InvalidRequest(
            "temperature is 0: the samples of a group would all be the same; accepted: above 0",
            field="temperature",
        )
    return msgspec.structs.replace(sampling, seed=None)
