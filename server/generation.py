"""One HTTP request's rollouts: from wire parameters to a submission, to the parts of an answer."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Self

from msgspec import UNSET, Struct, UnsetType, structs
from starlette.requests import Request

from ..engine.errors import InvalidRequest, UnknownModel
from ..engine.intake import Submission
from ..engine.manager import RolloutManager
from ..engine.messages import Ready
from ..engine.rollout import (
    LogprobsMode,
    Record,
    Rollout,
    RolloutState,
    SamplingParams,
    derive_seed,
)
from ..engine.tokenizer import Tokenizer
from .config import ServeConfig
from .logprobs import LogprobsWriter, TokenNames, extension, prompt_logprobs
from .openai_types import (
    Choice,
    CompletionTokensDetails,
    Extension,
    GenerationRequest,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from .stream import failure, unless_disconnected

# longer texts are encoded on a thread, so that the event loop goes on
LONG_TEXT = 20_000


class Service(Struct, frozen=True):
    """What the endpoints stand on."""

    manager: RolloutManager
    tokenizer: Tokenizer | None
    config: ServeConfig
    created: int

    def model_name(self, requested: str | None) -> str:
        """The name for the reply; raises UnknownModel."""
        names = self.config.model_names
        if requested is not None and requested not in names:
            raise UnknownModel(
                f"model {requested!r} is not served here; served: {', '.join(names)}", field="model"
            )
        return requested or names[0]

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Raises InvalidRequest before any of them is encoded."""
        most = self.config.openai.max_choices
        if num_prompts * n > most:
            raise InvalidRequest(
                f"{num_prompts} prompts × n = {n} are {num_prompts * n} choices; "
                f"at most {most} are accepted in one request",
                field="n",
            )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequest(
                "this server runs without a tokenizer (skip_tokenizer_init): "
                "send token ids as the prompt",
                field="prompt",
            )

        def encode() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]

        if sum(map(len, texts)) < LONG_TEXT:
            return encode()
        return await asyncio.to_thread(encode)


def sampling_of(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    num_top: int | None,
    mode: LogprobsMode,
    num_prompt_top: int | None,
) -> SamplingParams:
    """`num_top`: alternatives per token where logprobs are wanted, else None."""
    record: list[Record] = list(dict.fromkeys(request.record))
    if num_top is not None and mode == "raw" and "lp_raw" not in record:
        record.append("lp_raw")
    stop = request.stop or ()
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output or request.no_stop_trim,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
        prompt_logprobs=num_prompt_top,
        top_logprobs=num_top or 0,
        logprobs_mode=mode,
        record=tuple(record),
    )


