"""simulate(): one scheme on all ops, or others by rule, against torch's own arithmetic."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import (
    ALL,
    Branching,
    ConvNet,
    Encoder,
    Functional,
    Recurrent,
    Tied,
    Transposed,
    inputs_for,
    main_output,
    seeded,
)
from tuner import OpConfig, PerChannel, PerToken, Rule, TensorScheme, quantization
from tuner.errors import DataError

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


class Affine(nn.Module):
    """Both ways to write x W, and an add."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) @ self.w) + x


def simulated(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a simulation, having checked that the user's model is as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    training = model.training
    sim = quantization.simulate(model, *args, **kwargs)
    assert type(sim).__name__ == type(model).__name__
    assert isinstance(sim, type(model))
    assert list(sim.state_dict()) == list(before)
    assert model.training is training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(hasattr(m, "_tuner_path") for m in model.modules())
    return sim


# ---------------------------------------------------------------- numerics


def torch_int8(weight: Tensor, axis: int) -> Tensor:
    """Fake-quantize by torch: symmetric per channel, codes −128 … 127, the scale from 127."""
    weight = weight.detach()
    others = [d for d in range(weight.dim()) if d != axis]
    scale = weight.abs().amax(others) / 127
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -128, 127)


def test_weights_of_an_mlp_equal_torchs_fake_quantization() -> None:
    net = mlp()
    sim = simulated(net, weights=W8)
    with torch.no_grad():
        hidden = F.relu(F.linear(X, torch_int8(net[0].weight, 0), net[0].bias))
        expected = F.linear(hidden, torch_int8(net[2].weight, 0), net[2].bias)
        assert torch.allclose(sim(X), expected, atol=1e-6)
        assert not torch.allclose(net(X), expected, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_transposed_convolution_takes_the_axis_that_is_given(axis: int) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 3))
    sim = simulated(net, weights=TensorScheme(format="int8", granularity=PerChannel(axis)))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = F.conv_transpose2d(x, torch_int8(net[0].weight, axis), net[0].bias)
        assert torch.allclose(sim(x), expected, atol=1e-6)


def test_e4m3_inputs_equal_torchs_float8() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    data = torch.randn(64, 8) * 3
    sim = simulated(net, inputs="e4m3fn", calib_dataloader=[data[:32], data[32:]])
    scale = data.abs().max() / 448
    x = torch.cat([data, data * 2])  # beyond the range: it saturates
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    with torch.no_grad():
        assert torch.allclose(sim(x), net(rounded), atol=1e-5)
        assert not torch.allclose(sim(x), net(x), atol=1e-3)


def test_outputs_equal_torchs_affine_fake_quantization() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    sim = simulated(net, outputs=A8, calib_dataloader=[X])
    with torch.no_grad():
        y = net(X)
        scale = (y.max() - y.min()) / 255
        zero = int(torch.round(-y.min() / scale))
        expected = torch.fake_quantize_per_tensor_affine(y, float(scale), zero, 0, 255)
        assert torch.allclose(sim(X), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        ("bf16", lambda x: x.to(torch.bfloat16).float()),
        ("fp16", lambda x: x.to(torch.float16).float()),
        ("e4m3fn_unscaled", lambda x: x.to(torch.float8_e4m3fn).float()),
        (
            "e5m2_unscaled",
            lambda x: torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e5m2).astype(np.float32)),
        ),
    ],
)
def test_formats_without_a_scale_need_no_data(
    name: str, rounded: Callable[[Tensor], Tensor]
) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    sim = simulated(net, inputs=name, weights=name)
    with torch.no_grad():
        expected = F.linear(rounded(X), rounded(net[0].weight), net[0].bias)
        assert torch.allclose(sim(X), expected, atol=1e-6)


