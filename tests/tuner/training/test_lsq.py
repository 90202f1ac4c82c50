"""Learned step sizes: every gradient against the papers' equations."""

import math

import pytest
import torch
from torch import Tensor

from tests.tuner.training.references import lsq, lsq_plus
from tuner.errors import DataError
from tuner.granularity import PerChannel, PerGroup
from tuner.qparams import QParams, fake_quantize
from tuner.recovery.lsq import (
    LearnedStep,
    can_learn,
    initial_qparams,
    learned_fake_quantize,
    learned_qparams,
    positive_levels,
    positive_scale,
)
from tuner.schemes import TensorScheme

FP32 = {"rtol": 1e-5, "atol": 1e-6}
NUMERIC = {"rtol": 1e-6, "atol": 1e-9}
BF16 = {"rtol": 2e-2, "atol": 1e-2}

SYMMETRIC = {
    "int8": (-128, 127),
    "int4": (-8, 7),
    "int3": (-4, 3),
    "int2": (-2, 1),
}


def values(*shape: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return a tensor with values on both sides of the range, and a gradient for it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator) * spread
    return x, torch.randn(*shape, generator=generator)


def gradients(
    x: Tensor, scale: Tensor, upstream: Tensor, step: LearnedStep, offset: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, scale and, where there is one, the offset."""
    leaves = [t.clone().requires_grad_() for t in (x, scale, offset) if t is not None]
    y = learned_fake_quantize(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, step)
    return (y.detach(), *torch.autograd.grad(y, leaves, upstream))


class TestScale:
    @pytest.mark.parametrize("name", SYMMETRIC)
    @pytest.mark.parametrize("scale", [0.25, 0.07, 3.0])
    def test_gradients_are_those_of_the_paper(self, name: str, scale: float) -> None:
        x, upstream = values(40, 30)
        step = LearnedStep(TensorScheme(format=name), 900.0)
        y, of_x, of_scale = gradients(x, torch.tensor(scale), upstream, step)
        expected = lsq(
            x, float(torch.tensor(scale)), SYMMETRIC[name], upstream, 900.0, SYMMETRIC[name][1]
        )
        torch.testing.assert_close(y.double(), expected[0], **FP32)
        torch.testing.assert_close(of_x.double(), expected[1], **FP32)
        assert float(of_scale) == pytest.approx(expected[2], rel=1e-4)

    @pytest.mark.parametrize("value", [5.0, -5.0])
    def test_outside_the_range_it_is_the_numerical_derivative(self, value: float) -> None:
        x = torch.tensor([value], dtype=torch.float64)
        step = LearnedStep(TensorScheme(format="int4"), 1.0)
        scale = torch.tensor(0.3, dtype=torch.float64)
        _, _, of_scale = gradients(x, scale, torch.ones(1, dtype=torch.float64), step)
        h = 1e-6
        ends = [learned_fake_quantize(x, scale + d, None, step) for d in (h, -h)]
        numeric = (ends[0] - ends[1]) / (2 * h) * step.gradient_scale
        torch.testing.assert_close(of_scale.reshape(1), numeric, **NUMERIC)

    def test_a_fixed_zero_point_shifts_the_ends(self) -> None:
        scheme = TensorScheme(format="uint4", symmetric=False)
        x, upstream = values(500)
        step = LearnedStep(scheme, 500.0, torch.tensor(3, dtype=torch.int32))
        y, of_x, of_scale = gradients(x, torch.tensor(0.2), upstream, step)
        scale = float(torch.tensor(0.2))
        expected = lsq(x, scale, (-3, 12), upstream, 500.0, 15)
        torch.testing.assert_close(y.double(), expected[0], **FP32)
        torch.testing.assert_close(of_x.double(), expected[1], **FP32)
        assert float(of_scale) == pytest.approx(expected[2], rel=1e-4)

    def test_the_forward_is_fake_quantize_to_the_bit(self) -> None:
        x, _ = values(64, 64)
        for name in (*SYMMETRIC, "e4m3fn", "e2m1"):
            scheme = TensorScheme(format=name)
            y = learned_fake_quantize(x, torch.tensor(0.11), None, LearnedStep(scheme, 1.0))
            assert torch.equal(y, fake_quantize(x, scheme, QParams(torch.tensor(0.11))))

    def test_each_channel_and_each_group_has_its_own(self) -> None:
        x, upstream = values(6, 10)
        for reach, shape in (
            (PerChannel(0), (6,)),
            (PerChannel(1), (10,)),
            (PerGroup(4), (6, 3)),
            (PerGroup(3, 0), (2, 10)),
        ):
            scheme = TensorScheme(format="int3", granularity=reach)
            scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.2
            step = LearnedStep(scheme, 4.0)
            y, of_x, of_scale = gradients(x, scale, upstream, step)
            assert of_scale.shape == shape
            for index, part in _parts(reach, x):
                alone = lsq(x[part], float(scale[index]), (-4, 3), upstream[part], 4.0, 3)
                torch.testing.assert_close(y[part].double(), alone[0], **FP32)
                torch.testing.assert_close(of_x[part].double(), alone[1], **FP32)
                assert float(of_scale[index]) == pytest.approx(alone[2], rel=1e-4, abs=1e-6)

    def test_of_a_float_format_it_is_the_slope_of_scale_times_rounded(self) -> None:
        scheme = TensorScheme(format="e2m1")
        x, upstream = values(200)
        step = LearnedStep(scheme, 200.0)
        _, of_x, of_scale = gradients(x, torch.tensor(0.5), upstream, step)
        v = x.double() / 0.5
        inside = v.abs() <= 6.0
        rounded = fake_quantize(v, scheme, QParams(1.0))
        slope = torch.where(inside, rounded - v, v.sign() * 6.0)
        expected = float((upstream * slope).sum()) / math.sqrt(200 * 6.0)
        assert float(of_scale) == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(of_x.double(), torch.where(inside, upstream, 0.0).double())

    def test_backward_format_rounds_what_flows_back(self) -> None:
        plain = TensorScheme(format="int4")
        rounding = plain.model_copy(update={"backward_format": "e5m2"})
        x, upstream = values(100)
        rounded = fake_quantize(upstream, TensorScheme(format="e5m2"))
        expected = gradients(x, torch.tensor(0.3), rounded, LearnedStep(plain, 1.0))
        found = gradients(x, torch.tensor(0.3), upstream, LearnedStep(rounding, 1.0))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    def test_bf16_values_and_an_fp32_scale(self) -> None:
        x, upstream = values(30, 30)
        x, upstream = x.bfloat16(), upstream.bfloat16()
        step = LearnedStep(TensorScheme(format="int4"), 900.0)
        y, of_x, of_scale = gradients(x, torch.tensor(0.25), upstream, step)
        assert (y.dtype, of_x.dtype, of_scale.dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
        )
        expected = lsq(x, 0.25, (-8, 7), upstream, 900.0, 7)
        torch.testing.assert_close(y.double(), expected[0], **BF16)
        assert float(of_scale) == pytest.approx(expected[2], rel=1e-4)

    def test_integers_are_refused(self) -> None:
        step = LearnedStep(TensorScheme(), 1.0)
        with pytest.raises(DataError, match=r"torch\.int64"):
            learned_fake_quantize(torch.arange(3), torch.tensor(1.0), None, step)


class TestPositive:
    def test_a_step_through_zero_keeps_the_magnitude_and_turns_the_gradient(self) -> None:
        x, upstream = values(100)
        step = LearnedStep(TensorScheme(format="int4"), 1.0)
        above = gradients(x, torch.tensor(0.3), upstream, step)
        below = gradients(x, torch.tensor(-0.3), upstream, step)
        assert torch.equal(above[0], below[0])
        assert torch.equal(above[1], below[1])
        assert torch.equal(above[2], -below[2])

    def test_zero_is_no_scale_but_is_left_again(self) -> None:
        x, _ = values(100)
        step = LearnedStep(TensorScheme(format="int4"), 1.0)
        y, _, of_scale = gradients(x, torch.tensor(0.0), x, step)
        assert torch.isfinite(y).all()
        assert float(of_scale) > 0  # it grows, or shrinks through zero: |s| grows
        assert float(positive_scale(torch.tensor(0.0), step.scheme)) > 0

    def test_powers_of_two(self) -> None:
        scheme = TensorScheme(format="int8", power_of_two_scale=True)
        for value, expected in ((0.3, 0.5), (0.5, 0.5), (-3.0, 4.0)):
            assert float(positive_scale(torch.tensor(value), scheme)) == expected


class TestOffset:
    SCHEME = TensorScheme(format="uint4", symmetric=False)

    @pytest.mark.parametrize("offset", [-1.15, -0.4, 0.0, -2.95])
    def test_gradients_are_those_of_the_paper(self, offset: float) -> None:
        x, upstream = values(600)
        scale = float(torch.tensor(0.2))
        step = LearnedStep(self.SCHEME, 600.0)
        found = gradients(x, torch.tensor(0.2), upstream, step, torch.tensor(offset))
        expected = lsq_plus(x, scale, offset, (0, 15), upstream, 600.0)
        torch.testing.assert_close(found[0].double(), expected[0], **FP32)
        torch.testing.assert_close(found[1].double(), expected[1], **FP32)
        assert float(found[2]) == pytest.approx(expected[2], rel=1e-4)
        assert float(found[3]) == pytest.approx(expected[3], rel=1e-4)

    def test_the_zero_point_stays_among_the_codes(self) -> None:
        for offset, zero_point in ((-0.56, 3), (1.0, 0), (-9.0, 15)):
            found = learned_qparams(self.SCHEME, torch.tensor(0.2), torch.tensor(offset))
            assert float(found.zero_point) == zero_point

    @pytest.mark.parametrize(("offset", "sign"), [(1.0, 1), (-9.0, -1)])
    def test_out_of_the_codes_the_gradient_only_leads_back(self, offset: float, sign: int) -> None:
        x = torch.tensor([10.0, -10.0])
        step = LearnedStep(self.SCHEME, 1.0)
        for upstream in (torch.tensor([2.0, 1.0]), torch.tensor([-2.0, -1.0])):
            found = gradients(x, torch.tensor(0.2), upstream, step, torch.tensor(offset))[3]
            leads_back = float(upstream.sum()) * sign > 0
            assert (float(found) * sign > 0) if leads_back else (float(found) == 0)

    def test_outside_the_range_both_are_numerical_derivatives(self) -> None:
        step = LearnedStep(TensorScheme(format="uint4", symmetric=False), 1.0)
        scale, offset = (torch.tensor(v, dtype=torch.float64) for v in (0.25, -1.0))
        for value in (40.0, -40.0):
            x = torch.tensor([value], dtype=torch.float64)
            _, _, of_scale, of_offset = gradients(x, scale, torch.ones_like(x), step, offset)
            # one step of the zero point at a time: in between nothing moves
            moved = (learned_fake_quantize(x, scale, offset + d, step) for d in (0.25, -0.25))
            slope = sum(s * y for s, y in zip((1, -1), moved, strict=True)) / 0.5
            torch.testing.assert_close(of_offset.reshape(1), slope * step.gradient_scale, **NUMERIC)
            # with β at a multiple of s, y = β + code · s
            code = 15.0 if value > 0 else 0.0
            assert float(of_scale) == pytest.approx(code * step.gradient_scale)


class TestStart:
    @pytest.mark.parametrize(
        ("scheme", "levels"),
        [
            (TensorScheme(format="int4"), 7),
            (TensorScheme(format="uint4", symmetric=False), 15),
            (TensorScheme(format="int4", symmetric=False), 15),
            (TensorScheme(format="uint4"), 7),
            (TensorScheme(format="int8", narrow=True), 127),
        ],
    )
    def test_scale_is_twice_the_mean_over_the_root_of_the_levels(
        self, scheme: TensorScheme, levels: int
    ) -> None:
        rows = values(5, 70)[0]
        assert positive_levels(scheme) == levels
        expected = 2 * rows.abs().mean(-1) / math.sqrt(levels)
        torch.testing.assert_close(initial_qparams(rows, scheme).scale, expected)

    def test_what_is_not_finite_does_not_count_and_zeros_give_one(self) -> None:
        rows = torch.tensor([[1.0, -3.0, math.nan, math.inf], [0.0] * 4])
        scale = initial_qparams(rows, TensorScheme(format="int8")).scale
        torch.testing.assert_close(scale, torch.tensor([4 / math.sqrt(127), 1.0]))

    def test_a_float_takes_its_largest_magnitude(self) -> None:
        scale = initial_qparams(torch.tensor([[1.0, -896.0]]), TensorScheme(format="e4m3fn")).scale
        assert scale.tolist() == [2.0]

    def test_blocks_and_formats_without_a_scale_cannot_learn(self) -> None:
        assert [can_learn(TensorScheme(format=n)) for n in ("int4", "e4m3fn", "mxfp4", "bf16")] == [
            True,
            True,
            False,
            False,
        ]


def _parts(reach: object, x: Tensor) -> list[tuple[tuple[int, ...], tuple[slice | int, ...]]]:
    """Return scale index → what it reaches, spelled out."""
    everything = slice(None)
    if reach == PerChannel(0):
        return [((i,), (i, everything)) for i in range(6)]
    if reach == PerChannel(1):
        return [((i,), (everything, i)) for i in range(10)]
    if reach == PerGroup(4):
        return [((i, j), (i, slice(4 * j, 4 * j + 4))) for i in range(6) for j in range(3)]
    return [((i, j), (slice(3 * i, 3 * i + 3), j)) for i in range(2) for j in range(10)]
