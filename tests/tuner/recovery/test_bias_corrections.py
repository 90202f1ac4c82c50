"""Corrected biases go on a model and come off it, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.recovery.chain_nets import Net
from tuner import OpConfig, TensorScheme
from tuner.bias_corrections import BiasCorrections
from tuner.errors import PlanError
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges, Observer
from tuner.ops import Op

_W4, _W8 = TensorScheme(format="int4"), TensorScheme()
CORRECTED = OpConfig(weight=_W4, recovery=("bias_correction",))
FLOAT = OpConfig.float()


def shift(op: Op, config: OpConfig) -> Tensor:
    """Return a correction that tells configurations apart."""
    assert config.weight is not None
    return torch.full((3,), 1.0 if config.weight.format == "int4" else 2.0, dtype=torch.float64)


def net_of() -> Any:
    torch.manual_seed(0)
    return Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(4, 3), b=nn.Linear(3, 3))


@pytest.fixture
def model() -> InstrumentedModel:
    found = InstrumentedModel(net_of())
    x = torch.randn(8, 4)
    graph = found.record(lambda: found.model(x), 8)
    static = TensorScheme(format="uint8", symmetric=False)
    observer = Observer({name: ((0, static),) for name in graph.ops})
    with torch.no_grad(), found.watching(observer):
        found.model(x)
    found.install(graph.ops, CalibratedRanges(observer))
    found.corrections.correction = shift
    return found


def bias(model: InstrumentedModel, name: str = "a") -> Tensor:
    return model.model.get_parameter(f"{name}.bias").detach()


def test_a_correction_is_added_and_taken_off(model: InstrumentedModel) -> None:
    parameter = model.model.get_parameter("a.bias")
    own, other = bias(model).clone(), bias(model, "b").clone()
    model.apply({"a": CORRECTED})
    assert torch.equal(bias(model), own + 1)
    assert torch.equal(bias(model, "b"), other)
    assert model.model.get_parameter("a.bias") is parameter
    model.apply({"a": OpConfig(weight=_W4)})
    assert torch.equal(bias(model), own)
    model.apply({"a": CORRECTED})
    model.apply({})
    assert torch.equal(bias(model), own)


def test_another_configuration_has_a_correction_of_its_own(model: InstrumentedModel) -> None:
    own = bias(model).clone()
    for scheme, amount in ((_W4, 1), (_W8, 2), (_W4, 1)):
        model.apply({"a": CORRECTED.model_copy(update={"weight": scheme})})
        assert torch.equal(bias(model), own + amount)


def test_a_bias_without_a_quantized_weight_is_left_alone(model: InstrumentedModel) -> None:
    own = bias(model).clone()
    model.apply({"a": OpConfig(inputs=_W8, recovery=("bias_correction",))})
    assert torch.equal(bias(model), own)


@pytest.mark.parametrize("format_name", ["int32", "int8"])
def test_a_quantized_bias_is_corrected_first(model: InstrumentedModel, format_name: str) -> None:
    own = bias(model).clone()
    inputs = (TensorScheme(format="uint8", symmetric=False),)
    scheme = TensorScheme(format=format_name)
    plain = OpConfig(weight=_W4, inputs=inputs, bias=scheme)
    model.apply({"a": plain.model_copy(update={"recovery": ("bias_correction",)})})
    corrected = bias(model).clone()
    model.apply({})
    assert torch.equal(bias(model), own)
    model.corrections.correction = None
    model.model.get_parameter("a.bias").data = own + 1
    model.apply({"a": plain})
    assert torch.equal(bias(model), corrected)
    assert not torch.equal(corrected, own + 1)


def test_a_loaded_bias_is_taken_as_it_is(model: InstrumentedModel) -> None:
    own = bias(model).clone()
    model.corrections.correction = None
    model.corrections.adopt(model.ops["a"], CORRECTED)
    model.apply({"a": CORRECTED})
    assert torch.equal(bias(model), own)


def test_without_calibration_a_correction_is_refused(model: InstrumentedModel) -> None:
    model.corrections.correction = None
    with pytest.raises(PlanError, match=r"'a': the plan corrects the bias"):
        model.apply({"a": CORRECTED})


def test_half_precision_stays(model: InstrumentedModel) -> None:
    net = net_of().to(torch.bfloat16)
    corrections = BiasCorrections(net)
    corrections.correction = shift
    corrections.set(model.ops["a"], CORRECTED)
    assert net.a.bias.dtype == torch.bfloat16
    corrections.set(model.ops["a"], FLOAT)
    assert torch.equal(net.a.bias, net_of().to(torch.bfloat16).a.bias)


def test_a_bias_of_two_modules_is_not_corrected(model: InstrumentedModel) -> None:
    net = net_of()
    net.b.bias = net.a.bias
    own = net.a.bias.detach().clone()
    corrections = BiasCorrections(net)
    corrections.correction = shift
    assert not corrections.is_own("a")
    with pytest.raises(PlanError, match="shares its bias with another module"):
        corrections.set(model.ops["a"], CORRECTED)
    corrections.set(model.ops["a"], FLOAT)
    assert torch.equal(net.a.bias, own)


def test_a_module_with_two_names_has_its_bias_alone() -> None:
    net = net_of()
    net.again = net.a
    assert BiasCorrections(net).is_own("a")
