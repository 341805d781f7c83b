"""A growth between what is prepared and what is shown."""

from everstep.engine.journal.ops import Origin
from everstep.engine.manager.growth import Growth
from everstep.engine.messages import Ready, RolloutTokens
from everstep.engine.rollout import FinishReason, Rollout, RolloutState, SamplingParams

ORIGIN = Origin(1, "d", "cpu", "core-0")
INFO = Ready(
    core_id="core-0",
    vocab_size=100,
    max_model_len=64,
    num_blocks=8,
    block_size=16,
    max_num_seqs=4,
    version=1,
    digest="d",
    numerics="cpu",
    num_moe_layers=0,
    num_experts=0,
    num_experts_per_tok=0,
)


def growth() -> Growth:
    rollout = Rollout(
        id="r",
        group_id="g",
        prompt_ids=[1],
        sampling=SamplingParams(),
        seed=1,
        max_tokens=8,
        is_durable=True,
    )
    return Growth(rollout, None)


def tokens(start: int) -> RolloutTokens:
    columns = {"lp_sampled": [-1.0], "lp_temp": [-1.0], "kept_mass": [1.0], "flags": [1]}
    return RolloutTokens(rollout_id="r", start=start, ids=[start + 5], **columns)


def test_a_state_shows_after_the_tokens_that_came_before_it() -> None:
    """Its last tokens may still be on their way through the journal when the core has paused it:
    a rollout that reads paused does not grow."""
    one = growth()
    one.move(RolloutState.RUNNING)
    for start in range(2):
        one.prepare(tokens(start), ORIGIN, INFO)
    one.move(RolloutState.PREEMPTED)
    one.move(RolloutState.PAUSED)
    assert one.rollout.state is RolloutState.RUNNING
    one.apply()
    assert (one.rollout.state, one.rollout.output_ids) == (RolloutState.RUNNING, [5])
    one.apply()
    assert (one.rollout.state, one.rollout.output_ids) == (RolloutState.PAUSED, [5, 6])
    assert one.rollout.num_preemptions == 1
    one.move(RolloutState.RUNNING)
    assert one.rollout.state is RolloutState.RUNNING


def test_an_ending_overtakes_the_states_before_it() -> None:
    one = growth()
    one.move(RolloutState.RUNNING)
    one.prepare(tokens(0), ORIGIN, INFO)
    one.move(RolloutState.PAUSED)
    final = one.conclude(RolloutState.ABORTED, FinishReason("abort"))
    assert one.rollout.state is RolloutState.RUNNING
    one.apply()
    assert one.rollout.state is RolloutState.PAUSED
    one.end(final)
    assert (one.rollout.state, one.rollout.output_ids) == (RolloutState.ABORTED, [5])
