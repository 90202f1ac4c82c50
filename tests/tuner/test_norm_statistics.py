"""Batch norm statistics taken anew under a plan: SearchSpace(repairs=("bn_reestimation",))."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import seeded
from tuner import (
    OpConfig,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
COARSE = TensorScheme(format="int3", calibration="minmax")


class PreActivation(nn.Module):
    """Norms before convolutions, as in pre-activation ResNets: none can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(x)
        y: Tensor = self.fc(
            (x.mean((2, 3), keepdim=True) + self.conv(F.relu(self.norm(x)))).mean((2, 3))
        )
        return y


@pytest.fixture
def net() -> nn.Module:
    model = seeded(PreActivation)
    model.train()
    for _ in range(50):
        model(X)
    return model.eval()


def tuned(net: nn.Module, *recovery: str) -> QuantizedModel:
    option = OpConfig(weight=COARSE, recovery=recovery)
    space = SearchSpace(rules=[Rule(op_types=["Conv2d", "Linear"], options=[option])])
    return quantization.fit(net, [X], config=TuningConfig(space=space))


def moments(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and variance in front of the norm of the quantized model."""
    with torch.no_grad():
        seen = model.stem(X)
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3))


def test_statistics_are_those_of_the_quantized_model(net: nn.Module, tmp_path: Path) -> None:
    plain, anew = tuned(net), tuned(net, "bn_reestimation")
    assert torch.equal(plain.model.norm.running_mean, net.norm.running_mean)
    mean, variance = moments(anew.model)
    assert torch.allclose(anew.model.norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(anew.model.norm.running_var, variance, rtol=1e-4)
    assert not torch.allclose(anew.model.norm.running_mean, net.norm.running_mean, atol=1e-3)
    anew.save(tmp_path / "saved")
    loaded = quantization.load(tmp_path / "saved", seeded(PreActivation))
    assert torch.equal(loaded(X), anew(X))


def test_they_are_given_back(net: nn.Module) -> None:
    model = tuned(net, "bn_reestimation")
    model._parts.model.apply({})
    assert torch.equal(model.model.norm.running_mean, net.norm.running_mean)
    assert torch.equal(model.model.norm.running_var, net.norm.running_var)
    assert model.model.norm.num_batches_tracked == net.norm.num_batches_tracked
    assert torch.equal(model.model(X), net(X))


def test_presets_get_it_where_it_is_allowed_and_norms_remain(net: nn.Module) -> None:
    def recoveries(model: nn.Module, *repairs: str) -> set[bool]:
        config = TuningConfig(space=SearchSpace(repairs=repairs))
        plan = quantization.fit(model, [X], config=config).plan
        return {"bn_reestimation" in config.recovery for config in plan.values()}

    assert recoveries(net, "bn_reestimation") == {True}
    assert recoveries(net) == {False}
    assert recoveries(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "bn_reestimation") == {False}
