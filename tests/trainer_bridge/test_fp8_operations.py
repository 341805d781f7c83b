"""What surrounds transformer-engine's FP8 products, with a stand-in that does not round: which layers
take them, what rows they get, and that gradients reach the weights. The package itself has not been
run."""

import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch

from everstep.engine.errors import ConfigError, MissingExtra
from everstep.trainer_bridge.trainer import fp8_operations
from everstep.trainer_bridge.trainer.packing import TrainSequence, pack
from everstep.trainer_bridge.trainer.trainable import open_trainable

from ..engine.ring_draws import Draw as Drawn
from ..engine.ring_draws import base_config, write_checkpoint


@pytest.fixture
def forget():
    fp8_operations._package.cache_clear()
    fp8_operations._product.cache_clear()
    yield
    fp8_operations._package.cache_clear()
    fp8_operations._product.cache_clear()


@pytest.fixture
def stand_in(monkeypatch, forget):
    """The parts of the package's interface that are used; returns the shapes that were multiplied."""
    shapes = []

    class Linear(torch.nn.Linear):
        def __init__(self, inputs, outputs, *, bias, params_dtype, device):
            super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

        def forward(self, x):
            assert is_on
            shapes.append((x.shape[0], *self.weight.shape))
            return super().forward(x)

    is_on = []

    @contextmanager
    def fp8_autocast(*, enabled, fp8_recipe):
        assert enabled
        assert fp8_recipe == "blocks"
        is_on.append(True)
        yield
        is_on.pop()

    pytorch, recipe = ModuleType("pytorch"), ModuleType("recipe")
    pytorch.Linear, pytorch.fp8_autocast = Linear, fp8_autocast
    recipe.Float8BlockScaling = lambda: "blocks"
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    return shapes


def test_layers_of_whole_blocks_are_multiplied_in_padded_rows(stand_in, tmp_path):
    config = base_config(
        vocab_size=90, hidden_size=128, intermediate_size=128, moe_intermediate_size=64
    )
    folder = write_checkpoint(tmp_path, Drawn(config=config))
    random = np.random.default_rng(0)
    batch = pack([TrainSequence(random.integers(0, 90, n), 2) for n in (40, 100)])
    grads = {}
    for numerics in ("plain", "fp8"):
        ring = open_trainable(folder, numerics=numerics)
        ring(batch).lp.sum().backward()
        grads[numerics] = {name: p.grad for name, p in ring.named_parameters()}
    # 138 rows: the dense layer's gate, up and down; attention is 64 wide, as experts are
    assert stand_in == [(256, 128, 128)] * 3
    for name, grad in grads["fp8"].items():
        torch.testing.assert_close(grad, grads["plain"][name], atol=1e-4, rtol=1e-3)


def test_without_the_package_or_a_gpu_it_is_refused(monkeypatch, forget):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        MissingExtra, match=r"numerics.fp8 needs the package 'transformer-engine': "
    ):
        fp8_operations.check_fp8(torch.device("cuda"))


def test_a_cpu_is_refused(stand_in):
    with pytest.raises(
        ConfigError, match=r"numerics.fp8 needs a CUDA device; this rank trains on cpu"
    ):
        fp8_operations.check_fp8(torch.device("cpu"))
