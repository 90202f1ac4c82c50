"""Moments of an op's input, against sums in fp64 and against F.unfold."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import Recurrent, seeded
from tests.tuner.recovery.problems import SeenCall, normal, watched
from tuner.ops import WeightRef
from tuner.recovery.moments import MAX_WIDTH, InputMoments, moments_for

FP32_SUMS = 1e-5  # of up to 1000 products of order 1
LINEAR = WeightRef("weight", 0)


def calls_of(model: nn.Module, *inputs: Tensor) -> list[SeenCall]:
    _, calls = watched(model, *inputs)
    (found,) = calls.values()
    return found


def filled(moments: InputMoments, calls: list[SeenCall]) -> InputMoments:
    for seen in calls:
        moments.update(seen.call, seen.operands[0])
    return moments


def assert_moments(moments: InputMoments, rows: Tensor) -> None:
    """Compare with the moments of rows `[groups, rows, n]`, computed in fp64."""
    rows = rows.double()
    assert moments.count == rows.shape[1]
    expected = {
        "mean": rows.mean(1),
        "mean_abs": rows.abs().mean(1),
        "second": rows.mT @ rows / rows.shape[1],
    }
    for name, value in expected.items():
        ours = getattr(moments, name)
        torch.testing.assert_close(ours.double(), value, rtol=FP32_SUMS, atol=FP32_SUMS, msg=name)


def test_of_a_linear_layer_over_several_batches() -> None:
    batches = [normal(i, 4, 3, 6) + 0.5 for i in range(3)]
    calls = calls_of(nn.Linear(6, 5), *batches)
    assert_moments(filled(InputMoments(LINEAR), calls), torch.cat(batches).reshape(1, -1, 6))


def test_of_a_grouped_convolution_as_unfold_has_them() -> None:
    batches = [normal(i, 2, 4, 6, 5) for i in range(2)]
    calls = calls_of(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), *batches)
    x = torch.cat(batches)
    patches = [F.unfold(half, 3, stride=2, padding=1).mT.flatten(0, 1) for half in x.chunk(2, 1)]
    assert_moments(filled(InputMoments(LINEAR), calls), torch.stack(patches))


def test_half_precision_is_summed_in_fp32() -> None:
    x = (normal(0, 200, 3) + 8).to(torch.bfloat16)
    calls = calls_of(nn.Linear(3, 2).to(torch.bfloat16), x)
    assert_moments(filled(InputMoments(LINEAR), calls), x.reshape(1, -1, 3))


def test_the_rows_of_a_right_factor_are_its_columns() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(0, 5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight @ x

    x = normal(1, 6, 7)
    ops, calls = watched(Left(), x)
    ((name, op),) = ops.items()
    (seen,) = calls[name]
    moments = moments_for(seen.call, op.weights[0], x)
    assert moments is not None
    assert moments.operand == 1
    moments.update(seen.call, seen.operands[moments.operand])
    assert_moments(moments, x.mT.unsqueeze(0))


def test_no_more_rows_than_allowed_and_an_even_share_of_each_call() -> None:
    batches = [torch.full((100, 2), float(i)) for i in range(6)]
    moments = InputMoments(LINEAR, max_rows=80, expected_calls=4)
    filled(moments, calls_of(nn.Linear(2, 2), *batches))
    assert moments.count == 80
    assert moments.mean is not None
    assert moments.mean[0, 0] == (0 + 1 + 2 + 3) / 4


def test_what_small_calls_leave_goes_to_those_that_follow() -> None:
    batches = [torch.zeros(2, 3), torch.ones(100, 3)]
    moments = InputMoments(LINEAR, max_rows=50, expected_calls=2)
    filled(moments, calls_of(nn.Linear(3, 2), *batches))
    assert moments.count == 50
    assert moments.mean is not None
    assert float(moments.mean[0, 0]) == 48 / 50


def test_the_same_data_give_the_same_moments() -> None:
    calls = calls_of(nn.Conv2d(2, 3, 3), normal(0, 4, 2, 9, 9), normal(1, 4, 2, 9, 9))
    one, two = (filled(InputMoments(LINEAR, max_rows=50), calls) for _ in range(2))
    assert one.second is not None
    assert two.second is not None
    assert torch.equal(one.second, two.second)


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x = normal(0, 10, 3)
    x[2, 1], x[7, 0] = math.nan, math.inf
    moments = filled(InputMoments(LINEAR), calls_of(nn.Linear(3, 2), x))
    assert moments.nonfinite_rows == 2
    keep = [i for i in range(10) if i not in (2, 7)]
    assert_moments(moments, x[keep].unsqueeze(0))


def test_nothing_seen_has_no_moments() -> None:
    moments = InputMoments(LINEAR)
    filled(moments, calls_of(nn.Linear(3, 2), torch.zeros(0, 3)))
    assert (moments.count, moments.mean, moments.mean_abs, moments.second) == (0, None, None, None)


@pytest.mark.parametrize(("width", "fits"), [(MAX_WIDTH, True), (MAX_WIDTH + 1, False)])
def test_what_is_too_wide_is_refused(width: int, fits: bool) -> None:
    x = torch.zeros(1, width)
    (seen,) = calls_of(nn.Linear(width, 1), x)
    assert (moments_for(seen.call, LINEAR, x) is not None) == fits


def test_a_recurrent_layer_has_no_moments() -> None:
    ops, calls = watched(seeded(Recurrent), torch.arange(6).reshape(2, 3))
    seen = calls["lstm"][0]
    assert moments_for(seen.call, ops["lstm"].weights[0], seen.operands[0]) is None
