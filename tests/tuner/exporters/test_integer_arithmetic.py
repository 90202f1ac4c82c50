"""Fixed point, accumulators and convolutions of the integer runner, against exact arithmetic."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tuner.exporters.integer_convolutions import Window, convolved, transposed
from tuner.exporters.integer_products import Accumulators, product
from tuner.exporters.integer_values import Grid, Integers, fixed_point, rescaled

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("factor", [1e-12, 3.1e-8, 0.00049, 0.4999999999, 0.5, 0.75, 1.0, 37.3])
def test_a_factor_is_a_multiplier_and_a_shift(factor: float) -> None:
    multiplier, shift = fixed_point(np.asarray(factor))
    held = Fraction(int(multiplier)) * Fraction(2) ** -(31 + int(shift))
    if factor < 2.0**-32:  # nothing in int32 times this reaches one half
        assert multiplier == 0
        return
    assert abs(held - Fraction(factor)) <= Fraction(factor) / 2**31
    assert 2**30 <= multiplier < 2**31


def test_a_mantissa_that_rounds_up_to_one_is_halved() -> None:
    multiplier, shift = fixed_point(np.asarray(1 - 2.0**-40))
    assert (int(multiplier), int(shift)) == (2**30, -1)


def test_rescaling_is_within_two_roundings_of_the_exact_product() -> None:
    sums = RANDOM.integers(-(2**31), 2**31, 2000)
    for factor in (0.7, 0.0123, 3.3e-5, 1.9e-9):
        multiplier, shift = fixed_point(np.asarray(factor))
        found = rescaled(sums, multiplier, shift, twice=True)
        scale = Fraction(int(multiplier)) * Fraction(2) ** -(31 + int(shift))
        reach = Fraction(1, 2) + Fraction(1, 2 ** (1 + int(shift)))
        assert max(abs(int(f) - int(s) * scale) for f, s in zip(found, sums, strict=True)) <= reach


def test_one_rounding_is_to_the_nearest() -> None:
    sums = RANDOM.integers(-(2**31), 2**31, 2000)
    multiplier, shift = fixed_point(np.asarray(0.0123))
    scale = Fraction(int(multiplier)) * Fraction(2) ** -(31 + int(shift))
    found = rescaled(sums, multiplier, shift)
    assert found.tolist() == [round(int(s) * scale) for s in sums]
    assert (found != rescaled(sums, multiplier, shift, twice=True)).any()


@pytest.mark.parametrize(
    ("total", "shift", "expected"),
    [(1, 0, 1), (-1, 0, 0), (3, 0, 2), (-3, 0, -1), (2, 1, 1), (-2, 1, -1), (6, 1, 2), (-6, 1, -2)],
)
def test_ties_go_as_in_gemmlowp(total: int, shift: int, expected: int) -> None:
    # times one half: the doubled high half rounds ties up, the shift away from zero
    found = rescaled(np.asarray([total]), np.asarray(2**30), np.asarray(shift), twice=True)
    assert found.tolist() == [expected]


def test_what_leaves_int32_before_the_product_is_saturated() -> None:
    multiplier, shift = fixed_point(np.asarray(1024.0))
    found = rescaled(np.asarray([2**30, -(2**30), 5]), multiplier, shift)
    assert found.tolist() == [2**30, -(2**30), 5120]


def test_products_are_exact_beyond_what_floats_hold() -> None:
    left = RANDOM.integers(-(2**30), 2**30, (3, 5))
    right = RANDOM.integers(-(2**27), 2**27, (5, 4))
    expected = [
        [sum(int(a) * int(b) for a, b in zip(r, c, strict=True)) for c in right.T] for r in left
    ]
    assert product(left, right).tolist() == expected


def operands(k: int = 40) -> tuple[np.ndarray, np.ndarray]:
    return RANDOM.integers(0, 256, (6, k)), RANDOM.integers(-128, 128, (k, 5))


def clamp(value: int, bits: int) -> int:
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, value))


def test_saturation_holds_after_every_sum() -> None:
    codes, levels = operands()
    accumulators = Accumulators(16, "saturate")
    found = accumulators.sums("n", codes, np.asarray(7), levels)
    for row, column in itertools.product(range(6), range(5)):
        total = 0
        for k in range(40):
            total = clamp(total + (int(codes[row, k]) - 7) * int(levels[k, column]), 16)
        assert found[row, column] == total
    exact = (codes - 7) @ levels
    assert accumulators.overflowed.get("n", 0) == (found != exact).sum() > 0


def test_wrapping_is_modular() -> None:
    codes, levels = operands()
    accumulators = Accumulators(16, "wrap")
    found = accumulators.sums("n", codes, np.asarray(0), levels)
    exact = torch.from_numpy(codes) @ torch.from_numpy(levels)
    assert torch.equal(torch.from_numpy(found), exact.to(torch.int16).long())
    assert accumulators.overflowed["n"] > 0


def test_pairs_saturate_as_vpmaddubsw_does() -> None:
    codes, levels = operands(41)  # the odd one is a pair with nothing
    found = Accumulators(16, "saturate", pairs=True).sums("n", codes, np.asarray(3), levels)
    for row, column in itertools.product(range(6), range(5)):
        products = [int(c) * int(w) for c, w in zip(codes[row], levels[:, column], strict=True)]
        total = sum(clamp(sum(products[k : k + 2]), 16) for k in range(0, 41, 2))
        assert found[row, column] == total - 3 * levels[:, column].sum()


def test_seven_bits_keep_pairs_within_sixteen() -> None:
    codes = np.full((1, 8), 255)
    full, reduced = Accumulators(16, pairs=True), Accumulators(16, pairs=True)
    full.sums("n", codes, np.asarray(0), np.full((8, 1), 127))
    found = reduced.sums("n", codes, np.asarray(0), np.full((8, 1), 63))
    assert full.overflowed == {"n": 4}
    assert reduced.overflowed == {}
    assert found.tolist() == [[8 * 255 * 63]]


CONVOLUTIONS = [
    # dimensions, channels in, channels out, kernel, stride, padding, dilation, groups
    (1, 4, 6, 3, 2, 1, 1, 1),
    (2, 4, 6, 3, 1, 1, 1, 1),
    (2, 4, 6, 3, 2, 2, 2, 2),
    (2, 6, 6, 5, 2, 2, 1, 6),
    (2, 6, 12, 3, 1, 0, 1, 6),
    (2, 3, 8, 1, 2, 0, 1, 1),
    (3, 2, 4, 3, 1, 1, 1, 2),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_of_integers_are_those_of_torch(case: tuple[int, ...]) -> None:
    axes, channels, out, kernel, stride, padding, dilation, groups = case
    x = RANDOM.integers(0, 256, (2, channels, *[9] * axes))
    weight = RANDOM.integers(-128, 128, (out, channels // groups, *[kernel] * axes))
    zero = np.asarray(93)
    edges = ((padding, padding),) * axes
    window = Window((stride,) * axes, edges, (dilation,) * axes, groups)
    held = Accumulators()
    found = convolved(x, weight, window, zero, lambda a, b: held.sums("n", a, zero, b))
    inputs = torch.from_numpy(x - 93).double(), torch.from_numpy(weight).double()
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    expected = conv(*inputs, None, stride, padding, dilation, groups)
    assert torch.equal(torch.from_numpy(found).double(), expected)


@pytest.mark.parametrize(
    ("axes", "stride", "padding", "extra", "dilation", "groups"),
    [(1, 2, 1, 1, 1, 1), (2, 2, 1, 0, 1, 2), (2, 3, 0, 2, 2, 1), (2, 1, 4, 0, 1, 4)],
)
def test_transposed_convolutions_are_those_of_torch(
    axes: int, stride: int, padding: int, extra: int, dilation: int, groups: int
) -> None:
    x = RANDOM.integers(0, 256, (2, 4, *[9] * axes))
    weight = RANDOM.integers(-128, 128, (4, 3, *[3] * axes))
    zero = np.asarray(17)
    window = Window((stride,) * axes, ((padding, padding),) * axes, (dilation,) * axes, groups)
    held = Accumulators()
    found = transposed(
        x, weight, window, (extra,) * axes, zero, lambda a, b: held.sums("n", a, zero, b)
    )
    inputs = torch.from_numpy(x - 17).double(), torch.from_numpy(weight).double()
    conv = (F.conv_transpose1d, F.conv_transpose2d)[axes - 1]
    expected = conv(*inputs, None, stride, padding, extra, groups, dilation)
    assert torch.equal(torch.from_numpy(found).double(), expected)


def test_codes_are_clamped_and_rounded_to_even() -> None:
    grid = Grid(0, 255, np.asarray(0.5), np.asarray(10))
    x = np.asarray([0.25, 0.75, -0.25, -100.0, 1e30, np.inf, np.nan], dtype=np.float32)
    assert grid.quantize(x).codes.tolist() == [10, 12, 10, 0, 255, 255, 10]


def test_integers_that_fp32_cannot_hold_are_rounded_once() -> None:
    codes = np.asarray([2**24 + 1, 3])
    found = Integers(codes, np.asarray(2.0**-3), np.asarray(0)).floats()
    assert found.tolist() == [np.float32((2**24 + 1) / 8), 0.375]
