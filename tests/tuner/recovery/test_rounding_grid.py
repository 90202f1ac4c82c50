"""The grid of a weight's matrix: what `fake_quantize` gives, and the values beside it."""

import pytest
import torch

from tests.tuner.recovery.problems import normal
from tests.tuner.recovery.weight_schemes import Case, cases, others
from tuner import formats
from tuner.granularity import PerChannel
from tuner.qparams import compute_qparams, fake_quantize
from tuner.ranges import QParams
from tuner.recovery.rounding_grid import MatrixGrid, matrix_grid
from tuner.recovery.rounding_matrix import as_matrix
from tuner.schemes import TensorScheme


def grid_of_case(case: Case, qparams: QParams) -> MatrixGrid:
    grid = matrix_grid(case.weight, case.scheme, qparams, len(case.second), case.axis)
    assert grid is not None
    return grid


@pytest.mark.parametrize("which", ["presets", "others"])
def test_columns_are_rounded_as_fake_quantize_does(which: str) -> None:
    for case in cases() if which == "presets" else others():
        qparams = compute_qparams(case.weight, case.scheme)
        grid = grid_of_case(case, qparams)
        x = case.weight * 1.3  # beyond the ends, too
        matrix = as_matrix(x, len(case.second), case.axis).mT.contiguous()
        expected = as_matrix(fake_quantize(x, case.scheme, qparams), len(case.second), case.axis)
        assert torch.equal(grid.rounded(matrix), expected.mT), case.scheme
        for index in range(matrix.shape[1]):
            column = grid.column(index).rounded(matrix[:, index])
            assert torch.equal(column, expected.mT[:, index]), case.scheme


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nf4", "abfp4"])
def test_ties_are_rounded_as_fake_quantize_does(name: str) -> None:
    """NVFP4 multiplies with a reciprocal, which a division differs from at ties alone."""
    scheme = TensorScheme(format=name)
    weight = normal(0, 32, 128)
    qparams = compute_qparams(weight, scheme)
    scale = torch.as_tensor(qparams.scale) * (qparams.global_scale or 1.0)
    halves = torch.arange(128).remainder(25) / 4 - 3
    x = halves * scale.repeat_interleave(128 // scale.shape[1], 1)
    grid = matrix_grid(x, scheme, qparams, 1, 0)
    assert grid is not None
    expected = fake_quantize(x, scheme, qparams)
    assert torch.equal(grid.rounded(as_matrix(x).mT.contiguous())[0].mT, expected)


TABLES = {
    "int3": (TensorScheme(format="int3"), [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
    "uint2, affine": (TensorScheme(format="uint2", symmetric=False), [-1.0, 0.0, 1.0, 2.0]),
    "e2m1": (
        TensorScheme(format="e2m1"),
        [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6],
    ),
    "mxint8, its end": (TensorScheme(format="mxint8"), [125.0, 126.0, 127.0]),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_values_beside(name: str, scale: float) -> None:
    scheme, table = TABLES[name]
    zero_point = 1 if not scheme.symmetric else None
    block = formats.get(scheme.format).block is not None
    scales = torch.full((1, 1), scale) if block else torch.tensor(scale)
    values = torch.tensor([table]) * scale
    grid = matrix_grid(values, scheme, QParams(scales, zero_point), 1, 0)
    assert grid is not None
    on_grid = values.unsqueeze(-1)
    above = grid.beside(on_grid, torch.ones_like(on_grid, dtype=torch.bool)).flatten()
    below = grid.beside(on_grid, torch.zeros_like(on_grid, dtype=torch.bool)).flatten()
    shifted = values.flatten()
    assert torch.equal(above[:-1], shifted[1:])
    assert torch.equal(below[1:], shifted[:-1])
    assert above[-1] == shifted[-1]
    if len(table) > 3:
        assert below[0] == shifted[0]


def test_nothing_is_beside_a_number_of_32_bits() -> None:
    x = normal(0, 2, 3)
    grid = matrix_grid(x, TensorScheme(format="fp32"), QParams(1.0), 1, 0)
    assert grid is not None
    columns = x.mT.unsqueeze(0)
    assert torch.equal(grid.beside(columns, columns > 0), columns)


def test_a_function_has_no_grid() -> None:
    name = "halves_for_the_grid_test"
    formats.register(name, forward=lambda x: (2 * x).round() / 2)
    scheme = TensorScheme(format=name, granularity=PerChannel(0))
    assert matrix_grid(normal(0, 2, 3), scheme, QParams(1.0), 1, 0) is None
