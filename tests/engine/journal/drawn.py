"""Rollouts drawn and made: with every optional column, under several origins, in every state."""

import math
from array import array

from hypothesis import strategies as st

from everstep.engine.journal.ops import Extra, Grown, Origin
from everstep.engine.rollout import ENDED, LIVE, FinishReason, Rollout, RolloutState, SamplingParams

ORIGINS = (
    Origin(1, "aa", "cpu-f32", "core-1"),
    Origin(2, "bb", "cpu-f32", "core-1"),
    Origin(2, "bb", "cpu-f32", "core-2", "recomputed"),
)

ids = st.one_of(st.integers(0, 9), st.integers(0, 2**31 - 1))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
pairs = st.tuples(ids, st.one_of(floats, st.just(-math.inf)))
metadata = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
samplings = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(seed=-(2**63), stop=("ab", "é"), logit_bias={3: -1.5}),
        SamplingParams(record=("lp_raw", "entropy", "kept_ids", "routing"), top_logprobs=2),
    ]
)


def narrow(value: float) -> float:
    """As float32."""
    return array("f", [value])[0]


@st.composite
def grown(draw: st.DrawFn, rollout_id: str, start: int, *, records: bool, most: int = 4) -> Grown:
    """New tokens; with `records` every optional column is there."""
    num = draw(st.integers(0 if records else 1, most))

    def column(values):
        return draw(st.lists(values, min_size=num, max_size=num))

    news = Grown(
        rollout_id=rollout_id,
        start=start,
        ids=column(ids),
        lp_sampled=column(floats),
        lp_temp=column(floats),
        kept_mass=column(floats),
        flags=column(st.integers(1, 7)),
        num_cached_tokens=draw(st.none() | st.integers(0, 99)),
    )
    if records:
        news.extra = Extra(
            lp_raw=column(floats),
            entropy=column(floats),
            kept_ids=column(st.lists(ids, max_size=3)),
            top=column(st.lists(pairs, max_size=2)),
            routing_ids=draw(st.binary(max_size=6)),
            routing_weights=draw(st.binary(max_size=6)),
        )
    return news


@st.composite
def rollouts(
    draw: st.DrawFn,
    *,
    rollout_id: str = "ro-1",
    state: RolloutState | None = None,
    records: bool | None = None,
) -> Rollout:
    """A whole rollout, as a manager holds it. records: whether every optional column is there."""
    from everstep.engine.journal.ops import grow

    prompt = draw(st.lists(ids, min_size=1, max_size=4))
    rollout = Rollout(
        id=rollout_id,
        group_id=draw(st.sampled_from(["grp-1", "grp-2"])),
        index=draw(st.integers(0, 3)),
        prompt_ids=prompt,
        sampling=draw(samplings.filter(lambda s: records in (None, bool(s.record)))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        max_tokens=draw(st.integers(1000, 2**31 - 1)),
        priority=draw(st.integers(-3, 3)),
        client=draw(st.sampled_from(["", "ann"])),
        metadata=draw(metadata),
        attempt=draw(st.integers(0, 2)),
        pool=draw(st.sampled_from(["", "train"])),
        is_durable=draw(st.booleans()),
        forked_from=draw(st.none() | st.just(("ro-0", 2))),
        created_s=draw(st.sampled_from([0.0, 1_800_000_000.123])),
    )
    records = bool(rollout.sampling.record)
    for origin in draw(st.lists(st.sampled_from(ORIGINS), max_size=3)):
        start = len(rollout.output_ids)
        news = draw(grown(rollout_id, start, records=records))
        grow(rollout, origin, news, draw(st.sampled_from([0.0, 1_800_000_001.5])))
    if records and draw(st.booleans()):
        count = draw(st.integers(1, len(prompt)))
        rollout.prompt_lp = [None, *draw(st.lists(floats, min_size=count - 1, max_size=count - 1))]
        rollout.prompt_top = [[], *([[(1, -0.5), (2, -1.5)]] * (count - 1))]
    rollout.state = draw(st.sampled_from(sorted(LIVE | ENDED))) if state is None else state
    if rollout.state in ENDED:
        end(rollout, rollout.state)
    rollout.text = draw(st.text(max_size=5))
    rollout.text_offset = len(rollout.text)
    return rollout


def end(rollout: Rollout, state: RolloutState = RolloutState.FINISHED) -> Rollout:
    """Its ending, in place."""
    kinds = {"finished": "length", "aborted": "abort", "failed": "error"}
    rollout.state = state
    rollout.finish_reason = FinishReason(kinds[state])
    rollout.ended_s = 1_800_000_002.25
    return rollout


def make_rollout(rollout_id: str, *, group_id: str = "grp-1", **fields) -> Rollout:
    """A small one, before any token."""
    given = {
        "prompt_ids": [1, 2, 3],
        "sampling": SamplingParams(),
        "seed": 7,
        "max_tokens": 1000,
        "created_s": 1_800_000_000.0,
        "is_durable": True,
    } | fields
    return Rollout(id=rollout_id, group_id=group_id, **given)


def make_grown(rollout_id: str, start: int, num: int, *, salt: int = 0) -> Grown:
    """`num` tokens whose values follow from rollout, position and salt."""
    positions = range(start, start + num)
    base = sum(rollout_id.encode()) + 31 * salt
    return Grown(
        rollout_id=rollout_id,
        start=start,
        ids=[(base + 7 * t) % 1000 for t in positions],
        lp_sampled=[-((base + t) % 64) / 16 for t in positions],
        lp_temp=[-((base + t) % 32) / 8 for t in positions],
        kept_mass=[1.0 - (t % 4) / 8 for t in positions],
        flags=[1 + 4 * (t % 2) for t in positions],
    )
