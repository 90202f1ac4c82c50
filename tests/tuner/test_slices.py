"""Static ranges along an axis of activations, by simulate(), against torch; what is refused."""

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver, PerChannelMinMaxObserver
from torch.nn import functional as F

from tests.tuner.channels import FLOAT_HEAD, Net, batches, po2, rounded, site_qparams
from tests.tuner.nets import ALL, inputs_for, main_output, seeded
from tuner import (
    OpConfig,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    calibrate,
    quantization,
)
from tuner.errors import CalibrationWarning, DataError, SchemeError, SpaceError
from tuner.granularity import Granularity
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges, Observer
from tuner.operands import OUTPUT

REACHES: dict[str, tuple[Granularity, int, int]] = {  # with the axis and the indices a scale has
    "channels": (PerChannel(1), 1, 1),
    "last axis": (PerChannel(-1), -1, 1),
    "ragged groups": (PerGroup(2, axis=1), 1, 2),
    "groups of the last axis": (PerGroup(3), -1, 3),
    "blocks": (PerBlock(4), -1, 4),
}

# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("reach", REACHES)
def test_simulate_rounds_as_torch_does_with_a_range_per_slice(reach: str) -> None:
    granularity, axis, size = REACHES[reach]
    net, data = Net(), batches(8, 8, 3)  # the last batch is ragged
    x = batches(5, seed=1)[0]
    scheme = po2(granularity)
    rules = [FLOAT_HEAD]
    sim = quantization.simulate(net, scheme, None, scheme, calib_dataloader=data, rules=rules)
    with torch.no_grad():
        outputs = [net.conv(batch) for batch in data]
        inner = net.conv(rounded(x, data, axis, size))
        expected = net.head(F.relu(rounded(inner, outputs, axis, size)).mean((2, 3)))
        assert torch.equal(sim(x), expected)
        per_tensor = quantization.simulate(
            net, po2(PerTensor()), None, po2(PerTensor()), calib_dataloader=data, rules=rules
        )
        assert not torch.equal(sim(x), per_tensor(x))


@pytest.mark.parametrize(
    ("method", "observer"),
    [
        ("minmax", PerChannelMinMaxObserver),
        ("ema", partial(MovingAveragePerChannelMinMaxObserver, averaging_constant=0.5)),
    ],
)
def test_affine_scales_and_zero_points_are_those_of_torchs_observers(
    method: str, observer: Any
) -> None:
    data = [batch + torch.arange(-2, 3)[:, None, None] for batch in batches(8, 4, 8)]
    scheme = TensorScheme(
        format="uint8",
        symmetric=False,
        granularity=PerChannel(1),
        calibration=method,  # type: ignore[arg-type]
        ema_decay=0.5,
    )
    sim = quantization.simulate(Net(), inputs=scheme, calib_dataloader=data)
    reference = observer(ch_axis=1, qscheme=torch.per_channel_affine)
    for batch in data:
        reference(batch)
    scale, zero_point = reference.calculate_qparams()
    found, found_zero_point = site_qparams(sim, "conv")
    torch.testing.assert_close(found, scale, rtol=1e-6, atol=0)
    assert found_zero_point is not None
    assert torch.equal(found_zero_point, zero_point.int())


@pytest.mark.parametrize("method", ["minmax", "ema", "percentile", "mse", "entropy", "histogram"])
def test_every_method_sees_the_values_of_its_slice_alone(method: str) -> None:
    data = batches(4, 4, 2)
    fields: dict[str, Any] = {"format": "int6", "calibration": method, "ema_decay": 0.5}
    scheme = TensorScheme(**fields, granularity=PerGroup(2, axis=1))
    sim = quantization.simulate(Net(), inputs=scheme, calib_dataloader=data, rules=[FLOAT_HEAD])
    found = site_qparams(sim, "conv")[0]
    parts = zip(*(batch.split(2, 1) for batch in data), strict=True)
    expected = [torch.as_tensor(calibrate(part, TensorScheme(**fields)).scale) for part in parts]
    wide = torch.stack(expected).repeat_interleave(2)[:5]
    torch.testing.assert_close(found, wide, rtol=1e-6, atol=0)


def test_mse_is_near_the_best_scale_of_each_channel() -> None:
    data = batches(8)
    scheme = TensorScheme(format="int4", granularity=PerChannel(1), calibration="mse")
    sim = quantization.simulate(Net(), inputs=scheme, calib_dataloader=data, rules=[FLOAT_HEAD])
    for channel, scale in enumerate(site_qparams(sim, "conv")[0].tolist()):
        values = data[0][:, channel]
        errors = [
            float((torch.fake_quantize_per_tensor_affine(values, s, 0, -8, 7) - values).norm())
            for s in (scale, *(float(values.abs().max()) / 7 * torch.linspace(0.2, 1, 200)))
        ]
        assert errors[0] <= 1.01 * min(errors)


