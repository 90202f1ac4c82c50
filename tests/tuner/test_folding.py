"""Batch norm folded into the layer before it."""

import pytest
import torch
from torch import nn

from tests.tuner.nets import ConvNet, Transposed, inputs_for, seeded
from tuner.model import InstrumentedModel
from tuner.recovery.folding import FoldedPair, find_pairs, fold, folded_names


def pairs_of(net: nn.Module, x: torch.Tensor) -> list[FoldedPair]:
    return find_pairs(net, InstrumentedModel(net).record(lambda: net(x), len(x)))


@pytest.mark.parametrize(
    ("net_type", "expected"),
    [
        (ConvNet, [("conv", "bn"), ("depthwise", "bn2")]),
        (Transposed, [("conv", "bn"), ("up", "bn2"), ("head", "bn3")]),
    ],
)
def test_outputs_stay_and_norms_become_identities(
    net_type: type[nn.Module], expected: list[tuple[str, str]]
) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    with torch.no_grad():
        before = net(x)
        pairs = pairs_of(net, x)
        assert [(p.layer, p.norm) for p in pairs] == expected
        changed = fold(net, pairs)
        for name, value in changed.items():
            net.get_parameter(name).data = value
        after = net(x)
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)
    assert isinstance(net.bn, nn.BatchNorm1d | nn.BatchNorm2d)
    assert torch.equal(net.bn(before), before)
    assert "bn.running_var" in folded_names(net, pairs)
    assert f"folded into {expected[0][0]}" in repr(net)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)


class _UsedTwice(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class _TwoNorms(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) if x.shape[0] > 9 else self.bn2(torch.relu(self.conv(x)))


class _SharedConv(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) + self.bn2(self.conv(x * 2))


class _ChangedInPlace(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y[:, 0] = 0
        return self.bn(y)


class _Returned(_Net):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class _LastAxis(nn.Module):
    """BatchNorm1d normalises axis 1 of [N, L, C], which is not the linear layer's output axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 5)
        self.bn = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.linear(x.flatten(1)[:, :5, None]))  # type: ignore[no-any-return]


class _Hooked(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "net_type",
    [_UsedTwice, _TwoNorms, _SharedConv, _ChangedInPlace, _Returned, _LastAxis, _Hooked],
)
def test_what_must_not_be_folded_is_not(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    assert pairs_of(net, torch.randn(4, 1, 3, 3)) == []


def test_training_mode_is_not_folded() -> None:
    net = seeded(ConvNet)
    net.bn.train()
    assert [p.norm for p in pairs_of(net, inputs_for(net))] == ["bn2"]
