"""GPTQ against the paper's updates one by one, brute force, and its own grid."""

import logging
import math

import pytest
import torch
from torch import Tensor

from tests.tuner.recovery import references
from tests.tuner.recovery.problems import correlated, normal
from tests.tuner.recovery.weight_schemes import Case, cases, in_dtype, others
from tuner import formats
from tuner.errors import SchemeError
from tuner.granularity import PerChannel
from tuner.qparams import compute_qparams, fake_quantize
from tuner.recovery.gptq import gptq
from tuner.recovery.rounding_matrix import as_matrix, output_errors
from tuner.schemes import TensorScheme

GAIN = 0.75  # of the error that rounding to nearest makes, in the mean over small problems
SAME_ERROR = 1e-5  # relative: sums in fp32 and in fp64
INT2 = TensorScheme(format="int2", granularity=PerChannel(0))
INT4 = TensorScheme(format="int4", granularity=PerChannel(0))


def grids(weight: Tensor, scheme: TensorScheme) -> list[list[float]]:
    """Return the values that each row of a weight may take, in growing order."""
    scale = compute_qparams(weight, scheme).scale
    assert isinstance(scale, Tensor)
    low, high = scheme.quant_range
    return [[code * float(s) for code in range(low, high + 1)] for s in scale]


def total_error(rounded: Tensor, case: Case) -> float:
    matrices = (as_matrix(w.float(), len(case.second), case.axis) for w in (rounded, case.weight))
    first, exact = matrices
    return float(output_errors(first - exact, case.second).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("seed", range(3))
def test_as_the_updates_of_the_paper_one_by_one(act_order: bool, block: int, seed: int) -> None:
    weight, second = normal(seed, 4, 10).double(), correlated(seed, 1, 10).double()
    ours, _ = gptq(weight, second, INT4, act_order=act_order, damping=0.02, block=block)
    diagonal = second[0].diagonal()
    hessian = second[0] + 0.02 * diagonal.mean() * torch.eye(10)
    order = diagonal.argsort(descending=True).tolist() if act_order else list(range(10))
    plain = fake_quantize(weight, INT4)
    compared = 0
    for row, grid in enumerate(grids(weight, INT4)):
        theirs = references.obq(weight[row], hessian, order, grid)
        errors = [
            references.error(r[None], weight[row : row + 1], second[0])
            for r in (plain[row], theirs)
        ]
        if errors[1] < errors[0]:
            torch.testing.assert_close(ours[row], theirs)
            compared += 1
        else:
            assert torch.equal(ours[row], plain[row])
    assert compared >= 2


def test_between_the_best_choice_and_rounding_to_nearest() -> None:
    ratios = []
    for seed in range(20):
        weight, second = normal(seed, 2, 6), correlated(seed, 1, 6)
        rounded, _ = gptq(weight, second, INT2)
        mine, plain = (
            references.error(w, weight, second[0]) for w in (rounded, fake_quantize(weight, INT2))
        )
        options = [[grid] * 6 for grid in grids(weight, INT2)]
        best = sum(references.best_choice(weight[row], second[0], options[row]) for row in range(2))
        assert best * (1 - SAME_ERROR) <= mine <= plain * (1 + SAME_ERROR)
        ratios.append(mine / plain)
    assert sum(ratios) / len(ratios) < GAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["presets", "others"])
def test_the_result_lies_on_the_grid_and_is_never_worse(which: str, dtype: torch.dtype) -> None:
    better = 0
    for case in cases() if which == "presets" else others():
        case = in_dtype(case, dtype)
        rounded, qparams = gptq(case.weight, case.second, case.scheme, axis=case.axis)
        assert rounded.dtype == dtype
        assert rounded.shape == case.weight.shape
        assert torch.equal(fake_quantize(rounded, case.scheme, qparams), rounded), case.scheme
        plain = fake_quantize(case.weight, case.scheme, compute_qparams(case.weight, case.scheme))
        mine, theirs = total_error(rounded, case), total_error(plain, case)
        assert mine <= theirs * (1 + SAME_ERROR), case.scheme
        better += mine < GAIN * theirs
    assert better > 5


