"""The straight-through gradient under transforms of torch.func, and of tensors changed in place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tuner import quantization
from tuner.config import Rule
from tuner.errors import UnsupportedError
from tuner.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from tuner.qparams import QParams, compute_qparams, fake_quantize
from tuner.schemes import OpConfig, TensorScheme

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(16), PerToken()]
FORMATS = ["int8", "uint4", "e4m3fn", "bf16", "nf4", "mxfp4", "mxint8", "nvfp4", "abfp8"]
INT8 = TensorScheme(format="int8")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda each: f"{each.kind}")
@pytest.mark.parametrize("is_static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_each_sample(name: str, is_static: bool, granularity: Granularity) -> None:
    """Plain autograd of all samples, which do not meet, is the reference."""
    scheme = TensorScheme(format=name, granularity=granularity, symmetric=name != "uint4")
    x = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0)) * 2
    x[0] /= 2  # of which the static ranges are: others lie outside
    qparams = compute_qparams(x[0], scheme) if is_static else None
    factors = torch.arange(1.0, 385.0).view(6, 64)

    def loss(row: Tensor) -> Tensor:
        return (fake_quantize(row, scheme, qparams) * factors).sum()

    leaf = x.clone().requires_grad_()
    torch.stack([loss(row) for row in leaf]).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(torch.vmap(torch.func.grad(loss))(x), leaf.grad)
    alone = [torch.func.grad_and_value(loss)(row) for row in x]
    assert torch.equal(torch.stack([gradient for gradient, _ in alone]), leaf.grad)
    assert [float(value) for _, value in alone] == [float(loss(row)) for row in x]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_clamped_values_have_no_gradient() -> None:
    gradient = torch.vmap(torch.func.grad(lambda x: fake_quantize(x, INT8, QParams(0.01)).sum()))
    assert gradient(torch.tensor([[0.5, 3.0], [-3.0, -0.5]])).tolist() == [[1, 0], [0, 1]]


def added(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def multiplied(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(y)


def add_then_double(x: Tensor, y: Tensor) -> Tensor:
    total = x + y
    x.mul_(2)
    return total + x


def cat_then_double(x: Tensor, y: Tensor) -> Tensor:
    together = torch.cat([x, y])
    x.mul_(2)
    return together.sum() + x


class Net(nn.Module):
    def __init__(self, op: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.linear(x), x).square()


def simulated(op: Callable[[Tensor, Tensor], Tensor], op_type: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = Net(op), torch.randn(4, 8)
    x[0, 0] = 8.0
    rule = Rule(op_types=[op_type], options=[OpConfig(inputs=INT8)])
    nothing = Rule(op_types=["Linear"], options=[OpConfig.float()])
    data = [x.clamp(-2, 2)]  # of x itself, one value is clamped
    return quantization.simulate(net, INT8, calib_dataloader=data, rules=[nothing, rule]), x


@pytest.mark.parametrize(
    ("op", "op_type", "plain"), [(added, "add", torch.add), (multiplied, "mul", torch.mul)]
)
def test_ops_in_place_train_as_out_of_place(
    op: Callable[[Tensor, Tensor], Tensor],
    op_type: str,
    plain: Callable[[Tensor, Tensor], Tensor],
) -> None:
    gradients = []
    for each in (op, plain):
        net, x = simulated(each, op_type)
        leaf = x.requires_grad_()
        net(leaf).sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in net.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        assert ours is not None
        assert expected is not None
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("op", "op_type"), [(add_then_double, "add"), (cat_then_double, "cat")])
def test_an_operand_changed_afterwards_is_refused(
    op: Callable[[Tensor, Tensor], Tensor], op_type: str
) -> None:
    net, x = simulated(op, op_type)
    loss = net(x).sum()
    with pytest.raises(UnsupportedError, match=r"changed in place before the backward pass.*copy"):
        loss.backward()
    with torch.no_grad():
        assert bool(net(x).isfinite().all())


def test_a_graph_that_is_gone_is_torchs_error() -> None:
    x = torch.randn(3, requires_grad=True)
    loss = fake_quantize(x, INT8, QParams(0.1)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
