"""Scaling keeps a model's function, on every kind of layer; what does not is taken back."""

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.recovery.chain_nets import Net, chains_of
from tuner.batches import Feeder
from tuner.errors import PlanError
from tuner.model import InstrumentedModel
from tuner.recovery.caps import cap
from tuner.recovery.chains import Chain
from tuner.recovery.float_values import FloatValues
from tuner.recovery.scaling import FunctionCheck, Scaling, prepare_caps, scale
from tuner.repairs import Repair

_FP32 = 1e-5  # of the largest output
IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)


def relu_pair(a: nn.Module, b: nn.Module, act: nn.Module | None = None) -> Net:
    return Net(lambda net, x: net.b(net.act(net.a(x))), a=a, b=b, act=act or nn.ReLU())


def flattened(net: Net, x: Tensor) -> Tensor:
    return net.b(F.max_pool2d(net.act(net.a(x)), 2).flatten(1))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "linear": (lambda: relu_pair(nn.Linear(6, 8), nn.Linear(8, 3)), TOKENS),
    "conv1d": (lambda: relu_pair(nn.Conv1d(5, 8, 3), nn.Conv1d(8, 4, 2, groups=2)), TOKENS),
    "conv2d": (lambda: relu_pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, groups=4)), IMAGE),
    "depthwise": (lambda: relu_pair(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)), IMAGE),
    "conv3d": (lambda: relu_pair(nn.Conv3d(3, 8, 2), nn.Conv3d(8, 2, 2)), (2, 3, 4, 4, 4)),
    "transposed": (
        lambda: relu_pair(
            nn.ConvTranspose2d(3, 8, 2), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        ),
        IMAGE,
    ),
    "transposed groups before": (
        lambda: relu_pair(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.Conv2d(6, 4, 3)),
        IMAGE,
    ),
    "padded by reflection": (
        lambda: relu_pair(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=2, padding_mode="reflect")
        ),
        IMAGE,
    ),
    "channels last": (
        lambda: relu_pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)).to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        ),
        IMAGE,
    ),
    "flattened": (
        lambda: Net(flattened, a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 4), act=nn.ReLU()),
        IMAGE,
    ),
    "layer norm": (lambda: relu_pair(nn.LayerNorm(6), nn.Linear(6, 3), nn.Identity()), TOKENS),
    "rms norm": (lambda: relu_pair(nn.RMSNorm(6), nn.Linear(6, 3), nn.Identity()), TOKENS),
    "group norm": (lambda: relu_pair(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 3)), IMAGE),
    "batch norm": (lambda: relu_pair(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), IMAGE),
    "relu6": (lambda: relu_pair(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.ReLU6()), IMAGE),
    "relu6 in place, rows": (
        lambda: relu_pair(nn.Linear(6, 8), nn.Linear(8, 3), nn.ReLU6(inplace=True)),
        TOKENS,
    ),
    "relu6 after batch norm": (
        lambda: relu_pair(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU6()),
        IMAGE,
    ),
    "relu6, flattened after": (
        lambda: Net(flattened, a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 4), act=nn.ReLU6()),
        IMAGE,
    ),
    "hardtanh from 0": (
        lambda: relu_pair(nn.Linear(6, 8), nn.Linear(8, 3), nn.Hardtanh(0, 2)),
        TOKENS,
    ),
}


def factors_of(channels: int) -> Tensor:
    return torch.logspace(-2, 2, channels, dtype=torch.float64)


def scaled(net: Net, x: Tensor, powers: bool = False) -> tuple[InstrumentedModel, Scaling]:
    """Scale the one chain of a network, in place."""
    model, (chain,) = chains_of(net, x)
    factors = factors_of(chain.channels)
    scaling = Scaling(chain, "equalization", factors.log2().round().exp2() if powers else factors)
    scale(model, scaling)
    return model, scaling


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_the_function_stays(name: str) -> None:
    make, shape = NETS[name]
    net, x = make(), 4 * torch.randn(shape)
    expected, before = net(x), net.a(x)
    model, scaling = scaled(net, x)
    assert largest_difference(net(x), expected) < _FP32
    axis = 1 if before.dim() > 3 or name == "conv1d" else -1
    inner = net.a(x) * scaling.factors.float().view(-1, *[1] * (x.dim() - 2) * (axis == 1))
    assert largest_difference(inner, before) < _FP32
    for ref in (model.ops[name].weights[0] for name in scaling.chain.consumers):
        assert torch.equal(model.weights.original(ref), net.get_parameter(ref.path))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "relu6", "flattened"])
def test_powers_of_two_change_no_bit(name: str, dtype: torch.dtype) -> None:
    make, shape = NETS[name]
    net, x = make().to(dtype), torch.randn(shape).to(dtype)
    expected = net(x)
    scaled(net, x, powers=True)
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_the_caps_of_a_double_model_are_exact() -> None:
    net, x = NETS["relu6"][0]().double(), 4 * torch.randn(IMAGE, dtype=torch.float64)
    expected = net(x)
    scaled(net, x)
    assert largest_difference(net(x), expected) < 1e-14


