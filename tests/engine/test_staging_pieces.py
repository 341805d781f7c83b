"""How much a piece of staging touches, whatever the sizes of a model are: a step waits for a slice of
them. Amounts are counted, no time is taken."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep import kernels
from everstep.engine.checkpoint import checkpoint as checkpoints
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import SHAPES, make_checkpoint, resize
from everstep.engine.checkpoint.manifest import write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.config import ModelConfig, ResolvedKV
from everstep.engine.messages import Stage
from everstep.engine.model.canaries import make_canary
from everstep.engine.model.pacing import rows_at_once
from everstep.engine.model.runner import ModelRunner
from everstep.engine.model.staging import FREE_BYTES, WeightStager
from everstep.kernels import native, packed, pieces

from .flips import weights_of

# what is read and written of a tensor in one piece: itself, a copy, a wider one on the way
TOUCHED = 6 * pieces.PIECE_BYTES
VIEWS = (
    "view",
    "reshape",
    "slice",
    "select",
    "t",
    "transpose",
    "as_strided",
    "unsqueeze",
    "detach",
)
VIEWS += (
    "alias",
    "split",
    "expand",
    "empty",
    "new_empty",
    "lift_fresh",
    "permute",
    "empty_strided",
)
# every tensor is larger than a piece in one model or the other: vocabulary, dense and expert layers
MODELS = {
    "wide vocabulary": ["vocab_size=24000", "hidden_size=256", "moe_intermediate_size=64"],
    "wide experts": [
        *("hidden_size=512", "moe_intermediate_size=2048", "num_experts_per_tok=4"),
        "intermediate_size=6144",
    ],
}


class Amounts(TorchDispatchMode):
    """Bytes that torch's operations read and write, and what is told of others."""

    def __init__(self):
        super().__init__()
        self.now = Counter()
        self.pieces = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            # of what is picked from (rows of the embedding) only the rows are read
            read = [] if func.overloadpacket.__name__ == "index" else args
            tensors = [one for one in [*read, out] if isinstance(one, torch.Tensor)]
            self.now["bytes"] += sum(one.numel() * one.element_size() for one in tensors)
        return out

    def end_piece(self):
        self.pieces.append(self.now)
        self.now = Counter()


