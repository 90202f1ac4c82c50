"""Quantized biases, against integers that numpy computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.tuner.nets import Attention, ConvNet, Transposed, inputs_for, seeded
from tests.tuner.test_search_space import prepared
from tuner import (
    OpConfig,
    PerChannel,
    PerGroup,
    PerToken,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.costs import CostModel
from tuner.errors import PlanError, SpaceError
from tuner.model import InstrumentedModel
from tuner.packing import unpack_codes
from tuner.qparams import compute_qparams
from tuner.ranges import QParams

INT32 = TensorScheme(format="int32")
A8 = TensorScheme(format="uint8", symmetric=False)
W8 = TensorScheme(format="int8", granularity=PerChannel(0))
FULL = OpConfig(weight=W8, inputs=A8, bias=INT32)


def by_rule(net: nn.Module, name: str, config: OpConfig) -> QuantizedModel:
    """Quantize one op by a rule, the others as int8 has them."""
    space = SearchSpace(rules=[Rule(names=[name], options=[config])])
    return quantization.fit(net, [inputs_for(net, 16)], config=TuningConfig(space=space))


@pytest.mark.parametrize(
    ("net_type", "name", "config"),
    [
        (ConvNet, "head", FULL),
        (ConvNet, "depthwise", FULL),
        (ConvNet, "conv", FULL),  # has no bias of its own: that of the batch norm
        (ConvNet, "head", FULL.model_copy(update={"weight": TensorScheme(format="int4")})),
        (
            Transposed,
            "up",
            FULL.model_copy(
                update={"weight": W8.model_copy(update={"granularity": PerChannel(1)})}
            ),
        ),
    ],
)
def test_int32_counts_in_input_scale_times_weight_scale(
    net_type: type[nn.Module], name: str, config: OpConfig, tmp_path: Path
) -> None:
    float_net = by_rule(seeded(net_type), name, OpConfig.float()).model.get_submodule(name)
    model = by_rule(seeded(net_type), name, config)
    model.save(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "weights.safetensors")
    order = [tuple(key) for key in _config(tmp_path / "out")["activations"]]
    weight_scales = saved[f"{name}.weight.scale"].double().numpy().reshape(-1)
    input_scale = float(saved["activations.scale"][order.index((name, 0))])
    bias = float_net.bias.detach().double().numpy()
    repeats = len(bias) // len(weight_scales)
    steps = input_scale * np.tile(weight_scales, repeats)
    expected = np.round(bias / steps).astype(np.int64)
    codes = unpack_codes(saved[f"{name}.bias.codes"], 32, True, bias.shape).numpy()
    assert (codes.astype(np.int64) == expected).all()
    assert len(set(expected.tolist())) > 2
    assert f"{name}.bias.scale" not in saved
    on = model.model.get_submodule(name).bias.detach()
    assert torch.equal(on, torch.from_numpy(expected * steps).float())
    again = quantization.load(tmp_path / "out", net_type().eval())
    assert torch.equal(again.model.get_submodule(name).bias, on)
    assert "bias int32 per-channel symmetric, scale" in repr(model.model)
    assert "bias int32 per-channel symmetric, scale" in repr(again.model)
    again.save(tmp_path / "twice")
    first, second = (tmp_path / n / "weights.safetensors" for n in ("out", "twice"))
    assert first.read_bytes() == second.read_bytes()


def _config(directory: Path) -> dict[str, list[list[object]]]:
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]


class _Fixed:
    """Every input counts in steps of 2^-5."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        return QParams(2.0**-5, 128)


def instrumented(net: nn.Module) -> tuple[InstrumentedModel, torch.Tensor]:
    x = inputs_for(net)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), len(x)).ops, _Fixed())
    return model, x


def test_codes_of_32_bits_are_exact_and_clamped() -> None:
    net = nn.Sequential(nn.Linear(2, 4)).eval()
    codes = torch.tensor([2.0**31, -(2.0**31) - 9, 2.0**30 + 2**7, 12345.0], dtype=torch.float64)
    weight = torch.tensor([[127.0, 0.0]] * 4)  # scales of 1
    net[0].weight.data, net[0].bias.data = weight, (codes * 2.0**-5).float()
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(torch.ones(1, 2)), 1).ops, _Fixed())
    model.apply({"0": FULL})
    _, parts = model.biases.stored(model.ops["0"])
    found = unpack_codes(parts["codes"], 32, True, (4,)).tolist()
    assert found == [2**31 - 1, -(2**31), 2**30 + 2**7, 12345]


