"""Constants that biases take over: where they may, which, and what the network then computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.recovery.chain_nets import Net, chains_of
from tuner.batches import Feeder
from tuner.recovery.absorption import Offset, shifts_between
from tuner.recovery.chains import Chain
from tuner.recovery.float_values import FloatValues
from tuner.recovery.scaling import FunctionCheck, Scaling, scale

_FP64, _FP32 = 1e-12, 1e-5  # of the largest output
IMAGE, ROWS, TOKENS = (4, 3, 8, 8), (16, 6), (4, 5, 6)
Case = tuple[Callable[[], Net], tuple[int, ...], Offset]


def same(x: Tensor) -> Tensor:
    return x


def linears(function: Callable[[Tensor], Tensor] = same, **others: nn.Module) -> Net:
    layers: dict[str, nn.Module] = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), **others}
    return Net(lambda net, x: net.b(function(net.a(x))), **layers)


def convs(function: Callable[[Tensor], Tensor] = same, **options: Any) -> Net:
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3, **options)}
    return Net(lambda net, x: net.b(function(net.a(x))), **layers)


def headed(function: Callable[[Tensor], Tensor], width: int = 8) -> Net:
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Linear(width, 3)}
    return Net(lambda net, x: net.b(function(net.a(x))), **layers)


def normed(norm: nn.Module, layer: nn.Module) -> Net:
    return Net(lambda net, x: net.b(net.a(x)), a=norm, b=layer)


def siblings(first: Callable[[Tensor], Tensor] = same) -> Net:
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), "c": nn.Linear(8, 3)}
    return Net(lambda net, x: (lambda y: net.b(first(y)) - net.c(y))(net.a(x)), **layers)


def after_batch_norm() -> Net:
    layers = {"a": nn.Conv2d(3, 8, 3, bias=False), "n": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 1)}
    return Net(lambda net, x: net.b(net.n(net.a(x)).relu()), **layers)


FREE: dict[str, Case] = {
    "linear": (linears, ROWS, "any"),
    "tokens": (linears, TOKENS, "any"),
    "conv1d of groups": (
        lambda: normed(nn.Conv1d(5, 8, 3), nn.Conv1d(8, 4, 2, groups=2)),
        TOKENS,
        "any",
    ),
    "conv2d": (convs, IMAGE, "any"),
    "depthwise": (lambda: convs(groups=8), IMAGE, "any"),
    "strided and dilated": (lambda: convs(stride=2, dilation=2), IMAGE, "any"),
    "padded by reflection": (lambda: convs(padding=1, padding_mode="reflect"), IMAGE, "any"),
    "padded in a circle": (lambda: convs(padding=1, padding_mode="circular"), IMAGE, "any"),
    "conv3d": (lambda: normed(nn.Conv3d(3, 8, 2), nn.Conv3d(8, 2, 2)), (2, 3, 4, 4, 4), "any"),
    "transposed before": (
        lambda: normed(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.Conv2d(6, 4, 3)),
        IMAGE,
        "any",
    ),
    "max pooling": (lambda: convs(lambda x: F.max_pool2d(x, 2, padding=1)), IMAGE, "any"),
    "a mean": (lambda: headed(lambda x: x.mean((2, 3))), IMAGE, "any"),
    "global pooling": (
        lambda: headed(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
        IMAGE,
        "any",
    ),
    "interpolation": (
        lambda: convs(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
        IMAGE,
        "any",
    ),
    "flattened": (lambda: headed(lambda x: x.flatten(1), 8 * 36), IMAGE, "any"),
    "layer norm": (lambda: normed(nn.LayerNorm(6), nn.Linear(6, 3)), TOKENS, "any"),
    "group norm": (lambda: normed(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 3)), IMAGE, "any"),
    "batch norm": (lambda: normed(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), IMAGE, "any"),
    "several consumers": (siblings, ROWS, "any"),
}
RECTIFIED: dict[str, Case] = {
    "relu": (lambda: linears(F.relu), ROWS, "minimum"),
    "relu in place": (lambda: linears(lambda x: x.relu_()), TOKENS, "minimum"),
    "leaky relu": (lambda: linears(F.leaky_relu), ROWS, "minimum"),
    "depthwise behind relu": (lambda: convs(F.relu, groups=8), IMAGE, "minimum"),
    "max pooling behind relu": (
        lambda: headed(lambda x: F.max_pool2d(x.relu(), 2).flatten(1), 72),
        IMAGE,
        "minimum",
    ),
    "relu behind max pooling": (
        lambda: convs(lambda x: F.leaky_relu(F.max_pool2d(x, 2))),
        IMAGE,
        "minimum",
    ),
    "a folded norm and relu": (after_batch_norm, IMAGE, "minimum"),
}
REFUSED: dict[str, Case] = {
    "padding by zeros": (lambda: convs(padding=1), IMAGE, "none"),
    "padding to the same size": (lambda: convs(padding="same"), IMAGE, "none"),
    "transposed behind": (
        lambda: normed(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2)),
        IMAGE,
        "none",
    ),
    "average pooling": (lambda: convs(lambda x: F.avg_pool2d(x, 2, padding=1)), IMAGE, "none"),
    "dropout": (lambda: linears(lambda x: F.dropout(x, training=False)), ROWS, "none"),
    "prelu": (
        lambda: Net(
            lambda net, x: net.b(net.act(net.a(x))),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
            act=nn.PReLU(8),
        ),
        ROWS,
        "none",
    ),
    "relu6": (
        lambda: Net(
            lambda net, x: net.b(net.act(net.a(x))),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
            act=nn.ReLU6(),
        ),
        ROWS,
        "none",
    ),
    "a mean behind relu": (lambda: headed(lambda x: x.relu().mean((2, 3))), IMAGE, "none"),
    "no bias before": (lambda: linears(a=nn.Linear(6, 8, bias=False)), ROWS, "none"),
    "no bias behind": (lambda: linears(b=nn.Linear(8, 3, bias=False)), ROWS, "none"),
    "a norm without biases": (lambda: normed(nn.RMSNorm(6), nn.Linear(6, 3)), TOKENS, "none"),
    "consumers of different tensors": (lambda: siblings(F.relu), ROWS, "none"),
}


def made(name: str) -> tuple[Any, Tensor]:
    """Return a network in fp64, and inputs on which its hidden channels lie high."""
    torch.manual_seed(0)
    make, shape, _ = (FREE | RECTIFIED | REFUSED)[name]
    net = make().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.bias.data.fill_(0.5)
    x = torch.randn(shape, dtype=torch.float64)
    if net.a._parameters.get("bias") is not None:
        net.a.bias.data += 1.0
    return net, x


@pytest.mark.parametrize("name", [*FREE, *RECTIFIED, *REFUSED])
def test_what_may_be_taken(name: str) -> None:
    net, x = made(name)
    _, (chain,) = chains_of(net, x)
    assert chain.offset == (FREE | RECTIFIED | REFUSED)[name][2]


@pytest.mark.parametrize("name", ["conv2d", "depthwise behind relu"])
@pytest.mark.parametrize("padding", ["valid", 0, "same"])
def test_padding_by_nothing_is_none(name: str, padding: Any) -> None:
    net, x = made(name)
    kernel = 1 if padding == "same" else 3
    net.b = nn.Conv2d(8, 4, kernel, padding=padding).double()
    _, (chain,) = chains_of(net, x)
    assert chain.offset == (FREE | RECTIFIED)[name][2]


def scaling_of(chain: Chain, shifts: Tensor) -> Scaling:
    factors = torch.logspace(-1, 1, chain.channels, dtype=torch.float64)
    return Scaling(chain, "equalization", factors, 1.0, shifts)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", FREE)
def test_without_a_function_between_every_output_stays(name: str) -> None:
    net, x = made(name)
    model, (chain,) = chains_of(net, x)
    other = 10 * torch.randn_like(x)
    expected, before = net(other), net.a(other)
    shifts = torch.linspace(-3, 5, chain.channels, dtype=torch.float64)
    scaling = scaling_of(chain, shifts)
    scale(model, scaling)
    assert difference(net(other), expected) < _FP64
    axis = 1 if before.dim() > 3 or name.startswith("conv1d") else -1
    along = (-1, *[1] * (before.dim() - 2) * (axis == 1))
    taken = (before - shifts.view(along)) / scaling.factors.view(along)
    assert difference(net.a(other), taken) < _FP64
    for path in chain.consumers:
        ref = model.ops[path].weights[0]
        assert torch.equal(model.weights.original(ref), net.get_parameter(ref.path))


def hidden(net: Any, x: Tensor) -> Tensor:
    """Return what the consumer takes."""
    seen: list[Tensor] = []
    handle = net.b.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    net(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", RECTIFIED)
def test_through_a_relu_calibration_outputs_stay(name: str) -> None:
    net, x = made(name)
    model, (chain,) = chains_of(net, x)
    net.a.bias.data += 0.1 - net.a(x).min()  # all channels above 0
    y, expected = hidden(net, x), net(x)
    axis = 1 if y.dim() > 3 or y.shape[-1] == 72 else -1
    low = y.movedim(axis, 0).reshape(chain.channels, -1).amin(1)
    scale(model, scaling_of(chain, low))  # as far as it may go
    assert difference(net(x), expected) < _FP64


@torch.no_grad()
@pytest.mark.parametrize("name", ["relu", "depthwise behind relu"])
def test_values_below_the_minimum_of_calibration_count_as_that(name: str) -> None:
    net, x = made(name)
    model, (chain,) = chains_of(net, x)
    other = 3 * torch.randn_like(x)
    y = hidden(net, other)
    shifts = torch.linspace(0, 2, chain.channels, dtype=torch.float64)
    along = shifts.view(-1, *[1] * (y.dim() - 2))
    assert bool((y < along).any())
    expected = net.b(torch.maximum(y, along))
    scale(model, scaling_of(chain, shifts))
    assert difference(net(other), expected) < _FP64


def test_what_is_taken() -> None:
    low = torch.tensor([-2.0, 1.0, 3.0, -torch.inf, torch.inf])
    high = torch.tensor([4.0, 1.0, 9.0, torch.inf, -torch.inf])
    expected: dict[Offset, list[float]] = {
        "any": [1.0, 1.0, 6.0, 0.0, 0.0],
        "minimum": [0.0, 1.0, 1.5, 0.0, 0.0],  # a quarter of the range below the minimum
    }
    for offset, values in expected.items():
        found = shifts_between(offset, low, high)
        assert found is not None
        assert found.tolist() == values
    assert shifts_between("none", low, high) is None
    assert shifts_between("minimum", torch.tensor([-1.0, 0.0]), torch.ones(2)) is None


@torch.no_grad()
def test_the_biases_come_back_to_the_bit() -> None:
    net, x = made("several consumers")
    state = {name: t.clone() for name, t in net.state_dict().items()}
    model, (chain,) = chains_of(net, x)
    floats = FloatValues(model)
    floats.keep(chain)
    scale(model, scaling_of(chain, torch.ones(8, dtype=torch.float64) / 3))
    assert not torch.equal(net.c.bias, state["c.bias"])
    floats.give_back()
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(("taken", "stays"), [(0.9, True), (1.5, False)])
def test_more_than_a_relu_can_give_is_taken_back(taken: float, stays: bool) -> None:
    net, x = made("relu")
    model, (chain,) = chains_of(net, x)
    net.a.bias.data += 1 - net.a(x).min()
    low = hidden(net, x).amin(0)
    check, floats = FunctionCheck(model, Feeder(net), x), FloatValues(model)
    scaling = scaling_of(chain, taken * low)
    floats.keep(chain)
    scale(model, scaling)
    assert check.kept([scaling], floats) == ((scaling,) if stays else ())


@torch.no_grad()
def test_in_fp32_what_is_high_stays_right() -> None:
    net, x = made("layer norm")
    net, x = net.float(), x.float()
    net.a.bias.data += 1000.0
    expected = net(x)
    model, (chain,) = chains_of(net, x)
    scale(model, scaling_of(chain, torch.full((6,), 1000.0, dtype=torch.float64)))
    assert difference(net(x), expected) < _FP32


@pytest.mark.parametrize("repair", ["equalization", "bias_absorption"])
def test_a_scaling_with_shifts_survives_json(repair: str) -> None:
    scaling = Scaling(Chain("a", ("b",), 3), repair, torch.ones(3).double(), 2.0, torch.rand(3))
    again = Scaling.from_dict(scaling.to_dict())
    assert again.shifts is not None
    assert torch.equal(again.shifts.float(), torch.as_tensor(scaling.shifts))
    assert again.repairs == scaling.repairs
    assert again.repairs[-1] == "bias_absorption"
    before = {name: value for name, value in scaling.to_dict().items() if name != "shifts"}
    assert Scaling.from_dict(before).shifts is None