@pytest.fixture
def amounts(monkeypatch):
    """Counts what the C++ library and the hash are given, too."""
    library = native.library()
    if library is None:
        pytest.skip("no C++ library here: torch's products are not cut")
    # the types of its calls are told when the first weights are made
    tiny = kernels.Weight(torch.zeros(16, 16), torch.float32)
    kernels.prepare_experts([kernels.prepare_gate_up(tiny, tiny)], [kernels.prepare(tiny)])
    found = Amounts()

    def pack(kind, source, n, k, *rest, call=library.everstep_pack):
        found.now["bytes"] += 2 * n * k * packed._BYTES[kind]
        call(kind, source, n, k, *rest)

    def linear(address, x, rows, *rest, call=library.everstep_linear):
        weight = packed._Packed.from_address(address)
        size = weight.n * weight.k * (2 if weight.is_pair else 1)
        found.now["products"] += rows * size
        found.now["weight bytes"] += size * packed._BYTES[weight.format]
        call(address, x, rows, *rest)

    def experts(*args, call=library.everstep_experts):
        rows, slots, count, gate_ups, downs = args[5:10]
        size = num_bytes = 0
        for address in (gate_ups[0], downs[0]):
            weight = packed._Packed.from_address(address)
            part = weight.n * weight.k * (2 if weight.is_pair else 1)
            size, num_bytes = size + part, num_bytes + part * packed._BYTES[weight.format]
        found.now["expert products"] += rows * slots * size
        found.now["expert bytes"] += min(count, rows * slots) * num_bytes
        found.now["bytes of one row's experts"] = slots * num_bytes
        call(*args)

    monkeypatch.setattr(library, "everstep_pack", pack)
    monkeypatch.setattr(library, "everstep_linear", linear)
    monkeypatch.setattr(library, "everstep_experts", experts)

    class Hash:
        def __init__(self, inner):
            self.inner = inner

        def update(self, data):
            found.now["bytes"] += len(data)
            self.inner.update(data)

        def hexdigest(self):
            return self.inner.hexdigest()

    inner, is_finite = checkpoints._tensor_hash, checkpoints._is_finite
    monkeypatch.setattr(checkpoints, "_tensor_hash", lambda *args: Hash(inner(*args)))

    def looked_at(tensor):
        found.now["bytes"] += tensor.nbytes
        return is_finite(tensor)

    monkeypatch.setattr(checkpoints, "_is_finite", looked_at)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("format", "model"),
    [
        ("bf16", {}),
        ("bf16", {"dtype": "float32"}),
        ("f32", {"dtype": "bfloat16"}),
        ("fp8-block", {}),
        ("fp8-block", {"dequantize": "load"}),
        ("fp8-channel", {"dtype": "float32"}),
    ],
)
def test_no_piece_touches_more_than_its_bound(amounts, tmp_path, name, format, model):
    sizes = resize("tiny", ["num_hidden_layers=2", *MODELS[name]])
    folder = make_checkpoint(tmp_path / "v1", shape=sizes, format=format)
    config = ModelConfig(**model)
    weights = weights_of(folder, model=config)
    canary = make_canary(weights, [(7 * n) % 500 for n in range(150)], 20)
    write_manifest(folder, manifest_of(Checkpoint.open(folder), version=1, canaries=[canary]))
    kv = ResolvedKV(
        block_size=4, num_blocks=8, max_model_len=160, prefix_caching=False, num_parking_blocks=0
    )
    stager = WeightStager(ModelRunner(weights, kv, config), config, free_bytes=lambda: 1 << 40)
    pieces_of = stager.stage(Stage(1, str(folder)))
    parts = []
    amounts.now.clear()
    with amounts:
        while True:
            try:
                parts.append(next(pieces_of))
            except StopIteration as stop:
                _, report = stop.value
                break
            finally:
                amounts.end_piece()
    assert report.max_delta == 0.0
    assert {part for part, _, _ in parts} == {"layout", "digests", "read", "canaries"}
    # the amounts are seen at all, and are those of the whole
    total = sum(amounts.pieces, Counter())
    assert total["bytes"] > 4 * report.num_bytes
    assert total["products"] > 100 * 24000 * 256 * (name == "wide vocabulary")
    # FP8 blocks are dequantised 128 rows at a time, some 40 bytes to a weight
    band = 128 * max(entry.shape[-1] for entry in Checkpoint.open(folder).entries.values()) * 40
    bound = max(TOUCHED, band) if "fp8" in format else TOUCHED
    for part, piece in zip([*parts, parts[-1]], amounts.pieces, strict=True):
        assert piece["bytes"] <= bound, (part, piece)
        assert piece["products"] <= pieces.PIECE_PRODUCTS, (part, piece)
        assert piece["weight bytes"] <= pieces.PIECE_WEIGHT_BYTES, (part, piece)
        assert piece["expert products"] <= pieces.PIECE_PRODUCTS, (part, piece)
        least = piece["bytes of one row's experts"]
        assert piece["expert bytes"] <= max(pieces.PIECE_WEIGHT_BYTES, least), (part, piece)
    # and what is given back, is so in parts
    made = stager._made
    sizes = [_size(part) for part in made]
    assert sum(sizes) > FREE_BYTES
    left = [len(made)]
    left += [len(made) for _ in stager.discard()] + [0]
    for first, last in itertools.pairwise(left):
        assert sum(sizes[last:first]) <= FREE_BYTES + max(sizes)


def _size(part):
    return part.num_bytes if isinstance(part, kernels.PackedWeight) else part.nbytes


def test_attention_over_a_long_canary_is_of_fewer_rows():
    shape = SHAPES["flash"]
    for end in (64, 4096, 32768):
        rows = rows_at_once(shape, 64, end)
        products = 2 * rows * end * shape.num_attention_heads * shape.head_dim
        assert rows == 1 or products <= pieces.PIECE_PRODUCTS
    assert rows_at_once(shape, 64, 64) == 64