def test_a_bias_goes_on_and_off_and_keeps_its_identity() -> None:
    net = seeded(ConvNet)
    model, x = instrumented(net)
    parameter, before = net.head.bias, net.head.bias.detach().clone()
    with torch.no_grad():
        reference = net(x)
    coarse = TensorScheme(format="int2")
    model.apply({"head": OpConfig(bias=coarse)})
    scale = compute_qparams(before, coarse).scale
    assert torch.equal(net.head.bias, (before / scale).round().clamp(-2, 1) * scale)
    assert net.head.bias is parameter
    model.apply({"head": OpConfig(bias=TensorScheme(format="e4m3fn"))})
    assert not torch.equal(net.head.bias, before)
    assert "bias e4m3fn per-tensor, scale" in repr(net)
    model.apply({})
    assert torch.equal(net.head.bias, before)
    with torch.no_grad():
        assert torch.equal(net(x), reference)


@pytest.mark.parametrize("name", ["int8", "e5m2", "fp16", "mxfp4", "nf4"])
def test_a_bias_of_any_format_is_saved(name: str, tmp_path: Path) -> None:
    config = OpConfig(weight=W8, bias=TensorScheme(format=name))
    net = seeded(ConvNet)
    model = by_rule(net, "depthwise", config)
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", ConvNet().eval())
    x = inputs_for(net)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert torch.equal(again.model.depthwise.bias, model.model.depthwise.bias)
    assert not torch.equal(
        again.model.depthwise.bias,
        by_rule(net, "depthwise", OpConfig(weight=W8)).model.depthwise.bias,
    )


_GROUPED = TensorScheme(format="int8", granularity=PerGroup(4))
_DYNAMIC = TensorScheme(format="int8", granularity=PerToken(), dynamic=True)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (OpConfig(bias=INT32, inputs=A8), "integer weight, got none"),
        (OpConfig(bias=INT32, weight=W8), "integer input, got none"),
        (OpConfig(bias=INT32, weight=_GROUPED, inputs=A8), "one weight scale per output channel"),
        (OpConfig(bias=INT32, weight=TensorScheme(granularity=PerChannel(1)), inputs=A8), "output"),
        (OpConfig(bias=INT32, weight=W8, inputs=_DYNAMIC), "static per-tensor input"),
        (OpConfig(bias=INT32, weight=W8, inputs=TensorScheme(format="e4m3fn")), "got e4m3fn"),
        (OpConfig(bias=INT32, weight=TensorScheme(format="mxint8"), inputs=A8), "got mxint8"),
        (
            OpConfig(bias=TensorScheme(format="int32", symmetric=False), weight=W8, inputs=A8),
            "zero point",
        ),
    ],
)
def test_int32_without_the_scales_that_it_needs(config: OpConfig, says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        by_rule(seeded(ConvNet), "head", config)
    model, _ = instrumented(seeded(ConvNet))
    with pytest.raises(PlanError, match=says):
        model.apply({"head": config})


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (Attention, "attention/q_proj"),
        (Attention, "attention/matmul:0"),
        (lambda: nn.Sequential(nn.Linear(16, 4, bias=False)), "0"),
        (lambda: nn.Sequential(nn.Linear(16, 4), nn.LSTM(4, 4)), "1"),
    ],
)
def test_ops_without_a_bias(net: type[nn.Module], name: str) -> None:
    with pytest.raises(SpaceError, match=r"no bias to quantize.*Linear, Conv"):
        by_rule(net(), name, OpConfig(inputs=A8, bias=TensorScheme(format="int8")))


def test_a_shared_bias_is_not_quantized_twice() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    net[1].bias = net[0].bias
    model, _ = instrumented(net)
    config = OpConfig(bias=TensorScheme(format="int8"))
    with pytest.raises(PlanError, match="share one bias"):
        model.apply({"0": config, "1": config})


def test_what_a_bias_costs() -> None:
    net = seeded(ConvNet)
    x = inputs_for(net)
    costs = CostModel(net, InstrumentedModel(net).record(lambda: net(x), len(x)))
    whole = costs.costs({}).size_bytes
    for name, saved in [("int8", 5 * 4 - 5 - 4), ("fp16", 5 * 2), ("int4", 5 * 4 - 3 - 4)]:
        config = OpConfig(bias=TensorScheme(format=name))
        assert whole - costs.costs({"head": config}).size_bytes == saved
    config = OpConfig(weight=W8, inputs=(A8,))
    with_bias = config.model_copy(update={"bias": INT32})
    assert costs.costs({"head": with_bias}) == costs.costs({"head": config})


def test_a_coarse_bias_is_predicted_to_do_damage() -> None:
    options = [OpConfig(bias=TensorScheme(format=f"int{bits}")) for bits in (8, 4, 2)]
    options += [OpConfig(weight=W8, inputs=A8), FULL]
    space = SearchSpace(rules=[Rule(names=["head"], options=options)])
    ready = prepared(seeded(ConvNet), space)
    damages = ready.damages["head"]
    found = [damages[choice.configs["head"]] for choice in ready.space.units[-1].choices]
    assert 0 < found[0] < found[1] < found[2]
    assert found[3] == found[4] > 0
