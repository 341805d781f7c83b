"""Command lines that vLLM's and SGLang's users have in their scripts go through as they are."""

from typing import Any

import pytest
import typer

from everstep.flags import Settings, with_settings

VLLM = """
    model --served-model-name ring --host 127.0.0.1 --port 8001 --max-model-len 512
    --max-num-seqs 8 --max-num-batched-tokens 64 --gpu-memory-utilization 0.9
    --enable-prefix-caching --kv-cache-dtype auto --dtype bfloat16 --quantization fp8 --seed 3
    --enable-return-routed-experts --logprobs-mode processed_logprobs --api-key k --admin-key a
    --scheduling-policy priority --reasoning-parser deepseek_r1 --tool-call-parser hermes
    --chat-template {{messages}} --enable-sleep-mode --skip-tokenizer-init
"""
SGLANG = """
    --model-path model --served-model-name ring --host 127.0.0.1 --port 8001 --context-length 512
    --max-running-requests 8 --chunked-prefill-size 64 --mem-fraction-static 0.9
    --kv-cache-dtype auto --dtype bfloat16 --quantization fp8 --random-seed 3
    --enable-deterministic-inference --enable-return-routed-experts --api-key k --admin-api-key a
    --logprobs-mode processed_logprobs --enable-priority-scheduling --reasoning-parser deepseek-r1
    --tool-call-parser qwen25 --chat-template {{messages}} --enable-memory-saver
    --weight-version v7 --skip-tokenizer-init
"""


@pytest.fixture
def parse() -> Any:
    seen: list[Any] = []
    probe = typer.Typer()

    @probe.command()
    @with_settings(("engine", "http", "openai", "skip_tokenizer_init"))
    def command(settings: Settings) -> None:
        seen.append(settings.config)

    def parsed(line: str) -> Any:
        typer.main.get_command(probe).main(line.split(), standalone_mode=False)
        return seen.pop()

    return parsed


def test_every_flag_of_both_dialects_is_accepted_and_they_say_the_same(parse: Any) -> None:
    config = parse(VLLM)
    assert config == parse(SGLANG)
    assert (config.engine.model.max_model_len, config.engine.seed) == (512, 3)
    assert (config.engine.batch.max_num_seqs, config.engine.batch.max_num_batched_tokens) == (8, 64)
    assert (config.openai.logprobs_mode, config.skip_tokenizer_init) == ("sampled", True)
    assert parse("model --disable-radix-cache").engine.kv.prefix_caching is False
