"""Weights rounded by what calibration saw, scaled channels among them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.recovery.chain_nets import Net, recorded
from tests.tuner.recovery.problems import Watch
from tests.tuner.recovery.references import error
from tuner import PerChannel, TensorScheme
from tuner.errors import SpaceError
from tuner.model import InstrumentedModel
from tuner.qparams import fake_quantize
from tuner.recovery.gptq import gptq
from tuner.recovery.layers import channel_axis, input_channels
from tuner.recovery.rounder import Rounder, can_have
from tuner.repairs import ADAROUND, GPTQ

_FP32 = 1e-4  # relative, of sums in fp32
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (64, 8)),
    "tokens": (lambda: nn.Linear(8, 6), (8, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (16, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (16, 4, 6, 6)),
    "conv2d of groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (16, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (16, 4, 6, 6)),
    "padded by reflection": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (16, 4, 6, 6),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), (16, 8, 4, 4)),
}
ZEROS = ("transposed",)
"""What meets zeros between its inputs, which a shift would have to change."""


def data_for(name: str) -> Tensor:
    """Return inputs with a mean, whose channels depend on each other."""
    x = torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(1))
    return x + x.roll(1, -1) + 2 * x[:, :1] + 0.5


def along(factors: Tensor, layer: nn.Module) -> Tensor:
    return factors.view(-1, *[1] * (-1 - channel_axis(layer)))


def seen(net: nn.Module, x: Tensor, wanted: list[str] | None = None) -> tuple[Any, Rounder]:
    """Return an instrumented network, and a rounder that has seen its calls on x."""
    model, graph = recorded(net, x)
    rounder = Rounder(graph.ops.values(), graph.ops if wanted is None else wanted)
    watch = Watch()
    with torch.no_grad(), model.watching(watch):
        net(x)
    for op, calls in watch.calls.items():
        for call in calls:
            for index, operand in call.operands.items():
                rounder.watch(op, call.call, index, operand)
    return model, rounder


def single(name: str) -> Net:
    torch.manual_seed(0)
    return Net(lambda net, x: net.a(x), a=LAYERS[name][0]())


def scheme_of(model: InstrumentedModel, name: str = "a") -> TensorScheme:
    axis = model.ops[name].weights[0].axis
    return TensorScheme(format="int3", granularity=PerChannel(axis))


def test_a_linear_weight_is_rounded_by_its_second_moments() -> None:
    net, x = single("linear"), data_for("linear")
    model, rounder = seen(net, x)
    scheme, ref = scheme_of(model), model.ops["a"].weights[0]
    weight, second = net.a.weight.detach(), x.T @ x / len(x)
    found = rounder.rounded(ref, weight, scheme, GPTQ)
    expected, _ = gptq(weight, second[None], scheme)
    torch.testing.assert_close(found, expected, rtol=_FP32, atol=0.0)
    plain = fake_quantize(weight, scheme)
    assert error(found, weight, second) < 0.8 * error(plain, weight, second)


@torch.no_grad()
@pytest.mark.parametrize("method", [GPTQ, ADAROUND])
@pytest.mark.parametrize("name", LAYERS)
def test_rounding_lessens_the_error_of_the_layers_output(name: str, method: str) -> None:
    net, x = single(name), data_for(name)
    model, rounder = seen(net, x)
    scheme, ref = scheme_of(model), model.ops["a"].weights[0]
    weight, expected = net.a.weight.detach().clone(), net(x)
    errors = []
    for value in (
        fake_quantize(weight, scheme),
        rounder.rounded(ref, weight, scheme, method),
    ):
        net.a.weight.data = value
        errors.append(float((net(x) - expected).square().mean()))
    assert errors[1] < 0.95 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "shifts"),
    [*((name, False) for name in LAYERS), *((name, True) for name in LAYERS if name not in ZEROS)],
)
def test_moments_follow_when_channels_are_scaled_later(name: str, shifts: bool) -> None:
    net, x = single(name), data_for(name)
    factors = torch.logspace(-1, 1, input_channels(net.a))
    taken = torch.linspace(-2, 3, input_channels(net.a)) * shifts
    model, later = seen(net, x)
    later.rescale("a", factors.double(), taken.double() if shifts else None)
    _, sooner = seen(net, (x - along(taken, net.a)) / along(factors, net.a))
    assert float((later._second("a") - sooner._second("a")).abs().max()) < _FP32 * float(
        sooner._second("a").abs().max()
    )
    op, weight = model.ops["a"], net.a.weight.detach()
    rounded = fake_quantize(weight, scheme_of(model))
    torch.testing.assert_close(
        later.correction(op, weight, rounded),
        sooner.correction(op, weight, rounded),
        rtol=_FP32,
        atol=_FP32,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "transposed"])
def test_a_corrected_bias_gives_the_outputs_their_means_back(name: str) -> None:
    net, x = single(name), data_for(name)
    model, rounder = seen(net, x)
    weight, expected = net.a.weight.detach().clone(), net(x)
    rounded = fake_quantize(weight, scheme_of(model))
    net.a.weight.data = rounded
    axes = [i for i in range(expected.dim()) if i != expected.dim() + channel_axis(net.a)]
    wrong = (net(x) - expected).mean(axes)
    net.a.bias.data += rounder.correction(model.ops["a"], weight, rounded)
    right = (net(x) - expected).mean(axes)
    assert float(right.abs().max()) < 1e-3 * float(wrong.abs().max())


def test_memory_format_and_dtype_stay() -> None:
    net, x = single("conv2d").to(torch.bfloat16), data_for("conv2d").to(torch.bfloat16)
    net.a.to(memory_format=torch.channels_last)
    model, rounder = seen(net, x)
    weight = net.a.weight.detach()
    found = rounder.rounded(model.ops["a"].weights[0], weight, scheme_of(model), GPTQ)
    assert found.dtype == torch.bfloat16
    assert found.stride() == weight.stride()


@torch.no_grad()
def test_a_functional_product_with_a_parameter_is_rounded() -> None:
    net = Net(lambda net, x: F.linear(x, net.w))
    net.w = nn.Parameter(torch.randn(6, 8))
    model, rounder = seen(net, data_for("linear"))
    (name,) = model.ops
    assert rounder.can_round(name)
    found = rounder.rounded(model.ops[name].weights[0], net.w, scheme_of(model, name), GPTQ)
    x = data_for("linear")
    plain = fake_quantize(net.w, scheme_of(model, name))
    errors = [float((x @ (w - net.w).T).square().sum()) for w in (plain, found)]
    assert errors[1] < 0.8 * errors[0]


def tied() -> Net:
    net: Any = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    net.b.weight = net.a.weight
    return net  # type: ignore[no-any-return]


CANNOT: dict[str, tuple[Callable[[], Net], str, list[str] | None]] = {
    "a tied weight": (tied, "a", None),
    "an op that is not wanted": (lambda: single("linear"), "a", []),
    "recurrent layers": (lambda: Net(lambda net, x: net.a(x)[0], a=nn.LSTM(8, 8)), "a", None),
    "an op that is never called": (lambda: single("linear"), "b", None),
    "a product of activations": (lambda: Net(lambda net, x: x @ x.T), "/matmul:0", None),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_rounded_is_refused_by_name(name: str) -> None:
    make, op, wanted = CANNOT[name]
    _, rounder = seen(make(), data_for("linear"), wanted)
    assert not rounder.can_round(op)
    with pytest.raises(SpaceError, match=f"^{op}: its weight cannot be rounded"):
        rounder.refuse_vain([op])


def test_no_rows_are_not_enough() -> None:
    net = single("linear")
    _, rounder = seen(net, torch.full((4, 8), float("nan")))
    assert not rounder.can_round("a")
    _, empty = seen(net, torch.empty(0, 8))
    assert not empty.can_round("a")


@pytest.mark.parametrize(
    ("format_name", "can"),
    [("int2", True), ("int7", True), ("int8", False), ("e2m1", True), ("mxfp4", True)],
)
def test_formats_of_few_values_are_worth_rounding(format_name: str, can: bool) -> None:
    assert can_have(TensorScheme(format=format_name)) == can