def test_caps_lie_where_the_weight_before_them_lies() -> None:
    assert cap(nn.ReLU6(), 4, -3, torch.empty(1, device="meta")).device.type == "meta"


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_capped_relu6_can_be_copied(how: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    x = 4 * torch.randn(IMAGE)
    model = InstrumentedModel(net)
    scale(model, Scaling(Chain("0", ("2",), 8, ("1",)), "equalization", factors_of(8)))
    expected = net(x)
    if how == "deepcopy":
        again = copy.deepcopy(net)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), expected)
    assert type(again[1]) is type(net[1])
    assert isinstance(again[1], nn.ReLU6)
    again[1].cap.zero_()
    assert torch.equal(net(x), expected)
    assert "caps" in repr(again)


@torch.no_grad()
def test_what_was_kept_comes_back_to_the_bit() -> None:
    net, x = NETS["relu6"][0](), 4 * torch.randn(IMAGE)
    expected, state = net(x), {name: t.clone() for name, t in net.state_dict().items()}
    model, (chain,) = chains_of(net, x)
    floats = FloatValues(model)
    for factors in (factors_of(8), factors_of(8).flip(0) / 3):
        floats.keep(chain)
        scale(model, Scaling(chain, "equalization", factors))
    within = FloatValues(model)
    within.keep(chain)
    middle = net(x)
    scale(model, Scaling(chain, "equalization", factors_of(8).sqrt()))
    within.give_back()
    assert torch.equal(net(x), middle)
    floats.give_back()
    assert torch.equal(net(x), expected)
    assert type(net.act) is nn.ReLU6
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def behind(net: Net, x: Tensor) -> Tensor:
    """Use the first layer's output where no graph sees it."""
    y = net.act(net.a(x))
    seen = torch.from_numpy(np.array(y.numpy())).sum(-1, keepdim=True)
    return net.d(net.act2(net.c(net.b(y)))) + seen  # type: ignore[no-any-return]


def secretive() -> Net:
    layers = {name: nn.Linear(6, 6) for name in "abcd"}
    return Net(behind, act=nn.ReLU6(), act2=nn.ReLU6(), **layers)


@torch.no_grad()
def test_a_chain_that_changes_the_function_is_taken_back_alone() -> None:
    net, x = secretive(), 4 * torch.randn(4, 6)
    own = {name: t.clone() for name, t in net.state_dict().items()}
    model, chains = chains_of(net, x)
    assert [chain.producer for chain in chains] == ["a", "b", "c"]
    check, floats = FunctionCheck(model, Feeder(net), x), FloatValues(model)
    scalings = [Scaling(chain, "equalization", factors_of(6) / 3) for chain in chains]
    for scaling in scalings:
        floats.keep(scaling.chain)
        scale(model, scaling)
    kept = check.kept(scalings, floats)
    assert [scaling.chain.producer for scaling in kept] == ["b", "c"]
    for name in ("a.weight", "a.bias"):
        assert torch.equal(net.get_parameter(name), own[name])
    assert type(net.act) is nn.ReLU6
    again = secretive()
    again.load_state_dict(own)
    other = InstrumentedModel(again)
    for scaling in kept:  # as a resumed study does it
        scale(other, scaling)
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in again.state_dict().items())


@torch.no_grad()
def test_a_model_that_draws_random_numbers_can_be_checked() -> None:
    net = relu_pair(nn.Linear(6, 8), nn.Linear(8, 3))
    plain = net.run
    net.run = lambda self, x: F.dropout(plain(self, x), 0.5, training=True)
    x = torch.randn(TOKENS)
    model, (chain,) = chains_of(net, x)
    state = torch.get_rng_state()
    check, floats = FunctionCheck(model, Feeder(net), x), FloatValues(model)
    scaling = Scaling(chain, "equalization", factors_of(8))
    floats.keep(chain)
    scale(model, scaling)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)  # what is drawn in between does not matter
    state = torch.get_rng_state()
    assert check.kept([scaling], floats) == (scaling,)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_nan_in_the_output_is_no_change() -> None:
    net = relu_pair(nn.Linear(6, 8), nn.Linear(8, 3))
    x = torch.randn(TOKENS)
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    model, (chain,) = chains_of(net, x)
    check, floats = FunctionCheck(model, Feeder(net), x), FloatValues(model)
    floats.keep(chain)
    scaling = Scaling(chain, "equalization", factors_of(8))
    scale(model, scaling)
    assert check.kept([scaling], floats) == (scaling,)


@pytest.mark.parametrize("repair", ["equalization", Repair(name="smoothquant", alpha=0.4)])
def test_a_scaling_survives_json(repair: str | Repair) -> None:
    chain = Chain("a", ("b", "c"), 3, ("act",))
    scaling = Scaling(chain, repair, factors_of(3) / 3, 7.5)
    again = Scaling.from_dict(scaling.to_dict())
    assert (again.chain, again.repair, again.gain) == (chain, repair, 7.5)
    assert torch.equal(again.factors, scaling.factors)


WRONG = {
    "a missing ReLU6": Net(lambda net, x: x, a=nn.Linear(6, 8)),
    "another activation": relu_pair(nn.Linear(6, 8), nn.Linear(8, 3)),
    "another producer": relu_pair(nn.GroupNorm(1, 8), nn.Linear(8, 3), nn.ReLU6()),
}


@pytest.mark.parametrize("name", WRONG)
def test_caps_for_another_architecture_are_refused(name: str) -> None:
    scaling = Scaling(Chain("a", ("b",), 8, ("act",)), "equalization", factors_of(8))
    with pytest.raises(PlanError, match="another architecture"):
        prepare_caps(WRONG[name], [scaling])