@pytest.mark.parametrize("net_type", ALL)
def test_every_net_takes_scales_along_the_last_axis(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    scheme = TensorScheme(granularity=PerChannel(-1))
    sim = quantization.simulate(net, scheme, "int8", scheme, calib_dataloader=[x])
    with torch.no_grad():
        output, reference = main_output(sim(x)), main_output(net(x))
        assert 0 < float((output - reference).norm() / reference.norm()) < 0.1
        assert torch.equal(main_output(sim(x[:3])), output[:3])


@pytest.mark.parametrize("granularity", [PerChannel(1), PerGroup(2, axis=1)], ids=repr)
def test_copies_and_pickles_compute_the_same(granularity: Granularity) -> None:
    (x,) = batches(4)
    sim = quantization.simulate(Net(), po2(granularity), calib_dataloader=[x])
    with torch.no_grad():
        output = sim(x)
        for twin in (copy.deepcopy(sim), pickle.loads(pickle.dumps(sim))):
            assert torch.equal(twin(x), output)
            assert repr(twin) == repr(sim)


def test_nonfinite_values_are_left_out_and_counted_once() -> None:
    clean, spoilt = batches(4, 4), batches(4, 4)
    for batch in (*clean, *spoilt):
        batch[0, 1, 0, :2] = 0.0
    spoilt[0][0, 1, 0, 0], spoilt[1][0, 1, 0, 1] = torch.nan, torch.inf
    rules = [FLOAT_HEAD]
    scheme = po2(PerChannel(1))
    with pytest.warns(CalibrationWarning, match=r"left out 2 .*most in conv \(operand 0: 2\)"):
        found = quantization.simulate(Net(), scheme, calib_dataloader=spoilt, rules=rules)
    expected = quantization.simulate(Net(), scheme, calib_dataloader=clean, rules=rules)
    assert torch.equal(site_qparams(found, "conv")[0], site_qparams(expected, "conv")[0])


def test_statistics_are_kept_of_what_is_wanted_only() -> None:
    net, (x,) = Net(), batches(4)
    model = InstrumentedModel(net)
    model.record(lambda: net(x), 4)
    whole, channels = TensorScheme(), TensorScheme(granularity=PerChannel(1))
    observer = Observer({"conv": ((0, whole), (OUTPUT, channels)), "head": ((0, whole),)})
    with torch.no_grad(), model.watching(observer):
        net(x)
    assert set(observer.statistics) == {("conv", 0), ("head", 0)}
    assert set(observer.slices) == {("conv", OUTPUT, PerChannel(1))}
    ranges = CalibratedRanges(observer)
    assert torch.as_tensor(ranges.qparams("conv", OUTPUT, channels).scale).shape == (6,)
    with pytest.raises(DataError, match="conv: calibration saw no finite value of operand 0"):
        ranges.qparams("conv", 0, channels)


# ---------------------------------------------------------------- refusals


def counted(data: list[Tensor], seen: list[int]) -> Iterator[Tensor]:
    for number, batch in enumerate(data):
        seen.append(number)
        yield batch


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (TensorScheme(granularity=PerChannel(4)), r"conv, input 0: .*axis 4 does not exist"),
        (TensorScheme(granularity=PerGroup(2, axis=-5)), r"conv, input 0: .*axis -5 does not"),
        (
            TensorScheme(format="e4m3fn", granularity=PerChannel(1), calibration="entropy"),
            r"conv, input 0: calibration 'entropy' does not work for e4m3fn.*minmax, ema",
        ),
    ],
)
def test_what_no_data_can_give_is_refused_before_the_pass(scheme: TensorScheme, says: str) -> None:
    seen: list[int] = []
    with pytest.raises(SchemeError, match=says):
        quantization.simulate(Net(), scheme, calib_dataloader=counted(batches(2, 2, 2), seen))
    assert len(seen) == 1
    space = SearchSpace(rules=[Rule(options=[OpConfig(inputs=scheme)])])
    with pytest.raises(SchemeError, match=says):
        quantization.fit(
            Net(), batches(2, 2), _never_called, TuningConfig(space=space, max_trials=1)
        )


def _never_called(model: nn.Module) -> float:
    raise AssertionError("FP32 was evaluated before what cannot work was refused")


def test_the_axis_of_samples_is_refused_where_batches_differ() -> None:
    scheme = TensorScheme(granularity=PerChannel(0))
    says = (
        r"conv, input 0: PerChannel\(.*axis=0.* axis 0, whose size must not change: it was 8 at "
        r"first .* and is 3 .*that of the samples.*PerChannel\(1\)"
    )
    with pytest.raises(DataError, match=says):
        quantization.simulate(Net(), scheme, calib_dataloader=batches(8, 3))


@pytest.mark.parametrize("granularity", [PerChannel(-2), PerGroup(4, axis=1)], ids=repr)
def test_a_sequence_whose_length_changes_is_refused(granularity: Granularity) -> None:
    scheme = TensorScheme(granularity=granularity)
    says = r"0, output: .*it was 9 at first \(shape \[2, 9, 5\]\) and is 7 .*Rule.*dynamic=True"
    data = [torch.randn(2, length, 5) for length in (9, 7)]
    with pytest.raises(DataError, match=says):
        quantization.simulate(nn.Sequential(nn.Linear(5, 5)), None, None, scheme, data)


def test_an_int32_bias_needs_one_input_scale() -> None:
    config = OpConfig(
        weight=TensorScheme(granularity=PerChannel(0)),
        inputs=TensorScheme(granularity=PerChannel(1)),
        bias=TensorScheme(format="int32"),
    )
    says = r"int32 bias .*needs one input scale for the whole tensor, got PerChannel"
    with pytest.raises(SpaceError, match=says):
        quantization.simulate(
            Net(), calib_dataloader=batches(4), rules=[Rule(names=["conv"], options=[config])]
        )
