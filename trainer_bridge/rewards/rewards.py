"""What a rollout is worth: a registry of rewards, torch-free.

    exact     the answer, letter by letter
    numeric   the answer as a number or expression (package math-verify, extra `train`)
    regex     a pattern that is found; its group `answer` equals the answer
    function  a Python function of yours, by import path `module:function`
    http      a server of yours

`make_reward` gives the plain function; `workers.py` runs it in processes of its own, which
is how a run uses it: a reward may raise, hang, crash or answer nonsense, and the run goes on.

Code that a model wrote is not run: there is no sandbox here, and a `function` that runs such code
runs it with your rights.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ...engine.errors import ConfigError, MissingExtra
from ...engine.rollout import Rollout
from ..losses.advantages import MAX_REWARD

RewardName = Literal["exact", "numeric", "regex", "function", "http"]


class RewardSample(Struct, frozen=True, kw_only=True):
    """What a reward sees of one rollout. It is sent as it stands to an `http` reward."""

    id: str
    prompt: str = ""
    text: str
    answer: Any = None
    """Of the dataset's line; JSON."""
    metadata: Any = None
    finish_reason: str = "stop"
    """stop | length | abort | error; a rollout that was cut at its limit is `length`."""
    num_tokens: int = 0


def reward_sample(rollout: Rollout, *, prompt: str = "") -> RewardSample:
    """What a reward sees of an ended rollout; the answer is `answer` of its metadata."""
    metadata = rollout.metadata
    assert rollout.finish_reason is not None
    return RewardSample(
        id=rollout.id,
        prompt=prompt,
        text=rollout.text,
        answer=metadata.get("answer") if isinstance(metadata, dict) else None,
        metadata=metadata,
        finish_reason=rollout.finish_reason.type,
        num_tokens=len(rollout.output_ids),
    )


class ExactConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """1 if the text is the answer, else 0."""

    ignore_case: Annotated[bool, Meta(description="letters of either case are equal")] = False


class RegexConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """1 if the pattern is found, and its group `answer`, if it has one, is the answer; else 0."""

    pattern: Annotated[str, Meta(description="Python's `re`; `.` matches line ends too")] = ""


class FunctionConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a Python function returns for a `RewardSample`; it may be `async`."""

    path: Annotated[str, Meta(description="`module:function`, importable where the run starts")] = (
        ""
    )


class HttpConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST of the sample as JSON; the answer is `{"reward": number}`."""

    url: Annotated[str, Meta(description="http:// or https://")] = ""
    retries: Annotated[
        int,
        Meta(ge=0, le=10, description="after a refused connection or a 5xx, within the deadline"),
    ] = 2


class RewardConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which reward, and what becomes of a sample for which it fails."""

    name: Annotated[RewardName, Meta(description="the reward")] = "exact"
    after: Annotated[
        str,
        Meta(
            description="exact, numeric, regex look at what follows this mark, `</think>` say; a "
            "text that does not hold it exactly once is wrong"
        ),
    ] = ""
    require_stop: Annotated[
        bool, Meta(description="exact, numeric, regex: a rollout cut at its limit is wrong")
    ] = False
    exact: ExactConfig = ExactConfig()
    regex: RegexConfig = RegexConfig()
    function: FunctionConfig = FunctionConfig()
    http: HttpConfig = HttpConfig()
    workers: Annotated[int, Meta(ge=1, le=256, description="processes that score")] = 1
    deadline_s: Annotated[float, Meta(gt=0, description="for one sample, once it is begun")] = 10.0
    start_deadline_s: Annotated[
        float, Meta(gt=0, description="for a worker to import the reward")
    ] = 60.0
    on_failure: Annotated[
        Literal["reward", "drop"],
        Meta(
            description="a sample whose reward fails gets `failure_reward`, or none: it is then no "
            "part of its group's baseline and trains nothing"
        ),
    ] = "reward"
    failure_reward: Annotated[float, Meta(description="see on_failure")] = 0.0

    def check(self, path: str = "reward") -> None:
        """Raise ConfigError, or MissingExtra, in one line, for what cannot work."""
        if not abs(self.failure_reward) <= MAX_REWARD:
            raise ConfigError(
                f"{path}.failure_reward must be finite, at most {MAX_REWARD:g}, "
                f"got {self.failure_reward}"
            )
        if self.name == "numeric" and importlib.util.find_spec("math_verify") is None:
            raise MissingExtra("math-verify", "train", "the numeric reward")
        if self.name == "regex":
            if not self.regex.pattern:
                raise ConfigError(f"{path}.regex.pattern is empty: give a pattern to look for")
            try:
                re.compile(self.regex.pattern)
            except re.error as error:
                raise ConfigError(f"{path}.regex.pattern is no pattern: {error}") from None
        if self.name == "function" and not _PATH.fullmatch(self.function.path):
            raise ConfigError(
                f"{path}.function.path must be module:function, got {self.function.path!r}"
            )
        if self.name == "http" and not re.match(r"https?://[^/]", self.http.url):
            raise ConfigError(f"{path}.http.url must begin with http://, got {self.http.url!r}")


Reward = Callable[[RewardSample], Any]

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class RewardError(Exception):
    """A reward that cannot be had; the message is one line, without the sample's id."""


