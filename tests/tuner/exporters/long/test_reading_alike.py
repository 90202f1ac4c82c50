"""What convolutions and sums give is read with one scale, and so they are computed in integers."""

from pathlib import Path

import pytest
import torch

from tests.tuner.exporters.onnx_nets import scheme
from tests.tuner.test_tuning_units import Blocks, X
from tuner import OpConfig, PerChannel, Rule, SearchSpace, TuningConfig, quantization
from tuner.exporters.onnx_runtime import optimized_graph
from tuner.quantized_model import QuantizedModel

W4, W8 = scheme("int4", PerChannel(0)), scheme("int8", PerChannel(0))
A4 = scheme("uint4", symmetric=False, calibration="mse")
MIXED = {"a": OpConfig(weight=W4, inputs=A4), "short": OpConfig(weight=W8, inputs=A4)}


def fitted(target: str, **more: OpConfig) -> QuantizedModel:
    """Return a model whose block and shortcut read 4 bits, everything else 8."""
    given = {**MIXED, "b": OpConfig(weight=W4, inputs=A4), **more}
    rules = [Rule(names=[name], options=[config]) for name, config in given.items()]
    torch.manual_seed(0)
    space = SearchSpace(preset="int8", rules=rules, repairs=())
    config = TuningConfig(space=space, target=target)
    return quantization.fit(Blocks().eval(), [X], config=config)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_no_op_falls_to_float_beside_a_sum_of_a_tensor_of_fewer_bits(
    target: str, tmp_path: Path
) -> None:
    model = fitted(target)
    assert model.plan["/add:0"].input_scheme(1) == A4
    report = model.export(tmp_path / "model.onnx", target=target, batches=())
    assert all(layer.max_steps <= 1 for layer in report.layers)
    assert "stem" not in {left.op for left in report.left_float}
    if target == "onnxruntime":
        kernels = [node.op_type for node in optimized_graph(report.files[0]).node]
        assert kernels.count("QLinearConv") == 4
        assert "QLinearAdd" in kernels
        assert "Conv" not in kernels


def test_two_scales_of_one_tensor_would_cost_the_integer_kernel_that_gives_it(
    tmp_path: Path,
) -> None:
    """Why they are tied: a rule on the sum alone is the user's word, and has its price."""
    eight = OpConfig(inputs=scheme("uint8", symmetric=False, calibration="mse"))
    model = fitted("onnxruntime", **{"/add:0": eight})
    report = model.export(tmp_path / "model.onnx", target="onnxruntime", batches=())
    assert "stem" in {left.op for left in report.left_float}
