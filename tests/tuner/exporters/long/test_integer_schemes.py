"""The target `integer`: schemes of all kinds, biases, the width of sums, ONNX Runtime beside it."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file
from torch import nn

from tests.tuner.exporters.integer_nets import (
    A8,
    INT8,
    INT16,
    W8,
    Net,
    Words,
    exported,
    fitted,
    graph_of,
    image,
    layer_by_layer,
    rules,
    tokens,
)
from tuner import OpConfig, PerChannel, PerGroup, Rule, SearchSpace, TensorScheme
from tuner.exporters.integer_runner import Runner

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
AFFINE_W8 = W8.model_copy(update={"symmetric": False})
SPACES = {
    "dynamic": "int8-dynamic",
    "one": layer_by_layer(
        stem=OpConfig(weight=W8, inputs=INT8),
        depthwise=OpConfig(weight=INT8, inputs=A8),
        grouped=OpConfig(weight=AFFINE_W8, inputs=A8),
        up=OpConfig(weight=INT8, inputs=TensorScheme(format="uint8")),
        head=OpConfig(weight=W4, inputs=A8, output=A8),
    ),
    "two": layer_by_layer(
        stem=OpConfig(weight=W8, inputs=INT16),
        depthwise=OpConfig(weight=W8, inputs=A8.model_copy(update={"dynamic": True})),
        grouped=OpConfig(weight=W8, inputs=A8, output=A8),
        up=OpConfig(weight=W8, inputs=A8),
        head=OpConfig(weight=INT16, inputs=INT16),
    ),
}
INT32_BIAS = OpConfig(weight=W8, inputs=A8, bias=TensorScheme(format="int32"))


@pytest.mark.parametrize("name", SPACES)
def test_every_kind_of_integers_agrees(name: str, folder: Path) -> None:
    report = exported(fitted(Net(), image(16), SPACES[name]), image(), folder)
    assert all(layer.max_steps <= 1 for layer in report.layers)
    assert report.agreement is not None
    assert report.agreement.max_abs < 0.1
    found = torch.from_numpy(Runner(folder).run(image().numpy())[0])
    assert found.isfinite().all()


def test_scales_that_vary_where_products_are_summed_leave_an_op_float(folder: Path) -> None:
    space = rules(weight=W8, inputs=TensorScheme(granularity=PerChannel(1)))
    report = exported(fitted(Net(), image(16), space), image(), folder)
    reasons = {left.op: left.reason for left in report.left_float}
    assert "several scales where products are summed" in reasons["stem"]
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-3


def test_weights_alone_stay_integers_in_the_file(folder: Path) -> None:
    grouped = TensorScheme(format="int4", granularity=PerGroup(4))
    model = fitted(Words(), tokens(16), SearchSpace(
        preset="int8", rules=[Rule(op_types=["Linear"], options=[OpConfig(weight=grouped)])]
    ))  # fmt: skip
    report = exported(model, tokens(), folder)
    tensors = load_file(folder / "weights.safetensors")
    assert tensors["up.weight.codes"].dtype == np.int8
    assert np.abs(tensors["up.weight.codes"]).max() <= 8
    assert tensors["up.weight.scale"].shape == (32, 4)
    reasons = {left.op: left.reason for left in report.left_float}
    assert reasons["up"] == "its input is float: its weight is kept as integers"


def test_int32_biases_of_the_plan_are_what_is_written(folder: Path) -> None:
    up = INT32_BIAS.model_copy(update={"weight": INT8})
    space = layer_by_layer(stem=INT32_BIAS, depthwise=INT32_BIAS, up=up, head=INT32_BIAS)
    model = fitted(Net(), image(16), space)
    report = exported(model, image(), folder)
    assert report.layers[-1].equal == 1  # floats of sums whose biases are not rounded anew
    tensors = load_file(folder / "weights.safetensors")
    node = next(n for n in graph_of(folder)["nodes"] if n["op"] == "integer.conv")
    codes = tensors[node["bias"]]
    source = next(n for n in graph_of(folder)["nodes"] if n.get("quantizer") == "stem|0")
    steps = np.float64(source["scale"]) * tensors["stem.weight.scale"].astype(np.float64)
    assert codes.dtype == np.int32
    np.testing.assert_allclose(codes * steps, model.model.stem.bias.detach(), rtol=1e-6, atol=0)


def test_biases_of_eight_bits_keep_their_own_scale(folder: Path) -> None:
    bias = TensorScheme(format="int8", calibration="mse")
    model = fitted(Net(), image(16), SearchSpace(preset="int8", rules=[
        Rule(names=["head"], options=[OpConfig(weight=W8, inputs=A8, bias=bias)])
    ]))  # fmt: skip
    report = exported(model, image(), folder)
    node = next(n for n in graph_of(folder)["nodes"] if n["op"] == "integer.linear")
    tensors = load_file(folder / "weights.safetensors")
    codes = tensors[node["bias"]]
    assert codes.dtype == np.int8
    values = model.model.head.bias.detach().numpy()
    largest = np.abs(values).argmax()
    np.testing.assert_allclose(codes * (values[largest] / codes[largest]), values, atol=1e-6)
    assert report.agreement is not None
    assert report.agreement.max_abs < 0.05


def worst_of_head(folder: Path) -> int:
    """Return the worst sum, from a product of absolute codes by torch."""
    nodes, tensors = graph_of(folder)["nodes"], load_file(folder / "weights.safetensors")
    source = next(n for n in nodes if n.get("quantizer") == "head|0")
    reach = max(255 - source["zero_point"], source["zero_point"])
    codes, bias = torch.from_numpy(tensors["head.weight.codes"]).long(), tensors["linear.bias"]
    worst = (codes.abs() @ torch.full((6,), reach)) + torch.from_numpy(bias).long().abs()
    return int(worst.max())


def test_the_width_of_accumulators_is_enough_and_no_more(net_folder: Path) -> None:
    layers = {each["op"]: each for each in graph_of(net_folder)["layers"]}
    worst = worst_of_head(net_folder)
    assert layers["head"]["largest_sum"] == worst
    assert layers["head"]["accumulator_bits"] == len(f"{worst:b}") + 1
    widest = max(each["accumulator_bits"] for each in layers.values())
    enough = Runner(net_folder, accumulator_bits=widest)
    exact = Runner(net_folder).run(image().numpy())[0]
    assert np.array_equal(
        enough.run(10 * image().numpy())[0], Runner(net_folder).run(10 * image().numpy())[0]
    )
    assert enough.overflowed == {}
    for overflow in ("wrap", "saturate"):
        narrow = Runner(net_folder, accumulator_bits=12, overflow=overflow)
        assert not np.array_equal(narrow.run(image().numpy())[0], exact)
        assert narrow.overflowed


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_a_reduced_range_keeps_pairs_of_products_within_16_bits(
    overflow: str, folder: Path
) -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(3))
    counts = {}
    for reduced in (False, True):
        weight = W8.model_copy(update={"reduce_range": reduced})
        model = fitted(nn.Sequential(nn.Linear(32, 8)), x, rules(weight=weight, inputs=A8))
        where = folder / str(reduced)
        exported(model, x, where)
        pairs = Runner(where, 16, overflow, pairs=True)
        found, exact = pairs.run(x.numpy())[0], Runner(where).run(x.numpy())[0]
        counts[reduced] = sum(pairs.overflowed.values())
        assert np.array_equal(found, exact) is reduced
    assert counts[False] > 0
    assert counts[True] == 0


def test_a_layer_is_that_of_onnx_runtime(folder: Path) -> None:
    """QLinearConv takes the same codes, scales, zero points and int32 biases.

    Weights are moved to unsigned codes, of which no kernel's sums overflow.
    """
    two = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, groups=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = fitted(two, image(16))
    exported(model, image(), folder)
    graph, tensors = graph_of(folder), load_file(folder / "weights.safetensors")
    quantize, requantize = (
        next(n for n in graph["nodes"] if n.get("quantizer") == key) for key in ("0|0", "2|0")
    )
    conv = next(n for n in graph["nodes"] if n["op"] == "integer.conv")
    reached: dict = {}
    Runner(folder).run(image().numpy(), reached=reached)
    node = helper.make_node(
        "QLinearConv",
        ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"],
        ["y"],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
    )
    codes = [n["low"] >= 0 for n in (quantize, requantize)]
    kinds = [np.uint8 if unsigned else np.int8 for unsigned in codes]
    constants = {
        "xs": np.float32(quantize["scale"]), "xz": kinds[0](quantize["zero_point"]),
        "w": (tensors["0.weight.codes"].astype(np.int16) + 128).astype(np.uint8),
        "ws": tensors["0.weight.scale"], "wz": np.full(8, 128, np.uint8),
        "ys": np.float32(requantize["scale"]), "yz": kinds[1](requantize["zero_point"]),
        "b": tensors[conv["bias"]],
    }  # fmt: skip
    found = onnx_run(node, constants, reached[quantize["name"]].codes.astype(kinds[0]), kinds[1])
    clamped = np.clip(found.astype(int), requantize["low"], requantize["high"])
    difference = np.abs(reached[requantize["name"]].codes - clamped)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999
    once = reached[requantize["name"]].codes
    Runner(folder, round_twice=True).run(image().numpy(), reached=reached)
    twice = reached[requantize["name"]].codes
    assert np.abs(twice - once).max() == 1
    assert (twice != clamped).mean() > (once != clamped).mean()


def onnx_run(node: object, constants: dict, x: np.ndarray, kind: type) -> np.ndarray:
    initializers = [
        helper.make_tensor(
            name,
            helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype),
            np.asarray(value).shape,
            np.asarray(value).tobytes(),
            raw=True,
        )
        for name, value in constants.items()
    ]
    types = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", types[x.dtype.type], x.shape)],
        [helper.make_tensor_value_info("y", types[kind], None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


A4 = TensorScheme(format="uint4", symmetric=False)
W2 = TensorScheme(format="int2", granularity=PerChannel(0), calibration="mse")


def few_bits(bias: TensorScheme | None) -> tuple[nn.Module, torch.Tensor, SearchSpace]:
    """Return layers whose biases are small beside steps of products of 2 by 4 bits."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    coarse = OpConfig(weight=W2, inputs=A4, bias=bias)
    rules = [Rule(names=[n], options=[c]) for n, c in (("0", coarse), ("1", INT8_BOTH))]
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), x, SearchSpace(rules=rules)


