"""One HTTP request's rollouts: from wire parameters to a submission, to the parts of an answer."""

import contextlib
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from typing import Self

from msgspec import UNSET, UnsetType, structs
from starlette.requests import Request

from ...engine.errors import InvalidRequest
from ...engine.journal.ops import RequestKey
from ...engine.manager.intake import Submission
from ...engine.manager.manager import Delta
from ...engine.messages import Ready
from ...engine.rollout import (
    FinishReason,
    LogprobsMode,
    Record,
    Rollout,
    RolloutState,
    SamplingParams,
    derive_seed,
)
from ..json_values import check_metadata
from ..service import Service
from ..stream import deltas, failure, unless_disconnected
from .logprobs import LogprobsWriter, TokenNames, extension, prompt_logprobs
from .wire import (
    Choice,
    CompletionTokensDetails,
    Extension,
    GenerationRequest,
    PromptLogprobs,
    PromptTokensDetails,
    SamplingFields,
    Usage,
)


def sampling_of(
    request: SamplingFields,
    *,
    max_tokens: int | None,
    num_top: int | None,
    mode: LogprobsMode,
    num_prompt_top: int | None,
    record: Sequence[Record],
) -> SamplingParams:
    """`num_top`: alternatives per token where logprobs are wanted, else None."""
    record = list(dict.fromkeys(record))
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

    Use as a context manager: on leaving, what still runs is cancelled and all is forgotten, save
    durable rollouts, which go on for whoever comes back with their key.
    `hides_output`: the prompt alone is scored; the one token that a rollout needs is not shown.
    `is_replay`: they were made by an earlier request with the same key.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        rollouts: list[Rollout],
        *,
        hides_output: bool,
        is_replay: bool,
    ) -> None:
        self.service = service
        self.request = request
        self.model = service.model_name(request.model)
        self.rollouts = rollouts
        self.info: Ready = service.manager.known_info
        self.hides_output = hides_output
        self.is_replay = is_replay
        self._eos_ids = set(service.tokenizer.eos_ids if service.tokenizer else self.info.eos_ids)
        self.names = TokenNames(service.tokenizer, request.return_tokens_as_token_ids)

    @classmethod
    async def submit(
        cls,
        service: Service,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        *,
        key: RequestKey | None,
        hides_output: bool = False,
    ) -> Self:
        """With a key: durable rollouts, the same ones for the same request.

        Raises InvalidRequest, KeyReused, and whatever the manager refuses with.
        """
        manager = service.manager
        submissions = list(_submissions(request, prompts, sampling, manager.known_info))
        is_replay = False
        rollouts: list[Rollout] = []
        if key is None:
            try:
                for submission in submissions:
                    rollouts += manager.submit(submission)
            except BaseException:
                manager.drop([rollout.id for rollout in rollouts])
                raise
        else:
            check_metadata(request.metadata)
            accepted = await manager.accept(submissions, key)
            is_replay = accepted.is_replay
            rollouts = [await manager.find(rollout_id) for rollout_id in accepted.rollout_ids]
        return cls(service, request, rollouts, hides_output=hides_output, is_replay=is_replay)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.service.manager.drop(self.ids)

    @property
    def ids(self) -> list[str]:
        return [rollout.id for rollout in self.rollouts]

    @property
    def created(self) -> int:
        """Unix time of the request that made them."""
        return int(self.rollouts[0].created_s)

    def id_as(self, prefix: str) -> str:
        """The answer's id: the same whenever it is asked for again."""
        return f"{prefix}-{self.rollouts[0].id.removeprefix('ro-')}"

    async def finish(self, http: Request) -> None:
        """Wait until all have ended. Raises RolloutFailed, and ClientGone when nobody waits."""
        await unless_disconnected(http, self._ended())

    async def _ended(self) -> None:
        for index, rollout_id in enumerate(self.ids):
            rollout = await self.service.manager.wait(rollout_id)
            self.rollouts[index] = rollout
            if rollout.state is RolloutState.FAILED:
                raise failure(self.service.manager, rollout)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(choice, delta) as they come; `rollouts` follow. Raises RolloutFailed."""
        async with contextlib.aclosing(deltas(self.service.manager, self.ids)) as news:
            async for index, delta in news:
                self.rollouts[index] = delta.rollout
                yield index, delta

    # --- parts of an answer

    def num_tokens(self, rollout: Rollout) -> int:
        """Output tokens that the client sees."""
        return 0 if self.hides_output else len(rollout.output_ids)

    def common(self, choice: Choice, rollout: Rollout) -> None:
        """Fill what a choice carries once its rollout has ended."""
        reason = rollout.finish_reason
        assert reason is not None, f"{rollout.id} has not ended"
        choice.finish_reason = "length" if self.hides_output else reason.type
        choice.stop_reason = stop_reason_of(reason, self._eos_ids)
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
        """Of the weights that made the last token."""
        segments = self.rollouts[0].segments
        made_by = segments[-1] if segments else self.info
        return f"{made_by.numerics}@{made_by.digest[:12]}"

    def headers(self) -> dict[str, str]:
        """Oldest and newest policy version in the answer, as far as it has come."""
        versions = {version for rollout in self.rollouts for version in rollout.versions}
        headers = {"idempotent-replayed": "true"} if self.is_replay else {}
        if versions:
            headers["x-everstep-versions"] = f"{min(versions)}-{max(versions)}"
        return headers


def stop_reason_of(reason: FinishReason, eos_ids: Collection[int]) -> int | str | None:
    """The stop string or token that it ended with; None for the model's own end."""
    return None if reason.matched in eos_ids else reason.matched


def _submissions(
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    info: Ready,
) -> Iterator[Submission]:
    """One per prompt."""
    seen: dict[tuple[int, ...], int] = {}
    for prompt_ids in prompts:
        prompt_ids = truncated(prompt_ids, request, sampling, info)
        own = sampling
        if sampling.seed is not None:
            # the same prompt twice in one request must not give the same sample twice
            repeat = seen.setdefault(tuple(prompt_ids), 0)
            seen[tuple(prompt_ids)] += 1
            own = _for_repeat(sampling, sampling.seed, repeat)
        yield Submission(
            prompt_ids=prompt_ids,
            sampling=own,
            samples=request.n,
            priority=request.priority,
            client=request.user or "",
            metadata=request.metadata,
        )


def truncated(
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