class Generation:
    """The rollouts of one request, prompt-major: choice = prompt index × n + sample index.

    Use as a context manager: on leaving, what still runs is cancelled and all is forgotten.
    `hides_output`: the prompt alone is scored; the one token that a rollout needs is not shown.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        *,
        hides_output: bool = False,
    ) -> None:
        self.service = service
        self.request = request
        self.model = service.model_name(request.model)
        self.created = int(time.time())
        self.rollouts: list[Rollout] = []
        self.info: Ready = service.manager.info
        self.hides_output = hides_output
        self._eos_ids = set(service.tokenizer.eos_ids if service.tokenizer else self.info.eos_ids)
        self.names = TokenNames(service.tokenizer, request.return_tokens_as_token_ids)
        try:
            self._submit(prompts, sampling)
        except BaseException:
            self.close()
            raise

    def _submit(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> None:
        seen: dict[tuple[int, ...], int] = {}
        for prompt_ids in prompts:
            prompt_ids = _truncated(prompt_ids, self.request, sampling, self.info)
            own = sampling
            if sampling.seed is not None:
                # the same prompt twice in one request must not give the same sample twice
                repeat = seen.setdefault(tuple(prompt_ids), 0)
                seen[tuple(prompt_ids)] += 1
                own = _for_repeat(sampling, sampling.seed, repeat)
            self.rollouts += self.service.manager.submit(
                Submission(
                    prompt_ids=prompt_ids,
                    sampling=own,
                    samples=self.request.n,
                    priority=self.request.priority,
                    client=self.request.user or "",
                    metadata=self.request.metadata,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        manager = self.service.manager
        manager.drop(self.ids)

    @property
    def ids(self) -> list[str]:
        return [rollout.id for rollout in self.rollouts]

    async def finish(self, http: Request) -> None:
        """Wait until all have ended. Raises RolloutFailed, and ClientGone when nobody waits."""
        await unless_disconnected(http, self._ended())

    async def _ended(self) -> None:
        for rollout in self.rollouts:
            await self.service.manager.wait(rollout.id)
            if rollout.state is RolloutState.FAILED:
                raise failure(self.service.manager, rollout)

    # --- parts of an answer

    def num_tokens(self, rollout: Rollout) -> int:
        """Output tokens that the client sees."""
        return 0 if self.hides_output else len(rollout.output_ids)

    def common(self, choice: Choice, rollout: Rollout) -> None:
        """Fill what a choice carries once its rollout has ended."""
        reason = rollout.finish_reason
        assert reason is not None, f"{rollout.id} has not ended"
        choice.finish_reason = "length" if self.hides_output else reason.type
        if reason.matched is not None and reason.matched not in self._eos_ids:
            choice.stop_reason = reason.matched
        choice.everstep = self.extension(rollout)

    def ids_of(self, rollout: Rollout, start: int, end: int) -> list[int] | UnsetType:
        """`token_ids`, where asked for or where there is no text."""
        is_wanted = self.request.return_token_ids or self.service.tokenizer is None
        return rollout.output_ids[start:end] if is_wanted else UNSET

    def prompt_ids_of(self, rollout: Rollout) -> list[int] | UnsetType:
        return rollout.prompt_ids if self.request.return_token_ids else UNSET

    def prompt_logprobs_of(self, rollout: Rollout) -> PromptLogprobs | UnsetType:
        if self.request.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(rollout, self.names)

    def extension(self, rollout: Rollout) -> Extension | UnsetType:
        if not self.request.record and not self.request.return_meta_info:
            return UNSET
        return extension(rollout, self.info, self.num_tokens(rollout))

    def writer(self, num_top: int | None, mode: LogprobsMode) -> LogprobsWriter | None:
        return None if num_top is None else LogprobsWriter(self.names, mode, num_top)

    def usage(self, *, num_output: int | None = None, num_reasoning: int | None = None) -> Usage:
        """A prompt counts once, however many samples it has. `num_output`: so far, in a stream."""
        n = self.request.n
        prompts = [self.rollouts[i : i + n] for i in range(0, len(self.rollouts), n)]
        num_prompt = sum(len(samples[0].prompt_ids) for samples in prompts)
        num_cached = sum(min(r.num_cached_tokens for r in samples) for samples in prompts)
        if num_output is None:
            num_output = sum(self.num_tokens(rollout) for rollout in self.rollouts)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(num_cached),
            completion_tokens_details=(
                UNSET if num_reasoning is None else CompletionTokensDetails(num_reasoning)
            ),
        )

    @property
    def fingerprint(self) -> str:
        return f"{self.info.numerics}@{self.info.digest[:12]}"

    def headers(self) -> dict[str, str]:
        """Oldest and newest policy version in the answer."""
        versions = {version for rollout in self.rollouts for version in rollout.versions}
        if not versions:
            return {}
        return {"x-everstep-versions": f"{min(versions)}-{max(versions)}"}


def request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _truncated(
    prompt_ids: list[int], request: GenerationRequest, sampling: SamplingParams, info: Ready
) -> list[int]:
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens must be -1 (as many as fit) or at least 1, got 0",
            field="truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, info.max_model_len - (sampling.max_tokens or 1))
    return prompt_ids[-keep:]


def _for_repeat(sampling: SamplingParams, seed: int, repeat: int) -> SamplingParams:
    if not repeat:
        return sampling
    # 64 bits without a sign, into a field that has one
    return structs.replace(sampling, seed=derive_seed("repeat", seed, repeat) - 2**63)
