"""everstep.LLM: blocking calls over a manager on its own thread, with a real tiny model."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.clients.llm import LLM, configure
from everstep.engine.config import EngineConfig, ModelConfig
from everstep.engine.errors import (
    CheckpointError,
    ConfigError,
    ContextTooLong,
    EngineUnavailable,
    InvalidRequest,
)
from everstep.engine.rollout import RolloutState, SamplingParams


def make(folder: Path, **settings: object) -> LLM:
    return LLM(str(folder), **{"max_model_len": 256, "num_threads": 1, "seed": 5} | settings)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with make(tiny_checkpoint) as made:
        yield made


def few(count: int = 6, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **fields)


def test_results_stand_in_prompt_order_with_samples_together(llm: LLM) -> None:
    rollouts = llm.generate(["one", [5, 6, 7], "three"], few(seed=3), samples=2)
    assert [r.prompt_ids for r in rollouts[2:4]] == [[5, 6, 7]] * 2
    assert [r.index for r in rollouts] == [0, 1] * 3
    assert len({r.group_id for r in rollouts}) == 3
    assert all(r.state == RolloutState.FINISHED and len(r.output_ids) == 6 for r in rollouts)
    assert rollouts[0].text == llm.tokenizer.decode(rollouts[0].output_ids)
    assert rollouts[0].output_ids != rollouts[1].output_ids


def test_one_prompt_of_ids_and_one_text_are_single_prompts(llm: LLM) -> None:
    assert len(llm.generate([5, 6, 7], few())) == 1
    assert len(llm.generate("text", few())) == 1
    assert llm.generate([], few()) == []


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    first, second = llm.generate(["a", "b"], [few(2), few(5)])
    assert (len(first.output_ids), len(second.output_ids)) == (2, 5)
    with pytest.raises(InvalidRequest, match="1 for 2 prompts"):
        llm.generate(["a", "b"], [few()])


def test_errors_are_raised_here_before_anything_runs(llm: LLM) -> None:
    submitted = llm.manager.metrics.metrics[0]
    before = str(submitted)
    with pytest.raises(ContextTooLong, match="256"):
        llm.generate(["fine", [1] * 300], few())
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([[1], [100000]], few())
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("x", SamplingParams(temperature=-1))
    assert str(submitted) == before
    with pytest.raises(ContextTooLong, match="leave room"):
        llm.generate("x", few(300))
    assert llm.manager.num_live == 0


def test_stream_gives_the_text_of_generate(llm: LLM) -> None:
    [whole] = llm.generate("hello", few(12, seed=1))
    deltas = list(llm.stream("hello", few(12, seed=1)))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].is_last
    assert deltas[-1].rollout.output_ids == whole.output_ids


def test_leaving_a_stream_early_cancels_it(llm: LLM) -> None:
    stream = llm.stream("hello", few(200))
    rollout = next(stream).rollout
    stream.close()

    async def wait() -> None:
        while not rollout.state.is_ended:
            await asyncio.sleep(0.01)

    llm.run(asyncio.wait_for(wait(), 10))
    assert rollout.state == RolloutState.ABORTED
    assert llm.generate("again", few())[0].state == RolloutState.FINISHED


def test_stream_raises_what_is_wrong_with_the_prompt(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        list(llm.stream([]))


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [rollout] = llm.chat(messages, few())
    assert rollout.prompt_ids == llm.tokenizer.encode(llm.tokenizer.render_chat(messages))
    assert len(llm.chat([messages, messages], few())) == 2
    assert next(iter(llm.stream(messages, few(1)))).rollout.prompt_ids == rollout.prompt_ids


def test_works_inside_a_running_loop_as_in_a_notebook(llm: LLM) -> None:
    async def cell() -> int:
        return len(llm.generate("hello", few())[0].output_ids)

    assert asyncio.run(cell()) == 6


def test_a_seed_repeats_the_run_and_no_thread_is_left(tiny_checkpoint: Path) -> None:
    before = set(threading.enumerate())
    texts = []
    for _ in range(2):
        with make(tiny_checkpoint) as llm:
            texts.append([r.text for r in llm.generate(["a", "b"], few())])
        llm.close()
        with pytest.raises(EngineUnavailable, match="closed"):
            llm.generate("a")
    assert texts[0] == texts[1]
    assert set(threading.enumerate()) == before


def test_a_start_that_fails_says_why_and_leaves_no_thread(tiny_checkpoint: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError, match="no model at"):
        LLM("./nix")
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        make(tiny_checkpoint, max_model_len=10**6)
    assert set(threading.enumerate()) == before


def test_settings_go_by_field_name() -> None:
    config = configure("m", None, {"block_size": 8, "max_num_seqs": 3, "dtype": "float32"})
    assert (config.kv.block_size, config.batch.max_num_seqs) == (8, 3)
    assert config.model == ModelConfig(path="m", dtype="float32")
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        configure("m", None, {"max_num_seq": 3})
    with pytest.raises(ConfigError, match=r"kv\.block_size"):
        configure("m", None, {"block_size": 0})
    whole = EngineConfig(model=ModelConfig(path="own"))
    assert configure("default", whole, {}).model.path == "own"


def test_a_script_that_ends_in_the_middle_of_a_stream_ends_quietly(tiny_checkpoint: Path) -> None:
    code = f"""
from everstep import LLM, SamplingParams
llm = LLM({str(tiny_checkpoint)!r}, num_threads=1)
print(len(llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].output_ids))
stream = llm.stream("a", SamplingParams(max_tokens=2000, ignore_eos=True))
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
