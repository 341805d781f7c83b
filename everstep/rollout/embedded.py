"""The engine of `everstep rollout` without --server: a model here, its core as a process, and a
journal beside the output."""

import math
from pathlib import Path

from msgspec.structs import replace

from ..engine.checkpoint.hub import resolve
from ..engine.errors import InvalidRequest
from ..engine.journal.journal import Journal
from ..engine.journal.thread import JournalThread
from ..engine.manager.manager import RolloutManager
from ..engine.messages import Priority
from ..engine.metrics import Registry
from ..engine.native import ProcessBackend
from ..engine.tokenizer import Tokenizer
from ..progress import Stages
from ..server.config import ServeConfig
from ..server.conversation import render
from ..trainer_bridge.run.engine import Prompt
from ..trainer_bridge.run.manager_engine import ManagerEngine

NAME = "here"


async def embedded_engine(
    config: ServeConfig, journal: Path, stages: Stages, priority: Priority = "background"
) -> ManagerEngine:
    """Load the model, and go on with what the journal holds. priority: of staging a version.

    The journal survives power loss, as the run file does: the two must never contradict each other.
    Raises CheckpointError, ConfigError, JournalError, EngineDied.
    """
    metrics = Registry()
    folder = resolve(config.engine.model.path, stages)
    tokenizer = None if config.skip_tokenizer_init else Tokenizer.from_folder(folder)
    settings = replace(
        config.journal,
        durability="power",
        # a journal that the user named is one that `what-if` may be asked about
        retain_acked_s=math.inf,
        retain_keys_s=math.inf,
    )
    thread = JournalThread(Journal.open(journal, settings), metrics=metrics)

    engine = replace(config.engine, model=replace(config.engine.model, path=str(folder)))
    manager = RolloutManager(
        ProcessBackend(engine, on_loading=stages.on_loading),
        tokenizer,
        run_seed=config.engine.seed or 0,
        restarts=config.restart,
        journal=thread,
        # as long as the file: what a run asked for is found again
        retain_keys_s=math.inf,
        metrics=metrics,
    )
    try:
        await manager.start()
    except BaseException:
        await manager.close()
        raise

    def encode(prompt: Prompt) -> list[int]:
        return _ids(prompt, tokenizer)

    return ManagerEngine(NAME, manager, encode, priority=priority)


def _ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """As POST /rollouts makes them. Raises InvalidRequest."""
    if tokenizer is None:
        raise InvalidRequest(
            "text needs a tokenizer, and this engine runs without one; give prompt_ids",
            field="prompt",
        )
    options = prompt.options
    adds = options.get("add_special_tokens", prompt.messages is None)
    if prompt.messages is None:
        assert prompt.prompt is not None
        return tokenizer.encode(prompt.prompt, add_special_tokens=adds)
    text = render(
        tokenizer,
        prompt.messages,
        template=None,
        tools=options.get("tools"),
        options=options.get("chat_template_kwargs", {}),
        add_generation_prompt=options.get("add_generation_prompt"),
        continue_final_message=options.get("continue_final_message", False),
    )
    return tokenizer.encode(text, add_special_tokens=adds)