def make_reward(config: RewardConfig) -> Reward:
    """The function that `config` describes, to be called in this process.

    It returns whatever the reward returns, and raises whatever it raises: `number_of` judges.
    Raises ConfigError or MissingExtra, and for `function` whatever its import raises.
    """
    config.check()
    return MAKERS[config.name](config)


def number_of(value: Any) -> float:
    """A reward as a float. Raises RewardError for what is no finite number, or one that no group
    could have (`advantages.MAX_REWARD`); True is 1."""
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    if not isinstance(value, numbers.Real):
        raise RewardError(f"returned {_short(value)} ({type(value).__name__}), not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        raise RewardError(f"returned {_short(value)}, which no float can hold") from None
    if not math.isfinite(number):
        raise RewardError(f"returned {number}, not a finite number")
    if abs(number) > MAX_REWARD:
        raise RewardError(f"returned {number:g}, more than {MAX_REWARD:g}")
    return number


def described(error: BaseException) -> str:
    """An exception of a reward in one line: type, message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    # the user's line, not that of the import or of our call
    ours = os.path.dirname(__file__)
    known = [
        frame
        for frame in frames
        if "importlib" not in frame.filename and os.path.dirname(frame.filename) != ours
    ]
    place = f" ({known[-1].filename}:{known[-1].lineno})" if known else ""
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}{': ' if text else ''}{text[:300]}{place}"


def _exact(config: RewardConfig) -> Reward:
    def reward(sample: RewardSample) -> float:
        answer, found = _answer(sample), _looked_at(config, sample)
        if found is None:
            return 0.0
        if config.exact.ignore_case:
            answer, found = answer.casefold(), found.casefold()
        return float(found.strip() == answer.strip())

    return reward


def _numeric(config: RewardConfig) -> Reward:
    import logging

    from math_verify import parse, verify

    # its own time limits are off (0, None), and it would say so at every call; ours ends a worker
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def reward(sample: RewardSample) -> float:
        answer, found = _answer(sample), _looked_at(config, sample)
        is_latex = "$" in answer or "\\boxed" in answer
        gold = parse(answer if is_latex else f"${answer}$", parsing_timeout=None)
        if not gold:
            raise RewardError(f"the answer {_short(answer)} is no number or expression")
        if found is None:
            return 0.0
        return float(verify(gold, parse(found, parsing_timeout=None), timeout_seconds=None))

    return reward


def _regex(config: RewardConfig) -> Reward:
    pattern = re.compile(config.regex.pattern, re.DOTALL)

    def reward(sample: RewardSample) -> float:
        found = _looked_at(config, sample)
        match = pattern.search(found) if found is not None else None
        if match is None:
            return 0.0
        if "answer" not in pattern.groupindex:
            return 1.0
        return float((match["answer"] or "").strip() == _answer(sample).strip())

    return reward


def _function(config: RewardConfig) -> Reward:
    module, _, name = config.function.path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"reward.function.path: {module!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"reward.function.path: {config.function.path} cannot be called")
    reward: Reward = found
    return reward


def _http(config: RewardConfig) -> Reward:
    import httpx

    client = httpx.Client(timeout=config.deadline_s)

    def reward(sample: RewardSample) -> Any:
        body = msgspec.json.encode(sample)
        for attempt in range(config.http.retries + 1):
            if attempt:
                time.sleep(0.1 * 4 ** (attempt - 1))
            try:
                answer = client.post(
                    config.http.url, content=body, headers={"content-type": "application/json"}
                )
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code < 500:
                return _reward_in(answer.status_code, answer.content)
            failure = f"HTTP {answer.status_code}"
        raise RewardError(f"cannot be had from {config.http.url}: {failure}")

    return reward


def _reward_in(status: int, content: bytes) -> Any:
    if status != 200:
        raise RewardError(f"answered HTTP {status}: {_short(content.decode(errors='replace'))}")
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise RewardError(f"answered what is no JSON: {error}") from None
    if not isinstance(body, dict) or "reward" not in body:
        raise RewardError(f'answered {_short(body)}, not {{"reward": number}}')
    return body["reward"]


MAKERS: Mapping[RewardName, Callable[[RewardConfig], Reward]] = {
    "exact": _exact,
    "numeric": _numeric,
    "regex": _regex,
    "function": _function,
    "http": _http,
}


def _looked_at(config: RewardConfig, sample: RewardSample) -> str | None:
    """The part of the text that is compared; None: the rollout is wrong whatever it says."""
    if config.require_stop and sample.finish_reason != "stop":
        return None
    if not config.after:
        return sample.text
    parts = sample.text.split(config.after)
    return parts[1] if len(parts) == 2 else None


def _answer(sample: RewardSample) -> str:
    if isinstance(sample.answer, str):
        return sample.answer
    if isinstance(sample.answer, int | float) and not isinstance(sample.answer, bool):
        return str(sample.answer)
    raise RewardError(f"needs an answer that is a string or a number, got {_short(sample.answer)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
