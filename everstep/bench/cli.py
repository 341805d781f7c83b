"""`everstep bench offline | serve`: the flags, and what is printed at the end."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.errors import ConfigError
from ..engine.rollout import SamplingParams
from ..flags import Settings, with_settings
from ..progress import Stages
from .report import Run, check_output, result_block, write_json
from .workload import Ask, random_asks, read_dataset, warm_up, with_ids

if TYPE_CHECKING:
    from ..clients.llm import LLM

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure throughput and latencies; prints the result block of `vllm bench serve`.",
)

NumPrompts = Annotated[int, typer.Option("--num-prompts", min=1, help="Requests to send.")]
InputLen = Annotated[
    int,
    typer.Option("--input-len", "--random-input-len", min=1, help="Tokens of a random prompt."),
]
OutputLen = Annotated[
    int,
    typer.Option(
        "--output-len",
        "--random-output-len",
        min=1,
        help="Tokens to generate; a line of --dataset may name its own.",
    ),
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        "--dataset-path",
        metavar="FILE",
        help='JSON lines {"prompt": text or ids, "max_tokens": N} instead of random prompts.',
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="Generate every token that was asked for."),
]
OutputJson = Annotated[
    Path | None,
    typer.Option(
        "--output-json",
        "--output-file",
        metavar="FILE",
        help="Write the figures, and those of each request, in vLLM's keys.",
    ),
]


@app.command()
@with_settings(("engine", "skip_tokenizer_init"))
def offline(
    settings: Settings,
    num_prompts: NumPrompts = 32,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            min=1,
            help="Requests in flight at most; default: --max-num-seqs.",
        ),
    ] = None,
    dataset: Dataset = None,
    temperature: Temperature = 1.0,
    ignore_eos: IgnoreEos = True,
    warmups: Annotated[
        int, typer.Option("--num-warmups", min=0, help="Requests beforehand, not counted.")
    ] = 1,
    output_json: OutputJson = None,
) -> None:
    """Run requests through the engine in this process, without a server.

    Prompts are random tokens drawn from --seed (0), so that no prefix is cached, and outputs
    have a fixed length. Latencies are taken where everstep.LLM hands out tokens.

    Exit code 0: every request was answered; 1: some failed.

    [dim]everstep bench offline --num-prompts 16 --concurrency 8[/dim]

    [dim]everstep bench offline ./Ring-mini-2.0 --input-len 1024 --output-len 64 --output-json run.json[/dim]
    """
    from ..offline import open_llm

    check_output(output_json)
    sampling = SamplingParams(temperature=temperature, ignore_eos=ignore_eos)
    seed = settings.config.engine.seed or 0
    given = None
    if dataset is not None:
        given = read_dataset(dataset, count=num_prompts, output_tokens=output_len, seed=seed)
    with open_llm(settings) as llm:
        sampling.check(vocab_size=llm.info.vocab_size)
        if given is None:
            asks = random_asks(
                count=num_prompts,
                input_tokens=input_len,
                output_tokens=output_len,
                vocab_size=llm.info.vocab_size,
                seed=seed,
                never=llm.info.eos_ids,
            )
        else:
            asks = with_ids(given, lambda text: llm.tokenizer.encode(text))
        run = _offline(llm, asks, concurrency, sampling, warmups)
    _finish(run, output_json)


def _offline(
    llm: "LLM", asks: list[Ask], concurrency: int | None, sampling: SamplingParams, warmups: int
) -> Run:
    from .offline import run_offline

    limit = concurrency or llm.config.batch.max_num_seqs
    if warmups:
        run_offline(llm, warm_up(asks, warmups), concurrency=1, sampling=sampling)
    with Stages() as stages:
        return run_offline(
            llm,
            asks,
            concurrency=limit,
            sampling=sampling,
            on_count=lambda done, total: stages("requests", done, total),
        )


@app.command()
def serve(
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="The server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Default: the first that the server lists."),
    ] = None,
    num_prompts: NumPrompts = 32,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            min=1,
            help="Requests in flight at most; default: no limit.",
        ),
    ] = None,
    request_rate: Annotated[
        float,
        typer.Option(
            "--request-rate", help="Requests per second (a Poisson process); inf: all at once."
        ),
    ] = math.inf,
    dataset: Dataset = None,
    vocab_size: Annotated[
        int,
        typer.Option("--vocab-size", min=2, help="Random prompts hold token ids below this."),
    ] = 32000,
    temperature: Temperature = 1.0,
    ignore_eos: IgnoreEos = True,
    seed: Annotated[
        int, typer.Option("--seed", "--random-seed", help="Of prompts and sending times.")
    ] = 0,
    warmups: Annotated[
        int,
        typer.Option("--num-warmups", min=0, help="Requests beforehand, one by one, not counted."),
    ] = 1,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Send streaming completions to a server: ours, vLLM's, SGLang's, llama.cpp's, any of OpenAI's API.

    Prompts are random token ids drawn from --seed. A server that knows no `ignore_eos` may
    refuse it: --no-ignore-eos leaves the field out.

    Exit code 0: every request was answered; 1: some failed; 2: nobody answers, or the first
    request is refused.

    [dim]everstep bench serve --num-prompts 64 --concurrency 8[/dim]

    [dim]everstep bench serve --base-url http://127.0.0.1:30000 --request-rate 4 --output-json run.json[/dim]
    """
    from .serve import Target, run_serve

    check_output(output_json)
    if not request_rate > 0:
        raise ConfigError(f"--request-rate must be above 0, or inf, got {request_rate:g}")
    if dataset is not None:
        asks = read_dataset(dataset, count=num_prompts, output_tokens=output_len, seed=seed)
    else:
        asks = random_asks(
            count=num_prompts,
            input_tokens=input_len,
            output_tokens=output_len,
            vocab_size=vocab_size,
            seed=seed,
        )
    target = Target(
        base_url=base_url,
        model=model,
        api_key=api_key,
        temperature=temperature,
        ignore_eos=ignore_eos,
    )
    with Stages() as stages:
        run = run_serve(
            target,
            asks,
            concurrency=concurrency,
            request_rate=None if math.isinf(request_rate) else request_rate,
            seed=seed,
            warmups=warm_up(asks, warmups),
            on_count=lambda done, total: stages("requests", done, total),
        )
    _finish(run, output_json)


def _finish(run: Run, output_json: Path | None) -> None:
    """The block, the file, the first failure; exits with 1 where a request failed."""
    sys.stdout.write(result_block(run))
    if output_json is not None:
        write_json(run, output_json)
        sys.stdout.write(f"{output_json}\n")
    if run.errors:
        sys.stderr.write(f"{len(run.errors)} requests failed; the first: {run.errors[0]}\n")
        raise typer.Exit(1)
