"""What prepare_qat() refuses, and how it says so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import Functional, Tied, inputs_for, seeded
from tests.tuner.training.tasks import CONFIG, INPUTS, WEIGHTS, Perceptron, batches, prepared
from tuner import OpConfig, PerChannel, Plan, Rule, TensorScheme, quantization
from tuner.errors import (
    DataError,
    ModelError,
    PlanError,
    SpaceError,
    TunerError,
    UnknownNameError,
)
from tuner.trainable_model import parameter_groups
from tuner.trainable_preparation import prepare_qat


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "lqs"}, UnknownNameError, "unknown method 'lqs'. Did you mean"),
        ({"init": "mse"}, UnknownNameError, "unknown init 'mse'"),
        ({"quant_start_step": -1}, TunerError, "quant_start_step is -1"),
        ({"quant_start_step": True}, TunerError, "quant_start_step is True"),
        ({"ema_decay": 1.5}, TunerError, "ema_decay is 1.5"),
        ({"plan": {"first": CONFIG}}, TunerError, "plan is a dict"),
        ({"plan": Plan({"first": CONFIG})}, TunerError, "a plan and schemes"),
        ({"weights": "int44"}, UnknownNameError, "int44"),
        ({"weights": None, "inputs": None}, SpaceError, "nothing would be quantized"),
        ({"rules": Rule(options=[CONFIG])}, TunerError, "rules is a Rule"),
        ({"rules": [CONFIG]}, TunerError, "rules holds a OpConfig"),
        ({"rules": [Rule(names=["x*"], options=[CONFIG])]}, SpaceError, "unknown op name"),
        ({"calib_samples": 3}, TunerError, "give calib_dataloader"),
        ({"forward": "x"}, TunerError, "forward is a str"),
        ({"inputs": TensorScheme(granularity=PerChannel(1))}, DataError, "give calib_dataloader"),
        (
            {"method": "lsq", "weights": "mxfp4", "inputs": TensorScheme(dynamic=True)},
            TunerError,
            "no scale to learn",
        ),
    ],
)
def test_arguments(options: dict[str, Any], error: type[TunerError], message: str) -> None:
    with pytest.raises(error, match=message):
        prepared(Perceptron(), None, **options)


def test_models() -> None:
    with pytest.raises(ModelError, match="a str"):
        prepare_qat("net", weights="int8")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="requires a gradient"):
        prepared(Perceptron().requires_grad_(False), None)
    with pytest.raises(TunerError, match="TrainableModel already"):
        prepare_qat(prepared(Perceptron(), None))
    fitted = quantization.fit(Perceptron(), batches(), progress=False)
    with pytest.raises(TunerError, match="source has a plan"):
        prepare_qat(fitted, weights=WEIGHTS)
    with pytest.raises(TunerError, match="model is a Perceptron"):
        parameter_groups(Perceptron(), 0.1)  # type: ignore[arg-type]


def test_plans_for_another_architecture() -> None:
    with pytest.raises(PlanError, match="'third', which is no op"):
        prepare_qat(Perceptron(), Plan({"first": CONFIG, "third": CONFIG}))
    net = seeded(Functional)
    with pytest.raises(PlanError, match="calib_dataloader only"):
        prepare_qat(net, Plan({"/linear:0": CONFIG}))
    model = prepare_qat(net, Plan({"/linear:0": CONFIG}), [inputs_for(net)])
    assert set(model.quantizers) == {"/linear:0:input0", "weight:w"}


def test_tied_weights_take_one_scheme() -> None:
    net = seeded(Tied)
    with pytest.raises(PlanError, match="share the weight"):
        prepare_qat(net, Plan({"head": OpConfig(weight=WEIGHTS)}), [inputs_for(net)])


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="'0' has sparse gradients"):
        prepared(net, [torch.arange(5)])
    assert prepare_qat(net, calib_dataloader=[torch.arange(5)], inputs="int8").is_ready


def test_parameters_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.Parameter(torch.randn(3, 6))
            self.training_ = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.training_(nn.functional.linear(x, self.keys))  # type: ignore[no-any-return]

    assert "weight:keys" in prepared(Named(), batches()).quantizers


def test_a_model_without_data_learns_ranges_from_what_it_trains_on() -> None:
    model = prepare_qat(Perceptron(), inputs=INPUTS, weights=WEIGHTS, method="lsq")
    model.eval()
    with pytest.raises(DataError, match="training mode first"):
        model(batches()[0])
    model.train()
    model(batches()[0])
    model.eval()
    assert torch.isfinite(model(batches()[0])).all()


def test_data_that_the_model_refuses() -> None:
    with pytest.raises(DataError, match="refused calibration batch 0"):
        prepared(Perceptron(), [torch.randn(2, 5)])
    with pytest.raises(DataError, match="empty"):
        prepared(Perceptron(), [])


def test_forward_says_how_to_call_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    model = prepared(Named(), batches(), forward=lambda net, batch: net(x=batch))
    assert model.feed(batches()[0]).shape == (8, 2)
