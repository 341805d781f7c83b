"""The trainer's settings: one frozen tree, torch-free, read from TOML."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from ...engine.checkpoint.fp8_policy import Fp8Format
from ...engine.errors import ConfigError
from ...engine.settings import Assignment, load
from ..losses.advantages import Std
from ..losses.alarms import AlarmConfig
from ..losses.config import LossConfig
from ..protocol import check_run_name
from ..rewards.rewards import RewardConfig

Objective = Literal["rl", "sft"]
Replay = Literal["none", "ids", "weights"]
Format = Literal["model", Fp8Format]


class NumericsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In what the model is computed. Masters and optimiser are float32 always, and so are the
    products of router and head."""

    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Meta(description="of weights and activations; auto: the checkpoint's"),
    ] = "auto"
    kernels: Annotated[
        Literal["plain", "exact"],
        Meta(description="torch's products, or the engine's kernels and bits (CPU)"),
    ] = "plain"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="auto: CUDA where there is one")
    ] = "auto"
    recompute: Annotated[
        bool, Meta(description="keep each layer's input alone for the backward pass")
    ] = False
    fp8: Annotated[
        bool, Meta(description="FP8 products by transformer-engine, in attention and MLPs")
    ] = False


class OptimConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW and its learning rate; the defaults are the paper's (§4)."""

    lr: Annotated[float, Meta(ge=0, description="largest learning rate")] = 2e-6
    beta1: Annotated[float, Meta(ge=0, lt=1, description="of the mean of gradients")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="of the mean of their squares")] = 0.999
    eps: Annotated[float, Meta(gt=0, description="added to the root of the second mean")] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled, of every parameter")] = 0.01
    max_norm: (
        Annotated[float, Meta(gt=0, description="gradients of a larger norm are scaled down")]
        | None
    ) = 1.0
    warmup_steps: Annotated[int, Meta(ge=0, description="steps until lr is reached")] = 0
    decay_after: (
        Annotated[int, Meta(ge=0, description="step from which lr falls; none: never")] | None
    ) = None
    decay_steps: Annotated[int, Meta(ge=1, description="steps that the fall takes")] = 1
    decay: Annotated[
        Literal["linear", "cosine"], Meta(description="shape of the fall: even, or half a cosine")
    ] = "linear"
    final_share: Annotated[float, Meta(ge=0, le=1, description="of lr, after the fall")] = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, from 0."""
        rate = self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr
        if self.decay_after is None or step < self.decay_after:
            return rate
        fallen = min(1.0, (step + 1 - self.decay_after) / self.decay_steps)
        if self.decay == "cosine":
            fallen = (1.0 - math.cos(math.pi * fallen)) / 2.0
        return rate * (1.0 - fallen * (1.0 - self.final_share))


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one batch is, and how it is cut."""

    groups: Annotated[
        int, Meta(ge=1, description="groups of an iteration; examples, for objective sft")
    ] = 32
    updates: Annotated[
        int, Meta(ge=1, description="updates that a batch is cut into, by whole groups")
    ] = 1
    max_rows: Annotated[
        int, Meta(ge=1, description="tokens of one forward and backward pass on a rank")
    ] = 8192


class SourceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where trajectories come from: files, or an engine's end of the bridge."""

    path: Annotated[
        str,
        Meta(
            description="a .jsonl, .parquet or .evst file, or a folder of them; see Lines of a source"
        ),
    ] = ""
    epochs: Annotated[int, Meta(ge=1, description="how often files are gone through")] = 1
    shuffle: (
        Annotated[
            int, Meta(description="seed of another order in every epoch; none: that of the files")
        ]
        | None
    ) = None
    rescore: Annotated[
        bool, Meta(description="[reward] scores lines too that have a reward; theirs is dropped")
    ] = False
    endpoint: Annotated[
        str, Meta(description="an engine's address, as tcp://127.0.0.1:5600; instead of path")
    ] = ""
    run: Annotated[str, Meta(description="name of the run that the engine serves")] = "run"
    keys: Annotated[str, Meta(description="folder of CURVE keys; needed beyond this machine")] = ""
    deadline_s: Annotated[
        float, Meta(gt=0, description="how long the engine may bring nothing")
    ] = 600.0


class PublishConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where engines find each version of the weights, while an engine is the source: on this host,
    or brought to theirs."""

    root: Annotated[
        str, Meta(description="folder of the versions; default: everstep-RUN in /dev/shm")
    ] = ""
    format: Annotated[
        Format,
        Meta(
            description="as the model, or for engines that run FP8: routed experts alone in blocks "
            "of 128×128, or every linear layer"
        ),
    ] = "model"
    endpoints: Annotated[
        list[str],
        Meta(
            description="receivers on the engines' hosts, as tcp://10.0.0.2:5601; instead of root"
        ),
    ] = []
    keys: Annotated[
        str, Meta(description="folder of CURVE keys for the receivers; default: source.keys")
    ] = ""
    deadline_s: Annotated[float, Meta(gt=0, description="how long a receiver may say nothing")] = (
        60.0
    )
    keep: Annotated[
        int, Meta(ge=1, description="how many of the newest stay; memory holds one more")
    ] = 2
    canaries: Annotated[
        int, Meta(ge=0, description="responses that are scored with each, for engines to compare")
    ] = 4


class CheckpointConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept to go on from."""

    every: Annotated[int, Meta(ge=0, description="iterations between two; 0: none")] = 10
    keep: Annotated[int, Meta(ge=1, description="how many of the newest stay")] = 2


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run."""

    model: Annotated[str, Meta(description="checkpoint to begin with: a folder or a hub id")] = ""
    output: Annotated[
        str, Meta(description="folder of this run; it goes on from what is there")
    ] = ""
    objective: Annotated[
        Objective,
        Meta(description="rl: rewards of groups; sft: cross-entropy on the responses"),
    ] = "rl"
    advantage_std: Annotated[Std, Meta(description="what a group's advantages are divided by")] = (
        "population"
    )
    routing_replay: Annotated[
        Replay,
        Meta(
            description="the engine's experts are used again: not, its choice, or its weights too"
        ),
    ] = "none"
    max_steps: (
        Annotated[int, Meta(ge=1, description="iterations at most; none: all of the source")] | None
    ) = None
    hold_versions: Annotated[
        int,
        Meta(
            ge=1,
            description="newest weights that loss.old_policy = 'exact' can score with; a token of "
            "older ones gets the proximal policy",
        ),
    ] = 4
    timeout_s: Annotated[float, Meta(gt=0, description="how long a rank waits for the others")] = (
        600.0
    )
    numerics: NumericsConfig = NumericsConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    reward: RewardConfig | None = None
    alarms: AlarmConfig = AlarmConfig()
    source: SourceConfig = SourceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    publish: PublishConfig = PublishConfig()

    def check(self) -> None:
        """Raise ConfigError, one line, where settings are missing or contradict each other."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be set: {_NEEDED[name]}")
        if bool(self.source.path) == bool(self.source.endpoint):
            raise ConfigError("source.path (files) or source.endpoint (an engine): set one of them")
        check_run_name(self.source.run, "source.run")
        if self.publish.root and self.publish.endpoints:
            raise ConfigError(
                "publish.root (this host) or publish.endpoints (others): set one of them"
            )
        if self.numerics.kernels == "exact" and self.numerics.device == "cuda":
            raise ConfigError("numerics.kernels = 'exact' runs on the CPU: numerics.device = 'cpu'")
        if self.numerics.kernels == "exact" and self.numerics.fp8:
            raise ConfigError("numerics.fp8 has other bits: it needs numerics.kernels = 'plain'")
        if self.objective == "sft" and self.batch.updates > 1:
            raise ConfigError("batch.updates is for objective = 'rl'; sft takes 1")
        self._check_reward()
        if self.objective == "rl":
            self.loss.check()

    def _check_reward(self) -> None:
        if self.reward is None:
            if self.source.rescore:
                raise ConfigError("source.rescore needs a table [reward]: by what lines are scored")
            return
        if self.source.endpoint:
            raise ConfigError(
                "reward is for source.path (files); what an engine deals has been scored by "
                "`everstep rollout --reward FILE`"
            )
        if self.objective == "sft":
            raise ConfigError("reward is for objective = 'rl'; sft learns every line")
        self.reward.check()


def read_config(file: Path, assignments: Sequence[Assignment] = ()) -> TrainConfig:
    """A TOML file with assignments over it. Raises ConfigError, one line, naming the setting."""
    config = load(TrainConfig, file=file, assignments=assignments).config
    config.check()
    return config


_NEEDED = {
    "model": "a checkpoint folder, a hub id or 'default'",
    "output": "a folder for checkpoints and metrics",
}