def test_per_token_inputs_need_no_data() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    sim = simulated(net, inputs=TensorScheme(format="int8", granularity=PerToken()))
    scale = X.abs().amax(-1) / 127
    zeros = torch.zeros(len(X), dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(X, scale, zeros, 0, -128, 127)
    with torch.no_grad():
        assert torch.allclose(sim(X), net(rounded), atol=1e-6)


# ---------------------------------------------------------------- which ops


def test_batch_norm_stays_where_it_is() -> None:
    net = seeded(ConvNet)
    sim = simulated(net, weights=W8, calib_dataloader=[inputs_for(net)])
    for name in ("bn", "bn2"):
        theirs, ours = net.get_submodule(name), sim.get_submodule(name)
        pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.allclose(sim.conv.weight, torch_int8(net.conv.weight, 0), atol=1e-7)


def levels(weight: Tensor) -> int:
    """Return how many different values a row holds at most."""
    return max(len(row.unique()) for row in weight.detach().flatten(1))


def test_rules_give_layers_their_own_schemes_and_the_last_wins() -> None:
    w3, w2 = (TensorScheme(format=f"int{b}", granularity=PerChannel(0)) for b in (3, 2))
    rules = [
        Rule(op_types=["Linear"], options=[OpConfig(weight=w3)]),
        Rule(names=["2"], options=[OpConfig(weight=w2)]),
    ]
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 64), nn.Linear(64, 64))
    sim = simulated(net, weights=W8, rules=rules)
    assert levels(sim[0].weight) > 2
    assert [levels(sim[i].weight) for i in (2, 3)] == [3, 7]
    kept = simulated(net, weights=w2, rules=[Rule(names=["3"], options=[OpConfig.float()])])
    assert torch.equal(kept[3].weight, net[3].weight)


def test_ops_outside_the_presets_are_reached_by_rules_only() -> None:
    net = Affine()
    coarse = TensorScheme(format="int2", dynamic=True)
    everywhere = simulated(net, inputs=coarse, calib_dataloader=[X])
    assert "add" not in str(everywhere)
    rule = Rule(op_types=["add"], options=[OpConfig(inputs=coarse)])
    sim = simulated(net, rules=[rule], calib_dataloader=[X])
    assert "add:0: input 0 int2 per-tensor symmetric, dynamic" in str(sim)
    with torch.no_grad():
        assert not torch.allclose(sim(X), net(X), atol=1e-2)


def test_embeddings_take_the_weight_only_unless_a_rule_says_more() -> None:
    net = seeded(Recurrent)
    x = inputs_for(net)
    sim = simulated(net, A8, W8, A8, [x])
    assert "weight int8" in str(sim.embed)
    assert "output" not in str(sim.embed)
    assert "output uint8" in str(sim.head)
    rule = Rule(names=["embed"], options=[OpConfig(output=A8)])
    assert "output uint8" in str(simulated(net, rules=[rule], calib_dataloader=[x]).embed)


def test_print_shows_schemes_and_scales() -> None:
    net = mlp()
    shown = str(simulated(net, A8, W8, calib_dataloader=[X]))
    span = float(X.max() - X.min()) / 255
    low, high = (float(e) / 127 for e in torch.aminmax(net[0].weight.detach().abs().amax(1)))
    assert f"weight int8 per-channel symmetric, scale {low:.4g} to {high:.4g}" in shown
    assert f"input 0 uint8 per-tensor affine, scale {span:.4g}, zero point" in shown


