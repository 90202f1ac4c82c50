"""What simulate() refuses, and what it says then."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.tuner.nets import Functional, inputs_for, seeded
from tuner import OpConfig, PerChannel, Rule, TensorScheme, TunerError, quantization
from tuner.errors import (
    DataError,
    ModelError,
    SchemeError,
    SpaceError,
    UnknownNameError,
    UnsupportedError,
)

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def option(*configs: OpConfig, **fields: Any) -> Rule:
    return Rule(options=list(configs), **fields)


W = OpConfig(weight=W8)
REFUSED: dict[str, tuple[type[TunerError], str, dict[str, Any]]] = {
    "no module": (ModelError, "must be a torch.nn.Module", {"model": len, "weights": "int8"}),
    "nothing": (SpaceError, "give inputs, weights, outputs or rules", {}),
    "no format": (UnknownNameError, "unknown format 'int9x'", {"weights": "int9x"}),
    "no scheme": (TunerError, "inputs is a int: give a TensorScheme", {"inputs": 8}),
    "OpConfig": (TunerError, "weights is a OpConfig", {"weights": W}),
    "no data": (DataError, "is empty", {"weights": "int8", "calib_dataloader": []}),
    "a tensor": (
        DataError,
        "single Tensor",
        {"weights": "int8", "calib_dataloader": torch.ones(2, 8)},
    ),
    "bad data": (
        DataError,
        r"refused calibration batch 0 .*\[4, 9\]",
        {"weights": "int8", "calib_dataloader": [torch.randn(4, 9)]},
    ),
    "one rule": (TunerError, "rules is a Rule: give a list", {"rules": option(W)}),
    "no rule": (TunerError, "rules holds a OpConfig", {"rules": [W]}),
    "two options": (
        SpaceError,
        "a rule has 2 options.*exactly one",
        {"rules": [option(W, OpConfig.float())]},
    ),
    "no such op": (SpaceError, "nosuch", {"rules": [option(W, names=["nosuch.*"])]}),
    "no such type": (SpaceError, "Liner", {"rules": [option(W, op_types=["Liner"])]}),
    "no operand": (
        SpaceError,
        "has 1 input operands, but 2",
        {"rules": [option(OpConfig(inputs=(A8, A8)))]},
    ),
    "no axis": (
        SchemeError,
        r"^0, weight: .*axis 5 does not exist; choose one from -2 to 1",
        {"weights": TensorScheme(granularity=PerChannel(5))},
    ),
    "a repair": (UnsupportedError, "recovery", {"rules": [option(OpConfig(recovery=("gptq",)))]}),
    "forward alone": (TunerError, "give calib_dataloader", {"forward": len, "weights": "int8"}),
    "forward": (TunerError, "forward is a int", {"forward": 3, "weights": "int8"}),
    "lazy": (ModelError, "lazy modules", {"model": nn.LazyLinear(4), "weights": "int8"}),
    "no samples": (
        TunerError,
        "calib_samples is 0: give 1 or more",
        {"weights": "int8", "calib_dataloader": [torch.ones(2, 8)], "calib_samples": 0},
    ),
    "samples as text": (
        TunerError,
        "calib_samples is '3': give a whole number",
        {"weights": "int8", "calib_dataloader": [torch.ones(2, 8)], "calib_samples": "3"},
    ),
    "no ops": (
        SpaceError,
        "no op takes these.*Without calib_dataloader only modules",
        {"model": nn.ReLU(), "weights": "int8"},
    ),
    "all float": (
        SpaceError,
        r"0 \(Linear\), 2 \(Linear\)",
        {"weights": "int8", "rules": [option(OpConfig.float())]},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(case: str) -> None:
    kind, says, arguments = REFUSED[case]
    with pytest.raises(kind, match=says):
        quantization.simulate(**{"model": mlp(), **arguments})


def test_a_rule_that_would_change_nothing_is_refused() -> None:
    net = seeded(Functional)
    rule = option(W, op_types=["bmm"])
    with pytest.raises(SpaceError, match=r"a rule changes nothing: /bmm:0"):
        quantization.simulate(net, rules=[rule], calib_dataloader=[inputs_for(net)])
