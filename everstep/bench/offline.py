"""`everstep bench offline`: the engine in this process, through everstep.LLM."""

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from ..clients.llm import LLM
from ..engine.errors import ContextTooLong
from ..engine.manager.intake import Submission
from ..engine.manager.manager import RolloutManager
from ..engine.rollout import SamplingParams, check_prompt
from .report import Measured, Run
from .workload import Ask

Count = Callable[[int, int], None]


def run_offline(
    llm: LLM,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    sampling: SamplingParams,
    on_count: Count = lambda *_: None,
) -> Run:
    """Answer all, at most `concurrency` rollouts live at a time.

    asks      prompts as ids; each ends after its own number of output tokens
    on_count  told (ended, total)

    Raises InvalidRequest (ContextTooLong) before anything runs; a rollout that fails alone is
    counted.
    """
    submissions = [_submission(llm, ask, sampling) for ask in asks]
    on_count(0, len(asks))
    started = time.perf_counter()
    requests = llm.run(_run_all(llm.manager, submissions, concurrency, on_count))
    seconds = time.perf_counter() - started
    return Run(
        model=llm.config.model.path,
        requests=requests,
        duration_s=seconds,
        concurrency=concurrency,
    )


def _submission(llm: LLM, ask: Ask, sampling: SamplingParams) -> Submission:
    info, ids = llm.info, ask.prompt
    assert isinstance(ids, list)
    check_prompt(ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
    if len(ids) + ask.output_tokens > info.max_model_len:
        raise ContextTooLong(
            f"{len(ids)} prompt tokens and {ask.output_tokens} of output do not fit the context "
            f"of {info.max_model_len}: lower --input-len or --output-len"
        )
    params = msgspec.structs.replace(sampling, max_tokens=ask.output_tokens)
    return Submission(prompt_ids=ids, sampling=params)


async def _run_all(
    manager: RolloutManager, submissions: Sequence[Submission], concurrency: int, on_count: Count
) -> list[Measured]:
    room, num_ended = asyncio.Semaphore(concurrency), 0

    async def one(submission: Submission) -> Measured:
        nonlocal num_ended
        async with room:
            measured = await _measure(manager, submission)
        num_ended += 1
        on_count(num_ended, len(submissions))
        return measured

    return await asyncio.gather(*map(one, submissions))


async def _measure(manager: RolloutManager, submission: Submission) -> Measured:
    measured = Measured(len(submission.prompt_ids), time.perf_counter())
    [rollout] = manager.submit(submission)
    try:
        async for delta in manager.stream(rollout.id):
            if delta.end > delta.start:
                measured.arrivals.append(time.perf_counter())
    finally:
        manager.drop([rollout.id])
    measured.ended_s = time.perf_counter()
    measured.output_tokens = len(rollout.output_ids)
    reason = rollout.finish_reason
    if reason is not None and reason.type in ("error", "abort"):
        measured.error = reason.detail or reason.type
    return measured
