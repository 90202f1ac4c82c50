"""Small models to train under a plan, and how one step of training goes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.tuner.nets import main_output
from tuner import OpConfig, PerChannel, TensorScheme
from tuner.trainable_model import TrainableModel, parameter_groups
from tuner.trainable_preparation import prepare_qat

INPUTS = TensorScheme(format="int8", symmetric=False)
WEIGHTS = TensorScheme(format="int4", granularity=PerChannel(0))
CONFIG = OpConfig(weight=WEIGHTS, inputs=INPUTS)
METHODS = ("qat", "lsq", "lsq+")


class Perceptron(nn.Module):
    """Linear, ReLU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def batches(count: int = 4, samples: int = 8) -> list[Tensor]:
    """Return batches for the perceptron, the same each time."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(samples, 6, generator=generator) for _ in range(count)]


def prepared(net: nn.Module, data: Iterable[Any] | None, **options: Any) -> TrainableModel:
    """Return a trainable model with 4 bit weights and 8 bit inputs, or other ones."""
    options = {"weights": WEIGHTS, "inputs": INPUTS, **options}
    return prepare_qat(net, calib_dataloader=data, **options)


def train(model: TrainableModel, data: Iterable[Any], lr: float = 1e-2) -> torch.optim.Optimizer:
    """Take one optimizer step for each batch, and return the optimizer."""
    optimizer = torch.optim.Adam(parameter_groups(model, lr))
    for batch in data:
        step(model, optimizer, batch)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """Take one optimizer step in training mode and return the loss before it.

    Dropout is the same each time.
    """
    model.train()
    torch.manual_seed(0)
    optimizer.zero_grad()
    loss = main_output(model(batch)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def evaluated(model: nn.Module, batch: Tensor) -> Tensor:
    """Return what a model gives in eval mode."""
    with torch.no_grad():
        return main_output(model.eval()(batch))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models have the same state, to the bit."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