INT8_BOTH = OpConfig(weight=W8, inputs=A8)


@pytest.mark.parametrize("bias", [None, "int8"])
def test_biases_are_no_coarser_than_of_8_by_8_bits(bias: str | None, folder: Path) -> None:
    net, x, space = few_bits(None if bias is None else TensorScheme(format=bias))
    model = fitted(net, x, space)
    report = exported(model, x, folder)
    assert report.layers[-1].equal > 0.98
    graph = graph_of(folder)
    first, second = (n for n in graph["nodes"] if n["op"] == "integer.linear")
    assert first["left_shift"] > 6
    assert "left_shift" not in second
    assert graph["version"] == 2
    exact = Runner(folder).run(x.numpy())[0]
    for overflow in ("wrap", "saturate"):
        held = Runner(folder, max(n["accumulator_bits"] for n in (first, second)), overflow)
        assert np.array_equal(held.run(x.numpy())[0], exact)
        assert not held.overflowed
    torch.testing.assert_close(torch.from_numpy(exact), model(x).detach(), rtol=0, atol=0.02)


def test_biases_that_the_plan_counts_in_coarse_steps_stay_in_them(folder: Path) -> None:
    net, x, space = few_bits(TensorScheme(format="int32"))
    report = exported(fitted(net, x, space), x, folder)
    assert report.layers[-1].equal == 1
    graph = graph_of(folder)
    assert graph["version"] == 1
    assert not any("left_shift" in node for node in graph["nodes"])