def test_all_kinds_of_schemes_are_among_the_cases() -> None:
    schemes = [case.scheme for case in (*cases(), *others())]
    assert {formats.get(s.format).kind for s in schemes} == {"int", "float", "codebook"}
    assert {type(s.reach).__name__ for s in schemes} == {
        "PerTensor",
        "PerChannel",
        "PerGroup",
        "PerBlock",
        "PerToken",
    }
    assert {case.axis for case in cases()} == {0, 1}
    assert {len(case.second) for case in cases()} == {1, 2, 8}


def test_groups_are_rounded_each_with_its_own_moments() -> None:
    weight, second = normal(0, 6, 3, 2), correlated(0, 2, 6)
    whole, _ = gptq(weight, second, INT4)
    for group, rows in enumerate((slice(0, 3), slice(3, 6))):
        alone, _ = gptq(weight[rows], second[group : group + 1], INT4)
        assert torch.equal(whole[rows], alone)


def test_a_group_without_inputs_leaves_the_others_alone() -> None:
    weight, second = normal(0, 6, 3, 2), correlated(0, 2, 6)
    second[0] = 0
    rounded, _ = gptq(weight, second, INT4)
    assert torch.equal(rounded[:3], fake_quantize(weight, INT4)[:3])
    alone, _ = gptq(weight[3:], second[1:], INT4)
    assert torch.equal(rounded[3:], alone)
    assert not torch.equal(alone, fake_quantize(weight, INT4)[3:])


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, second = normal(0, 4, 8), correlated(0, 1, 8)
    second[0, 3, :] = second[0, :, 3] = 0
    rounded, _ = gptq(weight, second, INT4)
    plain = fake_quantize(weight, INT4)
    assert torch.equal(rounded[:, 3], plain[:, 3])
    keep = [i for i in range(8) if i != 3]
    assert not torch.equal(rounded[:, keep], plain[:, keep])
    without, _ = gptq(
        weight[:, keep], second[:, keep][:, :, keep], INT4, qparams=compute_qparams(weight, INT4)
    )
    assert torch.equal(rounded[:, keep], without)


def test_one_column_is_rounded_to_nearest() -> None:
    weight = normal(0, 5, 1)
    assert torch.equal(gptq(weight, torch.ones(1, 1, 1), INT4)[0], fake_quantize(weight, INT4))


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_fewer_rows_than_inputs_are_enough(damping: float) -> None:
    """Without damping the moments are singular, which rounding errors may hide."""
    weight, second = normal(0, 4, 12), correlated(0, 1, 12, rows=3)
    rounded, _ = gptq(weight, second, INT4, damping=damping)
    plain = fake_quantize(weight, INT4)
    mine, theirs = (references.error(w, weight, second[0]) for w in (rounded, plain))
    assert mine <= theirs * (1 + SAME_ERROR)


@pytest.mark.parametrize("bad", ["zero", "NaN", "not positive", "a NaN in the weight"])
def test_what_is_of_no_use_is_rounded_to_nearest(
    bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight, second = normal(0, 4, 6), correlated(0, 1, 6)
    if bad == "zero":
        second.zero_()
    elif bad == "NaN":
        second[0, 1, 2] = math.nan
    elif bad == "not positive":
        second.diagonal(dim1=1, dim2=2).fill_(1e-3)
    else:
        weight[0, 0] = math.nan
    with caplog.at_level(logging.DEBUG, logger="tuner.recovery"):
        rounded, _ = gptq(weight, second, INT4)
    torch.testing.assert_close(rounded, fake_quantize(weight, INT4), rtol=0, atol=0, equal_nan=True)
    assert "rounded to nearest" in caplog.text


@pytest.mark.parametrize("shape", [(6, 6), (1, 5, 5), (2, 6, 6), (0, 6, 6)])
def test_moments_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemeError, match=r"second moments of shape|groups do not divide"):
        gptq(normal(0, 5, 6), torch.zeros(shape), INT4)
