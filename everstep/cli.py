"""The commands: parse, build the settings, call. Heavy imports stand inside the commands.

Whatever is the user's to mend ends in one line, `error: …`, and exit code 2.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, journal_cli, proof_cli
from .bench import cli as bench_cli
from .engine.errors import ConfigError, EverstepError
from .engine.rollout import SamplingParams
from .environment import log_format
from .flags import CHECKS, FOLDERS, LEARNING, MODELS, Settings, with_settings
from .mistakes import explain
from .rollout import cli as rollout_cli

app = typer.Typer(
    name="everstep",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench_cli.app, rich_help_panel=MODELS)
app.add_typer(proof_cli.app)
app.add_typer(journal_cli.app)
app.add_typer(rollout_cli.app, rich_help_panel=LEARNING)

_ENGINE = ("engine",)
_SERVER = ("engine", "http", "openai", "journal", "restart", "skip_tokenizer_init")
CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(list(arguments), prog_name="everstep", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except EverstepError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # whoever read us has gone; nothing more can be said to them, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        return _fail(f"{error.filename or 'system'}: {error.strerror}")
    except Exception as error:
        # the parser's own errors (a bad flag, a missing argument) know how to say it; without
        # any argument the help has been shown, and nothing is left to say
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        words = " ".join(message().split())
        return _fail(explain(error, words)) if words else 2
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"error: {message}\n")
    return 2


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"everstep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """An exact, durable rollout engine for mixture-of-experts thinking models (Ring, Ling).

    [b]everstep chat[/b]   talks to the embedded model, offline after its first use.

    [b]everstep serve[/b]   answers OpenAI's API on http://127.0.0.1:8000/v1.

    Every flag can also stand in a TOML file (--config); the flags of vLLM and SGLang are known.
    """


@app.command(rich_help_panel=MODELS)
@with_settings(_ENGINE, sampling=CHAT_SAMPLING)
def chat(
    settings: Settings,
    sampling: SamplingParams,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end.")
    ] = None,
) -> None:
    """Talk to a model: streaming, multi-turn; Ctrl-C stops an answer, Ctrl-D ends.

    In a pipe: one prompt per line of standard input (one conversation), plain answers.

    [dim]everstep chat[/dim]

    [dim]everstep chat ./Ring-mini-2.0 --system "Be brief." --temperature 0 --max-tokens 200[/dim]

    [dim]everstep chat --prompt "Why is the sky blue?" --seed 1[/dim]

    [dim]printf 'Hello\\nAnd again?\\n' | everstep chat[/dim]
    """
    from . import chat as conversations
    from .offline import open_llm

    if " " in (said := settings.config.engine.model.path.strip()) and not Path(said).exists():
        raise ConfigError(f"MODEL is {said!r}; a prompt goes to --prompt: everstep chat --prompt …")
    with open_llm(settings) as llm:
        conversation = conversations.Conversation(llm, system=system, sampling=sampling)
        if prompt is not None:
            conversations.one_answer(conversation, prompt, sys.stdout)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            from rich.console import Console

            console = Console(highlight=False)
            model, info = settings.config.engine.model.path, llm.info
            console.print(f"{model}, context {info.max_model_len}, {info.numerics}", style="dim")
            conversations.on_a_terminal(conversation, console)
        else:
            conversations.in_a_pipe(conversation, iter(sys.stdin), sys.stdout)


@app.command(rich_help_panel=MODELS)
@with_settings(
    ("engine", "openai.served_model_name", "journal.path", "skip_tokenizer_init"),
    positional_model=False,
    sampling=SamplingParams(),
)
def batch(
    settings: Settings,
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines.", show_default=False)],
    sampling: SamplingParams,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Records, one per line.")
    ],
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run lines again whose record is an error.")
    ] = False,
    return_token_ids: Annotated[
        bool, typer.Option("--return-token-ids", help="Put token_ids into every choice.")
    ] = False,
) -> None:
    """Answer a file of prompts; after any kill the same command goes on where it stopped.

    IN holds OpenAI batch lines ({"custom_id", "method", "url", "body"}) or plain ones:
    {"prompt": text or ids} or {"messages": …}, with custom_id or id, and sampling fields.
    The sampling flags below hold where a line says nothing.

    OUT gets exactly one record per custom_id, in the order of completion; a line without one is
    `line-N`. A bad line, and the second line with an id that was taken, become error records
    and stop nothing. Without a seed a line draws from --seed (0) and its id: the same answers,
    interrupted or not.

    OUT.journal (--journal names another file, or off) holds what is half done: after a kill each
    line goes on at its last token. It is removed when every line has its record.

    Exit code 0: every line is answered; 1: some are error records; 2: the run could not go on;
    130: interrupted.

    [dim]everstep batch prompts.jsonl -o answers.jsonl --max-tokens 200[/dim]

    [dim]everstep batch in.jsonl -o out.jsonl --model ./Ring-mini-2.0 --retry-errors[/dim]
    """
    from .offline import run_batch

    num_errors = run_batch(
        settings.config,
        source,
        output,
        sampling=sampling,
        retry_errors=retry_errors,
        return_token_ids=return_token_ids,
    )
    raise typer.Exit(1 if num_errors else 0)


@app.command(rich_help_panel=MODELS)
@with_settings(_SERVER)
def serve(
    settings: Settings,
    grace_s: Annotated[
        float, typer.Option("--grace-s", min=0, help="Seconds to finish at SIGTERM or Ctrl-C.")
    ] = 30.0,
) -> None:
    """Serve a model over OpenAI's API (completions, chat, models; /health, /metrics).

    /health answers 503 while the model loads. SIGTERM drains: what runs may finish within
    --grace-s seconds, then the server exits with 0. EVERSTEP_LOG=json logs JSON.

    Durable rollouts live in a journal (--journal): killed or stopped, the same command goes on
    with them where they were.

    [dim]everstep serve[/dim]

    [dim]everstep serve ./Ring-mini-2.0 --port 30000 --max-num-seqs 64 --served-model-name ring[/dim]

    [dim]everstep serve --host 0.0.0.0 --api-key SECRET --config serve.toml[/dim]
    """
    from .engine import log
    from .progress import Stages
    from .server.launch import Serving
    from .server.launch import serve as serve_until_signal

    json_log = log_format() == "json"
    log.setup(json_lines=json_log)
    with Stages() as stages:

        def on_serving(serving: Serving) -> None:
            stages.close()
            for line in _banner(serving):
                typer.echo(line, err=True)

        serve_until_signal(
            settings.config,
            on_progress=stages,
            on_serving=on_serving,
            json_log=json_log,
            grace_s=grace_s,
        )


def _banner(serving: Any) -> list[str]:
    ready = serving.ready
    return [
        f"everstep {__version__} serves {', '.join(serving.names)}",
        f"  weights   version {ready.version}@{ready.digest[:8]}, {ready.numerics}",
        f"  context   {ready.max_model_len} tokens; {ready.num_blocks} KV blocks of "
        f"{ready.block_size}; {ready.max_num_seqs} rollouts at once",
        f"  run seed  {serving.run_seed}",
        f"  journal   {serving.journal}",
        f"  URL       {serving.url}/v1",
    ]


@app.command(rich_help_panel=LEARNING)
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="TOML.", show_default=False)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change one setting; repeatable."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Make a small model and train it, from nothing.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say which rank sends which bytes of the weights, and end."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the demo.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Of the demo; default: ./demo-SEED."),
    ] = None,
) -> None:
    """Train a model on rollouts and their rewards (GRPO with IcePop), or on given answers.

    Reads JSON lines as `everstep rollout` writes them, with a `reward` on each; writes checkpoints,
    metrics.jsonl and the trained model into the output folder. After any kill the same command
    goes on to the same bits. docs/reference/training.md has every setting.

    Several ranks: torchrun --nproc-per-node 2 -m everstep.trainer_bridge.fsdp_trainer CONFIG
    [--explain]

    [dim]everstep train run.toml[/dim]

    [dim]everstep train run.toml --set loss.name=none --set output=./without[/dim]

    [dim]everstep train --demo[/dim]   a whole RL run on two CPU cores: docs/howto/demo.md
    """
    from .engine import log
    from .train import run_demo, run_train

    log.setup(json_lines=log_format() == "json")
    if demo and (config is not None or explain):
        raise ConfigError(f"--demo has a recipe of its own: leave {config or '--explain'} out")
    if demo:
        run_demo(out, seed, changes or [])
    elif config is not None:
        run_train(config, changes or [], explains=explain)
    else:
        raise ConfigError("CONFIG is missing: name a TOML file, or give --demo")


@app.command(rich_help_panel=CHECKS)
@with_settings(_SERVER)
def doctor(
    settings: Settings,
    determinism: Annotated[
        bool,
        typer.Option(
            "--determinism",
            help="Run rollouts alone, batched, chunked, cached, preempted, resumed; compare bits.",
        ),
    ] = False,
) -> None:
    """Say what this machine has, what was picked and why, and every setting with its origin.

    Kernels are shown for MODEL, without it for a tiny model made on the spot.

    [dim]everstep doctor[/dim]

    [dim]everstep doctor default --determinism[/dim]   exits with 1 unless all bits are equal
    """
    from . import doctor as reports

    if determinism:
        raise typer.Exit(0 if reports.determinism(settings.config.engine.model) else 1)
    reports.report(settings)


@app.command(rich_help_panel=FOLDERS)
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A folder, hub id, `default`.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32: what the engine runs in.")] = (
        "float32"
    ),
    numerics: Annotated[str, typer.Option(help="exact or w8a8.")] = "exact",
    num_tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompt.")] = 32,
) -> None:
    """Compare the engine with the published definition, layer by layer, in float64.

    Exits with 1 if they differ by more than rounding does.

    [dim]everstep verify ./Ring-mini-2.0 --dtype float32[/dim]
    """
    from .offline import run_verify

    is_right = run_verify(checkpoint, dtype=dtype, numerics=numerics, num_tokens=num_tokens)
    raise typer.Exit(0 if is_right else 1)


@app.command(rich_help_panel=FOLDERS)
def convert(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the plain Llama twin, for parity checks.")
    ] = False,
) -> None:
    """Write the embedded default model as a Ring checkpoint.

    [dim]everstep convert ./smollm2-ring[/dim]
    """
    from .engine.checkpoint.convert import convert_default
    from .progress import Stages

    with Stages() as stages:
        folder = convert_default(out, dense=dense, on_progress=stages)
    typer.echo(folder)


@app.command(rich_help_panel=FOLDERS)
def quantize(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A folder, hub id, `default`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    format: Annotated[
        str, typer.Option(help="fp8-experts (routed experts alone) or fp8-block (all layers).")
    ] = "fp8-experts",
    dtype: Annotated[
        str, typer.Option(help="Of the rest: bfloat16, float32, or auto, as it is stored.")
    ] = "auto",
) -> None:
    """Write a bf16 or float32 checkpoint in FP8: blocks of 128×128 with a scale each.

    What a trainer publishes with the same `publish.format` has the same bytes.

    [dim]everstep quantize ./trained ./trained-fp8[/dim]
    """
    from .offline import run_quantize

    typer.echo(run_quantize(checkpoint, out, format=format, dtype=dtype))


@app.command(rich_help_panel=LEARNING)
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
) -> None:
    """Make the keys with which engine and trainer know each other across machines.

    Both sides get the folder (`--keys` of `everstep rollout`, `source.keys` of `everstep train`), each
    without the other's `.key_secret` file.

    [dim]everstep keys ./keys[/dim]
    """
    from .trainer_bridge.curve import make_keys

    for path in make_keys(folder):
        typer.echo(path)


@app.command("receive-weights", rich_help_panel=LEARNING)
def receive_weights(
    bind: Annotated[
        str,
        typer.Option("--bind", metavar="ADDRESS", help="Where the trainer's ranks connect."),
    ] = "tcp://127.0.0.1:5601",
    run_name: Annotated[
        str, typer.Option("--run-name", metavar="NAME", help="What the trainer calls this run.")
    ] = "run",
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder of the versions; default: everstep-NAME in /dev/shm.",
            show_default=False,
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="DIR",
            help="Of `everstep keys`; needed beyond this machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Take a trainer's versions of the weights on an engine's host.

    Every rank of the trainer (`[publish] endpoints`) sends its own shards. A version becomes a
    folder, whole or not at all; `POST /weights/update` lets a server serve it, and `everstep rollout
    --bridge` does so by itself (--weights-bind starts a receiver with it). Runs until Ctrl-C.

    [dim]everstep receive-weights --bind tcp://0.0.0.0:5601 --run-name run --keys ./keys[/dim]
    """
    from .engine import log
    from .weights_receiving import Job, receive

    log.setup(json_lines=log_format() == "json")
    receive(Job.of(bind, run_name, root, keys, prefix=""))


