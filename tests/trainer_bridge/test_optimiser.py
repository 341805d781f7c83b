"""AdamW over shards: what a gradient that is no number does, and what a restart takes up."""

import math

import torch
from torch import nn

from everstep.trainer_bridge.trainer.config import OptimConfig
from everstep.trainer_bridge.trainer.optimiser import Optimiser

CONFIG = OptimConfig(lr=1e-2, warmup_steps=8)


def made() -> tuple[Optimiser, nn.Parameter]:
    parameter = nn.Parameter(torch.linspace(-1.0, 1.0, 6))
    return Optimiser({"w": parameter}, CONFIG), parameter


def steps(optimiser: Optimiser, parameter: nn.Parameter, gradients: list[float]) -> None:
    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimiser.step()


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_no_update() -> None:
    optimiser, parameter = made()
    before = parameter.detach().clone()
    for bad in (math.nan, math.inf):
        parameter.grad = torch.full_like(parameter, bad)
        assert not math.isfinite(optimiser.step())
    assert torch.equal(parameter, before)
    assert optimiser.num_updates == 0


def test_what_is_restored_goes_on_to_the_same_bits_after_a_bad_gradient() -> None:
    unkilled, one = made()
    steps(unkilled, one, [0.5, math.nan, 0.3])
    restored, other = made()
    with torch.no_grad():
        other.copy_(one)
    restored.load(unkilled.state(), unkilled.num_updates)
    for optimiser, parameter in ((unkilled, one), (restored, other)):
        steps(optimiser, parameter, [0.2, math.nan, -0.1])
    assert torch.equal(one, other)
    assert unkilled.num_updates == restored.num_updates == 4
