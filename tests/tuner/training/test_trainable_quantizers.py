"""The quantizers of a trainable model: running ranges, learned scales, their start and state."""

import math

import pytest
import torch
from torch import Tensor

from tests.tuner.training.references import lsq
from tuner import OpConfig, PerChannel, PerGroup, PerTensor, TensorScheme
from tuner.errors import DataError
from tuner.qparams import QParams, compute_qparams, fake_quantize
from tuner.recovery.learned import LearnedQuantizer
from tuner.recovery.trainable_bias import rounded_bias
from tuner.recovery.trainable_ranges import OwnQuantizer, RangeQuantizer, range_of

FP32 = {"rtol": 1e-5, "atol": 1e-6}
INT4 = TensorScheme(format="int4")
AFFINE = TensorScheme(format="uint4", symmetric=False)


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(7, 6, generator=generator) * (1 + i) for i in range(count)]


class TestRunningRange:
    @pytest.mark.parametrize("decay", [0.99, 0.5, 0.0, 1.0])
    def test_is_the_average_of_the_paper(self, decay: float) -> None:
        quantizer = RangeQuantizer(AFFINE, (), decay)
        low, high = math.nan, math.nan
        for index, x in enumerate(batches()):
            quantizer.observe(x)
            ends = float(x.min()), float(x.max())
            low = ends[0] if index == 0 else decay * low + (1 - decay) * ends[0]
            high = ends[1] if index == 0 else decay * high + (1 - decay) * ends[1]
        assert (float(quantizer.low), float(quantizer.high)) == pytest.approx((low, high))

    def test_along_an_axis_each_slice_has_its_own(self) -> None:
        scheme = INT4.model_copy(update={"granularity": PerGroup(4)})
        quantizer = RangeQuantizer(scheme, (2,), 0.9)
        for x in batches(2):
            quantizer.observe(x)
        first, second = batches(2)
        for index, part in enumerate((slice(0, 4), slice(4, 6))):
            low = 0.9 * first[:, part].min() + 0.1 * second[:, part].min()
            torch.testing.assert_close(quantizer.low[index], low)
        x = batches(1)[0]
        alone = quantizer.qparams().scale
        assert isinstance(alone, Tensor)
        torch.testing.assert_close(
            quantizer(x)[:, 4:], fake_quantize(x[:, 4:], INT4, QParams(alone[1]))
        )

    def test_what_is_not_finite_is_left_out(self) -> None:
        quantizer = RangeQuantizer(INT4, (), 0.5)
        quantizer.observe(torch.tensor([1.0, math.nan, -2.0]))
        quantizer.observe(torch.tensor([math.nan, math.inf]))
        assert (float(quantizer.low), float(quantizer.high)) == (-2.0, 1.0)
        quantizer.observe(torch.tensor([3.0, -math.inf]))
        assert (float(quantizer.low), float(quantizer.high)) == (0.5, 2.0)

    def test_gradient_passes_inside_the_range_and_stops_outside(self) -> None:
        quantizer = RangeQuantizer(INT4, (), 0.9)
        quantizer.initialize(QParams(torch.tensor(0.5)))
        x = torch.tensor([-5.0, -4.0, -3.5, 0.0, 3.5, 3.6], requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad is not None
        # symmetric int4 at s = 0.5 holds −4 … 3.5
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]

    @pytest.mark.parametrize(
        "scheme",
        [
            TensorScheme(format=name, symmetric=symmetric, narrow=narrow)
            for name, symmetric, narrow in (
                ("int8", True, False),
                ("int8", True, True),
                ("int4", False, False),
                ("uint8", False, False),
                ("uint8", True, False),
            )
        ]
        + [TensorScheme(format="e4m3fn")],
        ids=str,
    )
    def test_starts_from_calibrated_parameters(self, scheme: TensorScheme) -> None:
        qparams = compute_qparams(batches()[0], scheme)
        quantizer = RangeQuantizer(scheme, (), 0.99)
        quantizer.initialize(qparams)
        found = quantizer.qparams()
        torch.testing.assert_close(found.scale, qparams.scale)
        assert found.zero_point == qparams.zero_point
        low, high = range_of(qparams, scheme)
        assert float(low) < 0 < float(high)

    def test_without_a_range_it_refuses(self) -> None:
        with pytest.raises(DataError, match="training mode first"):
            RangeQuantizer(INT4, (), 0.99)(batches()[0])


class TestOwnRange:
    @pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "bf16"])
    def test_is_fake_quantize_with_its_gradient(self, name: str) -> None:
        scheme = TensorScheme(format=name)
        x = batches()[0].requires_grad_()
        y = OwnQuantizer(scheme)(x)
        assert torch.equal(y, fake_quantize(x, scheme))
        (found,) = torch.autograd.grad((y * y.detach()).sum(), x)
        z = fake_quantize(x, scheme)
        (expected,) = torch.autograd.grad((z * z.detach()).sum(), x)
        assert torch.equal(found, expected)