@app.command("make-checkpoint", rich_help_panel=FOLDERS)
def make_checkpoint(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    shape: Annotated[str, typer.Option(help="tiny, mini, flash or 1T.")] = "tiny",
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Change one size of the shape; repeatable."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="bf16, f32, fp8-experts, fp8-block or fp8-channel.")
    ] = "bf16",
    shards: Annotated[
        int | None, typer.Option(min=1, help="Number of files; default: by size.")
    ] = None,
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest file; default: 10 GiB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    mtp: Annotated[int, typer.Option(min=0, help="Multi-token-prediction layers.")] = 0,
) -> None:
    """Write a checkpoint of random weights in the published layout, with a tokenizer.

    [dim]everstep make-checkpoint ./tiny[/dim]

    [dim]everstep make-checkpoint ./mini-fp8 --shape mini --format fp8-block[/dim]

    [dim]everstep make-checkpoint ./mine --size hidden_size=1024 --size num_hidden_layers=8[/dim]
    """
    from .offline import run_make_checkpoint

    folder = run_make_checkpoint(
        out,
        shape=shape,
        sizes=size or [],
        format=format,
        shards=shards,
        max_shard_bytes=max_shard_bytes,
        seed=seed,
        mtp=mtp,
    )
    typer.echo(folder)
