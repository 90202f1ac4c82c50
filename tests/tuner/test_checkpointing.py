"""simulate() with torch.utils.checkpoint: what the backward computes again is quantized, too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tuner import TensorScheme, quantization
from tuner.errors import UnsupportedError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
INT3 = TensorScheme(format="int3")
EITHER = pytest.mark.parametrize("reentrant", [False, True])


def plain(fn: Callable[..., Any], x: Tensor) -> Any:
    return fn(x)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.linear(torch.tanh(x @ x.t() @ x), self.w))  # type: ignore[no-any-return]


class OfModules(nn.Module):
    """Recomputes modules, with functional calls inside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), nn.Linear(8, 8), Part()])
        self.via: Callable[..., Any] = plain

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = self.via(part, x)
        return x


class OfFunctions(nn.Module):
    """Recomputes a function that makes functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.via: Callable[..., Any] = plain

    def forward(self, x: Tensor) -> Tensor:
        return self.via(lambda y: F.linear(torch.tanh(F.linear(y, self.w)), self.w), x)  # type: ignore[no-any-return]


def checkpointed(reentrant: bool) -> Callable[..., Any]:
    return lambda fn, x: checkpoint(fn, x, use_reentrant=reentrant)


def backward(net: Any, via: Callable[..., Any]) -> list[Tensor]:
    """Return the gradients of the input and the parameters."""
    net.via = via
    net.zero_grad()
    x = X.clone().requires_grad_()
    net(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in net.parameters())]  # type: ignore[list-item]


@EITHER
def test_modules_that_are_computed_again_are_quantized(reentrant: bool) -> None:
    torch.manual_seed(0)
    sim = quantization.simulate(OfModules(), INT3, INT3, INT3, [X]).train()
    expected, got = backward(sim, plain), backward(sim, checkpointed(reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@EITHER
def test_functions_that_would_be_computed_again_in_float_are_refused(reentrant: bool) -> None:
    sim = quantization.simulate(OfFunctions(), INT3, calib_dataloader=[X]).train()
    with pytest.raises(UnsupportedError, match=r"^/linear:0 .*checkpoint an nn.Module"):
        backward(sim, checkpointed(reentrant))


@EITHER
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_is_not_refused(reentrant: bool, grad: bool) -> None:
    sim: Any = quantization.simulate(OfFunctions(), INT3, calib_dataloader=[X])
    with torch.set_grad_enabled(grad):
        expected = sim(X)
        sim.via = checkpointed(reentrant)
        assert torch.equal(sim(X.clone().requires_grad_()), expected)


@EITHER
def test_rounded_weights_alone_may_be_used_again(reentrant: bool) -> None:
    sim = quantization.simulate(OfFunctions(), weights=INT3, calib_dataloader=[X]).train()
    expected, got = backward(sim, plain), backward(sim, checkpointed(reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@EITHER
def test_training_refuses_functions_too(reentrant: bool) -> None:
    trainable = quantization.prepare_qat(OfFunctions(), calib_dataloader=[X], weights=INT3)
    with pytest.raises(UnsupportedError, match=r"^/linear:0 .*checkpoint an nn.Module"):
        backward(trainable.model, checkpointed(reentrant))
