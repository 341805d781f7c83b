"""What arrives at an engine, drawn: cache shapes, groups with shared prefixes, samplings."""

from hypothesis import strategies as st

from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.messages import Add
from everstep.engine.rollout import SamplingParams

VOCAB_SIZE = 6
MAX_MODEL_LEN = 20

# prompts are beginnings of few texts, so that prefixes meet inside blocks and at their borders
TEXTS = ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 5, 1, 3, 3, 3, 3, 3, 3], [0] * 12)

POOLS = ["", "math", "code"]

prompts = st.builds(
    lambda text, length, tail: [*text[:length], *tail],
    st.sampled_from(TEXTS),
    st.integers(1, 12),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
)

samplings = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(),
        SamplingParams(min_tokens=3),
        SamplingParams(prompt_logprobs=1, record=("lp_raw",)),
        SamplingParams(record=("routing", "entropy"), top_logprobs=1),
        SamplingParams(prompt_logprobs=0, record=("routing",)),
    ]
)

batches = st.builds(
    BatchConfig, max_num_seqs=st.integers(1, 5), max_num_batched_tokens=st.integers(1, 14)
)


@st.composite
def caches(draw: st.DrawFn) -> ResolvedKV:
    """Caches that hold one rollout of MAX_MODEL_LEN tokens, and often hardly more."""
    block_size = draw(st.integers(1, 5))
    least = -(-MAX_MODEL_LEN // block_size) + 1
    return ResolvedKV(
        block_size=block_size,
        num_blocks=least + draw(st.sampled_from([0, 1, 3, least, 3 * least])),
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=draw(st.integers(0, 4)) > 0,
        num_parking_blocks=draw(st.sampled_from([0, 3, least, 4 * least])),
        on_pause=draw(st.sampled_from(["keep", "keep", "park", "drop"])),
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[Add]:
    """A group: rollouts of one prompt and one sampling with seeds of their own, without ids."""
    prompt_ids = draw(prompts)
    sampling = draw(samplings)
    stop_ids = draw(st.sampled_from([[], [], [5], [4, 5]]))
    max_tokens = draw(st.integers(1, MAX_MODEL_LEN - len(prompt_ids)))
    priority = draw(st.sampled_from([0, 0, 0, 1, 2]))
    client = draw(st.sampled_from(["", "ann", "bob"]))
    pool = draw(st.sampled_from(POOLS))
    return [
        Add(
            rollout_id="",
            prompt_ids=prompt_ids,
            sampling=sampling,
            seed=draw(st.integers(0, 3)),
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            banned_ids=stop_ids,
            priority=priority,
            client=client,
            pool=pool,
            start_paused=False,
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