class TestLearnedScale:
    def test_starts_at_the_first_batch_and_stays(self) -> None:
        quantizer = LearnedQuantizer(INT4, (), of_weight=False, learns_offset=False)
        first, second, *_ = batches()
        quantizer.observe(first)
        quantizer.observe(second)
        expected = 2 * float(first.abs().mean()) / math.sqrt(7)
        assert quantizer.scale.item() == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("granularity", "shape"),
        [(PerTensor(), ()), (PerChannel(0), (7,)), (PerGroup(4), (7, 2)), (PerGroup(3, 0), (3, 6))],
        ids=str,
    )
    def test_a_weight_starts_by_its_own_channels_and_groups(
        self, granularity: object, shape: tuple[int, ...]
    ) -> None:
        scheme = TensorScheme(format="int4", granularity=granularity)
        quantizer = LearnedQuantizer(scheme, shape, of_weight=True, learns_offset=False)
        x = batches()[0]
        quantizer.observe(x)
        assert quantizer.scale.shape == shape
        parts: dict[object, list[Tensor]] = {
            (): [x],
            (7,): list(x),
            (7, 2): [row[part] for row in x for part in (slice(4), slice(4, 6))],
            (3, 6): [x[3 * i : 3 * i + 3, j] for i in range(3) for j in range(6)],
        }
        expected = [2 * part.abs().mean() / math.sqrt(7) for part in parts[shape]]
        torch.testing.assert_close(quantizer.scale.detach().reshape(-1), torch.stack(expected))

    def test_counts_the_features_of_one_sample(self) -> None:
        quantizer = LearnedQuantizer(INT4, (), of_weight=False, learns_offset=False)
        quantizer.initialize(QParams(torch.tensor(0.3)))
        x = batches()[0]
        quantizer(x).backward(x)
        expected = lsq(x, float(quantizer.scale.detach()), (-8, 7), x, count=6.0, levels=7)[2]
        assert quantizer.scale.grad is not None
        assert float(quantizer.scale.grad) == pytest.approx(expected, rel=1e-4)

    def test_groups_of_an_activation_collect_all_that_they_scale(self) -> None:
        scheme = INT4.model_copy(update={"granularity": PerGroup(4)})
        quantizer = LearnedQuantizer(scheme, (2,), of_weight=False, learns_offset=False)
        quantizer.initialize(QParams(torch.tensor([0.3, 0.2])))
        x = batches()[0]
        quantizer(x).backward(x)
        assert quantizer.scale.grad is not None
        for index, part in enumerate((slice(0, 4), slice(4, 6))):
            scale = float(quantizer.scale.detach()[index])
            expected = lsq(x[:, part], scale, (-8, 7), x[:, part], count=3.0, levels=7)[2]
            assert float(quantizer.scale.grad[index]) == pytest.approx(expected, rel=1e-4)

    def test_a_zero_point_is_fixed_in_lsq_and_learned_in_lsq_plus(self) -> None:
        for learns in (False, True):
            quantizer = LearnedQuantizer(AFFINE, (), of_weight=False, learns_offset=learns)
            quantizer.initialize(QParams(torch.tensor(0.25), torch.tensor(5, dtype=torch.int32)))
            assert quantizer.qparams().zero_point == 5
            names = {name for name, _ in quantizer.named_parameters()}
            assert names == ({"scale", "offset"} if learns else {"scale"})

    def test_state_comes_back(self) -> None:
        quantizer = LearnedQuantizer(AFFINE, (), of_weight=False, learns_offset=True)
        quantizer.observe(batches()[0])
        other = LearnedQuantizer(AFFINE, (), of_weight=False, learns_offset=True)
        with pytest.raises(DataError, match="no value yet"):
            other(batches()[1])
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other(batches()[1]), quantizer(batches()[1]))

    def test_with_and_without_gradients_the_bits_are_equal(self) -> None:
        quantizer = LearnedQuantizer(AFFINE, (), of_weight=False, learns_offset=True)
        x = batches()[0]
        quantizer.observe(x)
        with torch.no_grad():
            plain = quantizer(x)
        assert torch.equal(quantizer(x), plain)


class TestBias:
    def test_counts_in_steps_of_input_times_weight(self) -> None:
        config = OpConfig(bias=TensorScheme(format="int32"))
        bias = torch.tensor([0.31, -0.2, 0.04], requires_grad=True)
        steps = torch.tensor([0.1, 0.03, 0.02], dtype=torch.float64)
        rounded = rounded_bias(bias, config, lambda: steps)
        torch.testing.assert_close(rounded, torch.tensor([0.3, -0.21, 0.04]), **FP32)
        rounded.sum().backward()
        assert bias.grad is not None
        assert bias.grad.tolist() == [1.0, 1.0, 1.0]

    def test_another_format_has_its_own_scale(self) -> None:
        scheme = TensorScheme(format="int8")
        bias = torch.tensor([0.31, -0.2, 0.04])
        rounded = rounded_bias(bias, OpConfig(bias=scheme), lambda: torch.ones(()))
        assert torch.equal(rounded, fake_quantize(bias, scheme))
