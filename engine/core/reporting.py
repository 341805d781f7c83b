"""What the front is told of one row: `RowResult` → `RolloutTokens`.

Rows that are computed again (after a preemption that lost their KV) were reported before:
`num_reported_rows` is the high-water mark, and what lies below it is cut off here.
"""

from typing import Any

from ..messages import RolloutTokens
from ..rollout import FinishReason
from .admission import LiveRollout
from .plan import Row, RowResult, Sampled

NOTHING: list[Any] = []


def ending(rollout: LiveRollout, result: RowResult) -> FinishReason | None:
    """Why the rollout ends with this row, which is not booked yet; None: it goes on."""
    if result.nonfinite is not None:
        return FinishReason("error", detail=f"nonfinite: {result.nonfinite}")
    if result.fault is not None:
        return FinishReason("error", detail=f"internal: {result.fault}")
    if result.sampled is None:
        return None
    if result.sampled.token_id in rollout.stop_ids:
        return FinishReason("stop", matched=result.sampled.token_id)
    return FinishReason("length") if len(rollout.ids) + 1 >= rollout.max_length else None


def report(
    rollout: LiveRollout, row: Row, result: RowResult, finish: FinishReason | None
) -> RolloutTokens | None:
    """The news of one row, which is not booked yet, or None.

    Lists that stay empty are one and the same list: making thirteen anew for each row of each
    step costs more than all the rest of the booking.
    """
    sampled = result.sampled
    if sampled is not None:
        tokens = RolloutTokens(
            rollout_id=rollout.id,
            start=row.position,
            ids=[sampled.token_id],
            lp_sampled=[sampled.lp_sampled],
            lp_temp=[sampled.lp_temp],
            kept_mass=[sampled.kept_mass],
            flags=[sampled.flags],
            lp_raw=NOTHING,
            entropy=NOTHING,
            kept_ids=NOTHING,
            top=NOTHING,
            prompt_lp=NOTHING,
            prompt_top=NOTHING,
            finish=finish,
        )
        has_news = True
    else:
        tokens = RolloutTokens(rollout_id=rollout.id, start=row.position, finish=finish)
        has_news = finish is not None
    if rollout.num_cached_tokens is not None:
        tokens.num_cached_tokens, rollout.num_cached_tokens = rollout.num_cached_tokens, None
        has_news = True
    if rollout.has_extras:
        if sampled is not None:
            _add_sampled_extras(tokens, sampled)
        if not result.is_bad:
            has_news |= _add_row_records(tokens, rollout, row, result)
    return tokens if has_news else None


def _add_sampled_extras(tokens: RolloutTokens, sampled: Sampled) -> None:
    if sampled.lp_raw is not None:
        tokens.lp_raw = [sampled.lp_raw]
    if sampled.entropy is not None:
        tokens.entropy = [sampled.entropy]
    if sampled.kept_ids is not None:
        tokens.kept_ids = [sampled.kept_ids]
    if sampled.top is not None:
        tokens.top = [sampled.top]


def _add_row_records(
    tokens: RolloutTokens, rollout: LiveRollout, row: Row, result: RowResult
) -> bool:
    """Prompt logprobs and routing of the rows above the high-water mark."""
    count = row.num_tokens
    skip = max(0, rollout.num_reported_rows - row.start)
    if skip >= count:
        return False
    has_news = False
    if rollout.add.sampling.prompt_logprobs is not None and row.start + skip < rollout.num_prompt:
        # row p speaks of prompt position p + 1; nothing speaks of position 0
        last = rollout.num_prompt - 1 - row.start
        tokens.prompt_start = row.start + skip + 1
        tokens.prompt_lp = list(result.prompt_lp[skip:last])
        tokens.prompt_top = result.prompt_top[skip:last]
        if row.start + skip == 0:
            tokens.prompt_start = 0
            tokens.prompt_lp.insert(0, None)
            if rollout.add.sampling.prompt_logprobs:
                tokens.prompt_top = [[], *tokens.prompt_top]
        has_news = bool(tokens.prompt_lp)
    if result.routing_ids:
        tokens.routing_start = row.start + skip
        tokens.routing_ids = result.routing_ids[skip * (len(result.routing_ids) // count) :]
        size = len(result.routing_weights) // count
        tokens.routing_weights = result.routing_weights[skip * size :]
        has_news = True
    return has_news
