"""Rows of an op's input, times its weight as a matrix, are the op's output."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import Attention, Functional, Recurrent, seeded
from tests.tuner.recovery.problems import normal, watched
from tuner.recovery.rounding_matrix import as_matrix, as_weight
from tuner.recovery.rounding_rows import rows_of, spread, supports

FP32_SUMS = 1e-5  # of up to 100 products of order 1
UNEVEN = 0.25  # relative: how far the share of one column or part may be off

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear, one row": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, bias=False), (2, 3, 9)),
    "unbatched": (lambda: nn.Conv1d(3, 4, 3, bias=False), (3, 9)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), padding=1, bias=False), (2, 3, 8, 9)),
    "dilation": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=(2, 3), bias=False), (2, 3, 8, 9)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=(0, 2), bias=False), (2, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", bias=False), (2, 2, 7, 6)),
    "valid": (lambda: nn.Conv2d(2, 3, (4, 3), padding="valid", bias=False), (2, 2, 7, 6)),
    "reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect", bias=False),
        (2, 2, 7, 6),
    ),
    "circular": (
        lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular", bias=False),
        (2, 2, 7),
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2, bias=False),
        (2, 2, 4, 5, 6),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (2, 4, 5, 6)),
    "transposed, all options": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), (2, 3), (1, 2), (1, 1), groups=2, dilation=(2, 3), bias=False
        ),
        (2, 4, 5, 6),
    ),
    "transposed 1d, cropped": (lambda: nn.ConvTranspose1d(2, 3, 2, 2, 3, bias=False), (2, 2, 9)),
}


class Calls(nn.Module):
    """A functional call of a parameter."""

    def __init__(self, weight: Tensor, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]]
FUNCTIONS = {
    "linear": ((5, 6), F.linear, (2, 3, 6)),
    "x @ w": ((6, 5), torch.matmul, (2, 3, 6)),
    "w @ x": ((5, 6), lambda x, w: w @ x, (2, 6, 3)),
    "w @ vector": ((5, 6), lambda x, w: w @ x, (6,)),
    "x @ w.t()": ((5, 6), lambda x, w: x @ w.t(), (3, 6)),
    "addmm": ((6, 5), lambda x, w: torch.addmm(torch.zeros(5), x, w), (3, 6)),
    "conv2d": (
        (4, 2, 3, 2),
        lambda x, w: F.conv2d(x, w, None, (1, 2), padding=(2, 0), dilation=2, groups=2),
        (2, 4, 8, 7),
    ),
    "conv2d, same": ((4, 2, 3, 2), lambda x, w: F.conv2d(x, w, padding="same"), (2, 2, 5, 7)),
    "conv_transpose1d": (
        (4, 3, 3),
        lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1, 2, 3),
        (2, 4, 8),
    ),
}


def assert_rows_give_the_output(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = normal(1, *shape)
    ops, calls = watched(model, x)
    ((name, op),) = ops.items()
    (seen,) = calls[name]
    weight = op.weights[0]
    read = rows_of(seen.call, weight)
    assert read is not None
    rows = read(seen.operands[1 if weight.operand == 0 else 0], 10**6)
    matrix = as_matrix(model.get_parameter(weight.path).detach(), rows.shape[0], weight.axis)
    ours = (rows @ matrix.mT).movedim(1, 0).flatten(1)  # [rows, out]
    theirs = seen.output
    if op.type.startswith("Conv"):
        theirs = theirs if theirs.dim() == int(op.type[-2]) + 2 else theirs.unsqueeze(0)
        theirs = theirs.movedim(1, -1)
    elif weight.operand == 0 and theirs.dim() > 1:
        theirs = theirs.mT
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=FP32_SUMS, atol=FP32_SUMS)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODULES)
def test_rows_of_a_module_give_its_output(name: str) -> None:
    build, shape = MODULES[name]
    torch.manual_seed(0)
    assert_rows_give_the_output(build(), shape)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_of_a_function_give_its_output(name: str) -> None:
    shape, call, inputs = FUNCTIONS[name]
    assert_rows_give_the_output(Calls(normal(0, *shape), call), inputs)


def test_patches_are_those_of_unfold() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2)
    x = normal(1, 2, 3, 9, 8)
    ops, calls = watched(conv, x)
    read = rows_of(calls[""][0].call, ops[""].weights[0])
    assert read is not None
    theirs = F.unfold(x, 3, dilation=2, padding=1, stride=2).mT.flatten(0, 1)
    assert torch.equal(read(x, 10**6)[0], theirs)


@pytest.mark.parametrize("net", [Recurrent, Attention, Functional])
def test_what_has_no_rows_is_left_out(net: type[nn.Module]) -> None:
    x = torch.arange(6).reshape(2, 3) if net is Recurrent else normal(0, 2, 5, 16)
    ops, calls = watched(seeded(net), x)
    for name, op in ops.items():
        if not op.weights:
            continue
        has_rows = rows_of(calls[name][0].call, op.weights[0]) is not None
        assert has_rows == (op.type in ("Linear", "matmul"))
        assert supports(calls[name][0].call.family) == has_rows


def test_a_stack_of_weights_is_left_out() -> None:
    model = Calls(normal(0, 3, 6, 5), torch.bmm)
    ops, calls = watched(model, normal(1, 3, 2, 6))
    ((name, op),) = ops.items()
    assert op.weights
    assert rows_of(calls[name][0].call, op.weights[0]) is None


@pytest.mark.parametrize(("total", "limit"), [(7, 3), (64, 63), (65_536, 2048), (16_000, 9000)])
def test_taken_rows_differ_and_are_spread(total: int, limit: int) -> None:
    index = spread(total, limit)
    assert isinstance(index, Tensor)
    assert len(set(index.tolist())) == limit
    for period in (2, 4, 32):  # a plain step hits one column of an image again and again
        shares = torch.bincount(index % period, minlength=period) / limit
        if limit >= 8 * period:
            assert float((shares * period - 1).abs().max()) < UNEVEN
    if limit > 100:  # no part of the batch is left out
        shares = torch.bincount(index * 8 // total, minlength=8) / limit
        assert float((shares * 8 - 1).abs().max()) < UNEVEN


def test_all_rows_where_the_limit_allows() -> None:
    assert spread(5, 5) == slice(None)


@pytest.mark.parametrize(
    ("shape", "groups", "axis"),
    [((6, 4), 1, 0), ((6, 4), 1, 1), ((6, 4), 1, -1), ((6, 2, 3, 3), 3, 0), ((6, 2, 3), 3, 1)],
)
def test_a_matrix_becomes_the_weight_again(shape: tuple[int, ...], groups: int, axis: int) -> None:
    weight = normal(0, *shape)
    matrix = as_matrix(weight, groups, axis)
    assert matrix.shape[0] == groups
    assert torch.equal(as_weight(matrix, shape, axis), weight)