@pytest.mark.parametrize("net_type", ALL)
def test_every_net_can_be_simulated(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    w4 = TensorScheme(format="int4", calibration="mse")
    with torch.no_grad():
        reference = main_output(net(x))
        fine = main_output(simulated(net, "bf16", "bf16", "bf16", [x])(x))
        coarse = main_output(simulated(net, A8, w4, A8, [x])(x))
    assert torch.allclose(fine, reference, atol=0.05 * float(reference.abs().max()))
    assert not torch.allclose(coarse, reference, atol=1e-4)


# ---------------------------------------------------------------- without data


def test_without_data_modules_are_reached_and_calls_are_not() -> None:
    net = Affine()
    sim = simulated(net, weights=W8)
    assert torch.allclose(sim.body.weight, torch_int8(net.body.weight, 0), atol=1e-7)
    assert torch.equal(sim.w, net.w)
    with_data = simulated(net, weights=W8, calib_dataloader=[X])
    assert not torch.equal(with_data.w, net.w)


@pytest.mark.parametrize("net_type", [ConvNet, Encoder, Recurrent, Tied, Transposed])
def test_without_data_modules_get_what_they_get_with_data(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    schemes = {"weights": "int4", "inputs": TensorScheme(format="int4", dynamic=True)}
    with torch.no_grad():
        blind = simulated(net, **schemes)
        seen = simulated(net, **schemes, calib_dataloader=[x])
        assert torch.equal(main_output(blind(x)), main_output(seen(x)))
        assert not torch.equal(main_output(blind(x)), main_output(net(x)))


def test_without_data_a_static_range_is_refused() -> None:
    says = r"0: the static range of its input 0 \(int8\).*calib_dataloader, or .*dynamic=True"
    with pytest.raises(DataError, match=says):
        quantization.simulate(mlp(), inputs="int8")
    with pytest.raises(DataError, match="its output"):
        quantization.simulate(mlp(), outputs="e4m3fn")


def test_unreached_modules_stay_float_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    net = seeded(Branching)
    with caplog.at_level(logging.INFO, logger="tuner"):
        sim = simulated(net, weights="int2", calib_dataloader=[inputs_for(net) / 100])
    assert torch.equal(sim.never.weight, net.never.weight)
    assert "never reached 1 modules, which stay FP32: never" in caplog.text
    assert not torch.equal(sim.parts["other"].weight, net.parts["other"].weight)


def test_later_batches_that_take_another_branch_are_calibrated() -> None:
    net = seeded(Branching)
    x = inputs_for(net)
    far = torch.full_like(x, 3.0)
    with torch.no_grad():
        net.parts["shared"].weight.copy_(torch.eye(8) * 9)
        net.parts["shared"].bias.zero_()

    def forward(model: Any, batch: Tensor) -> Any:
        return model.never(batch) if batch[0, 0] == 3 else model(batch)

    sim = simulated(net, A8, "int4", calib_dataloader=[x / 100, far], forward=forward)
    assert "scale 0.01176" in str(sim.never)  # 3 / 255


def test_the_data_are_read_once_and_no_further_than_asked() -> None:
    read: list[int] = []

    def batches() -> Any:
        for i in range(9):
            read.append(i)
            yield X

    quantization.simulate(mlp(), A8, calib_dataloader=batches(), calib_samples=3 * len(X))
    assert read == [0, 1, 2]


# ---------------------------------------------------------------- what one does with a model


def test_modes_copies_and_pickles() -> None:
    sim = simulated(seeded(Functional), A8, W8, calib_dataloader=[inputs_for(seeded(Functional))])
    x = inputs_for(seeded(Functional))
    with torch.no_grad():
        expected = sim(x)
        assert torch.equal(copy.deepcopy(sim)(x), expected)
        again = pickle.loads(pickle.dumps(sim))
        assert torch.equal(again(x), expected)
        assert str(again) == str(sim)
        assert torch.equal(sim.train()(x), expected)
    assert sim.training
    assert all(m.training for m in sim.modules())
    assert not any(m.training for m in sim.eval().modules())


def test_gradients_pass_straight_through_the_inputs() -> None:
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    sim = simulated(net, inputs=TensorScheme(format="int8", dynamic=True))
    x = X.clone().requires_grad_()
    sim(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, net[0].weight.detach().sum(0).expand_as(X), atol=1e-6)


class SmallCnn(nn.Module):
    """A convolution, batch norm, pooling and a functional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))).mean((2, 3)) @ self.w


COMPILED = {
    "affine": A8,
    "dynamic": TensorScheme(format="int8", dynamic=True),
    "e4m3fn": "e4m3fn",
    "mxfp4": "mxfp4",
    "bf16": "bf16",
}


@pytest.mark.parametrize("inputs", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("net_type", [mlp, SmallCnn])
def test_it_compiles_without_a_graph_break(
    net_type: Callable[[], nn.Module], inputs: TensorScheme | str
) -> None:
    net = net_type().eval()
    x = X if isinstance(net, nn.Sequential) else torch.randn(4, 1, 8, 8)
    sim = simulated(net, inputs, W8, calib_dataloader=[x])
    torch.compiler.reset()
    compiled = torch.compile(sim, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), sim(x))
