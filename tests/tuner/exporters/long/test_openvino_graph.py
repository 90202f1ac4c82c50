"""What is spelled for OpenVINO has the values of the plain spelling, in fewer ops."""

from collections import Counter
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import (
    A8,
    W8,
    Attention,
    Exported,
    exported,
    floats,
    only,
    scheme,
)
from tuner import OpConfig, PerChannel, PerGroup, Rule, SearchSpace
from tuner.exporters.hoisting import hoisted
from tuner.exporters.onnx_file import OnnxModel, to_onnx
from tuner.exporters.onnx_graph import qdq_graph
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.openvino_graph import fusible

STEP = 1 / 100
FLOAT_ATTENTION = SearchSpace(
    preset="int8",
    rules=[Rule(op_types=["scaled_dot_product_attention"], options=[OpConfig.float()])],
)


def rewritten(model: Exported) -> OnnxModel:
    found = fusible(OnnxModel(ir.from_proto(ir.to_proto(model.model.model))))
    onnx.checker.check_model(found.to_bytes(), full_check=True)
    return found


def counts(model: OnnxModel) -> Counter[str]:
    return Counter(node.op_type for node in model.model.graph)


def plain(model: OnnxModel, inputs: Sequence[Tensor]) -> Tensor:
    return OnnxRuntimeSession(model.to_bytes(), optimized=False).run(inputs)[0]


def assert_equal_values(model: Exported, found: OnnxModel, within: float) -> None:
    expected = plain(model.model, model.traced.example.tensors)
    apart = (plain(found, model.traced.example.tensors) - expected).abs().max()
    assert apart <= within * expected.abs().max()


class Moved(nn.Module):
    """A convolution whose output is pooled, turned and cut before it is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.max_pool1d(torch.relu(self.first(x)), 2).transpose(1, 2))


def test_a_product_with_a_bias_needs_no_further_axis() -> None:
    model = exported(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), floats(3, 5, 16))
    found = rewritten(model)
    assert counts(model.model)["Squeeze"] == counts(model.model)["Unsqueeze"] == 2
    assert counts(found)["Squeeze"] == counts(found)["Unsqueeze"] == 0
    assert_equal_values(model, found, 0)


@pytest.mark.parametrize("fmt", ["uint8", "uint4"])
def test_moved_codes_are_quantized_once(fmt: str) -> None:
    config = OpConfig(weight=W8, inputs=scheme(fmt, symmetric=False))
    space = only({"first": config, "second": config})
    traced = hoisted(exported(Moved(), floats(2, 3, 20), space).traced)
    graph = qdq_graph(traced, clips_values=True)
    model, found = to_onnx(graph.module, traced), fusible(to_onnx(graph.module, traced))
    assert counts(model)["QuantizeLinear"] == 4
    assert counts(found)["QuantizeLinear"] == 2
    assert counts(found)["Clip"] == (0 if fmt == "uint8" else 2)
    expected = plain(model, traced.example.tensors)
    torch.testing.assert_close(plain(found, traced.example.tensors), expected, atol=0, rtol=0)


def test_another_scale_is_another_quantization() -> None:
    other = scheme("uint8", symmetric=False, calibration="percentile", percentile=90.0)
    configs = {
        "0": OpConfig(weight=W8, inputs=A8, output=A8),
        "1": OpConfig(weight=W8, inputs=other),
    }
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model = exported(net, floats(3, 8), only(configs))
    found = rewritten(model)
    assert counts(found)["QuantizeLinear"] == 3
    assert_equal_values(model, found, 0)


@pytest.mark.parametrize(
    ("weight", "zeros"),
    [
        (scheme("int4", PerGroup(16, -1)), 0),
        (scheme("int8", PerChannel(0)), 0),
        (scheme("uint4", PerGroup(16, -1), symmetric=False), 1),
    ],
)
def test_zero_points_of_weights_stay_where_they_say_something(weight: object, zeros: int) -> None:
    model = exported(
        nn.Sequential(nn.Linear(32, 8)), floats(3, 32), only({"0": OpConfig(weight=weight)})
    )
    found = rewritten(model)
    (node,) = (n for n in found.model.graph if n.op_type == "DequantizeLinear")
    assert len(node.inputs) == 2 + zeros
    assert_equal_values(model, found, 0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_in_float_is_one_chain(is_causal: bool) -> None:
    x = floats(3, 5, 16)
    batch = x if is_causal else {"x": x, "mask": torch.ones(3, 5, 5).tril().bool()}
    model = exported(Attention(is_causal), batch, FLOAT_ATTENTION)
    assert counts(model.model)["IsNaN"] == (0 if is_causal else 1)
    found = rewritten(model)
    assert counts(found)["IsNaN"] == 0
    (keys,) = (node for node in found.model.graph if str(node.name).endswith("_keys"))
    assert keys.op_type == "Transpose"
    assert list(keys.attributes["perm"].as_ints()) == [0, 2, 3, 1]
    assert counts(found)["Softmax"] == 1
    assert_equal_values(model, found, STEP)


def guarded(hidden: float) -> OnnxModel:
    """Return probabilities under a mask, searched for NaN as torch.onnx does."""
    made = onnx.helper.make_node
    nodes = [
        made("Where", ["shown", "zero", "hidden"], ["mask"]),
        made("Add", ["x", "mask"], ["scores"]),
        made("Softmax", ["scores"], ["shares"]),
        made("IsNaN", ["shares"], ["empty"]),
        made("Where", ["empty", "zero", "shares"], ["p"]),
        made("Relu", ["p"], ["y"]),
    ]
    types = {"x": onnx.TensorProto.FLOAT, "shown": onnx.TensorProto.BOOL}
    ends = [onnx.helper.make_tensor_value_info(name, t, [2, 3]) for name, t in types.items()]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    numbers = {"zero": 0.0, "hidden": hidden}
    constants = [
        onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [number])
        for name, number in numbers.items()
    ]
    graph = onnx.helper.make_graph(nodes, "f", ends, [out], constants)
    opsets = [onnx.helper.make_opsetid("", 20)]
    return OnnxModel(ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets)))


@pytest.mark.parametrize(("hidden", "kept"), [(-3e38, 0), (-torch.inf, 1)])
def test_probabilities_are_searched_for_nan_where_there_may_be_one(
    hidden: float, kept: int
) -> None:
    assert counts(fusible(guarded(hidden)))["IsNaN"] == kept
