"""What a rollout is across changes of the weights, to the bit, with the real runner."""

import gc
import random
import weakref
from typing import get_args

import pytest

from everstep.engine.messages import Add, Flipped, KVPolicy, Pause, Resume
from everstep.engine.rollout import SamplingParams

from .flips import FlippingCore, lp_by_segments, make_versions, weights_of

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]
POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_versions(tmp_path_factory.mktemp("versions"), 3)


@pytest.fixture(scope="module")
def versions(folders):
    return [weights_of(folder) for folder in folders]


def ask(name, prompt=PROMPT, *, seed=1, max_tokens=40, **options) -> Add:
    return Add(
        rollout_id=name,
        prompt_ids=list(prompt),
        sampling=SamplingParams(),
        seed=seed,
        max_tokens=max_tokens,
        **options,
    )


def check(core: FlippingCore, versions) -> None:
    """Every logprob is what the segments of its rollout give."""
    for name, drawn in core.rollouts.items():
        expected = lp_by_segments(versions, core.adds[name].prompt_ids, drawn)
        assert drawn.lp == expected, f"{name}: {drawn.segments}"


def test_after_recompute_a_rollout_goes_on_as_if_the_new_weights_had_read_all_of_it(
    folders, versions
):
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.step(6)
    core.flip(1, "recompute")
    core.finish()
    drawn = core.rollouts["a"]
    assert [kv for _, _, kv in drawn.segments] == ["computed", "computed"]
    [_, (start, version, _)] = drawn.segments
    assert version == 1
    check(core, versions)
    # nor does a core that only ever had the new weights, and is given the tokens, draw others
    other = FlippingCore(folders[1:])
    other.add(ask("a", output_ids=drawn.ids[:start]))
    other.finish()
    assert other.rollouts["a"].ids == drawn.ids[start:]
    assert other.rollouts["a"].lp == drawn.lp[start:]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_continuation_is_what_its_segments_say(folders, versions, policy):
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.add(ask("b", seed=2))
    core.step(6)
    core.flip(1, policy)
    core.step(4)
    core.flip(2, policy)
    core.finish()
    kinds = {"keep": "keep", "recompute": "computed", "recompute-prompt": "recompute-prompt"}
    for drawn in core.rollouts.values():
        found = [(version, kv) for _, version, kv in drawn.segments]
        assert found == [(0, "computed"), (1, kinds[policy]), (2, kinds[policy])]
    check(core, versions)


def test_the_same_flips_at_the_same_tokens_give_the_same_rollout(folders):
    found = []
    for chunk in (32, 7):
        core = FlippingCore(folders, chunk=chunk)
        core.add(ask("a"))
        while len(core.rollouts["a"].ids) < 5:
            core.step()
        core.core.handle(Pause(["a"]))
        core.flip(1, "keep")
        core.core.handle(Resume(["a"]))
        core.finish()
        found.append(core.rollouts["a"])
    assert found[0] == found[1]


def test_a_rollout_that_is_paused_over_two_flips(folders, versions):
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.step(5)
    core.core.handle(Pause(["a"]))
    core.flip(1, "recompute-prompt")
    core.step(5)
    core.flip(2, "keep")
    core.step(3)
    core.core.handle(Resume(["a"]))
    core.finish()
    drawn = core.rollouts["a"]
    # nothing was drawn over the prompt that version 1 wrote: no segment could tell of it
    assert [(version, kv) for _, version, kv in drawn.segments] == [
        (0, "computed"),
        (2, "computed"),
    ]
    check(core, versions)


def test_a_prompt_that_is_output_of_another_is_not_written_again_under_it(folders, versions):
    """A turn that goes on from a rollout which still runs: the two share blocks."""
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.step(16)
    core.add(ask("b", PROMPT + core.rollouts["a"].ids[:12], seed=2))
    core.step(3)
    assert core.cached["b"] >= len(PROMPT) + 8
    core.flip(1, "recompute-prompt")
    core.finish()
    last = {name: drawn.segments[-1][1:] for name, drawn in core.rollouts.items()}
    assert last == {"a": (1, "recompute-prompt"), "b": (1, "computed")}
    check(core, versions)


def test_a_flip_says_what_it_cost(folders):
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.step(4)
    core.flip(1, "keep", steps=2)
    core.step()
    [flipped] = [message for message in core.told if isinstance(message, Flipped)]
    assert (flipped.version, flipped.kv, flipped.kept_rollouts) == (1, "keep", 1)
    assert 0 < flipped.flip_s <= flipped.stall_s
    assert flipped.steps_lost > 0


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_with_flips_draws_what_the_segments_say(folders, versions, seed):
    rng = random.Random(seed)
    core = FlippingCore(
        folders, blocks=rng.choice([30, 60]), chunk=rng.choice([5, 32]), parking=rng.choice([0, 12])
    )
    names: list[str] = []
    for _ in range(24):
        match rng.choices(range(5), [30, 40, 10, 10, 10])[0]:
            case 0 if len(names) < 6:
                names.append(f"r{len(names)}")
                prompt = PROMPT[: rng.choice([3, 8, 10])] + [rng.randrange(200) for _ in range(2)]
                add = ask(names[-1], prompt, seed=rng.randrange(3), max_tokens=rng.randint(4, 24))
                core.add(add)
            case 1:
                core.step(rng.randint(1, 6))
            case 2:
                core.flip((core.version + rng.randint(1, 2)) % 3, rng.choice(POLICIES))
                core.step()
            case 3:
                core.core.handle(Pause(rng.sample(names, min(2, len(names)))))
            case 4:
                core.core.handle(Resume(None))
        core.core.scheduler.check_invariants()
    core.core.handle(Resume(None))
    core.finish()
    check(core, versions)


def test_old_weights_are_given_back(folders):
    """All of them, without the collector's help: a core's objects are frozen for it."""
    core = FlippingCore(folders)
    core.add(ask("a"))
    core.step(3)
    gc.collect()
    gc.disable()
    try:
        for version in (1, 2, 0):
            old = weakref.ref(core.runner.weights)
            bank = weakref.ref(core.runner.weights.layers[-1].ffn.experts.downs[0])
            core.flip(version, "keep")
            for _ in range(200):
                core.step()
            assert old() is None
            assert bank() is None
    finally:
        gc.enable()
