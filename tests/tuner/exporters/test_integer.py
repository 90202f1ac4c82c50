"""The target `integer`: what it writes runs without torch, and gives what the simulation gives."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file
from torch import Tensor, nn

from tuner import (
    OpConfig,
    PerChannel,
    PerGroup,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import ExportRequest
from tuner.exporters.integer_exporter import IntegerExporter
from tuner.exporters.integer_runner import Runner
from tuner.exporters.report import ExportReport
from tuner.exporters.tracing import trace
from tuner.quantized_model import QuantizedModel

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
PACKAGE = Path(__file__).parents[3] / "tuner"


class Net(nn.Module):
    """Convolutions of all kinds with clamps between them, a residual sum, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        y = nn.functional.relu6(self.depthwise(x)) + x
        y = torch.relu_(self.grouped(y))
        y = nn.functional.max_pool2d(self.up(y), 2)
        return self.head(y.mean((2, 3)))


class Words(nn.Module):
    """Embeddings and causal attention, whose lengths change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.down(nn.functional.gelu(self.up(x))) @ self.embed.weight.T


def image(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 4, length: int = 6) -> Tensor:
    return torch.randint(0, 17, (n, length), generator=torch.Generator().manual_seed(1))


def fitted(model: nn.Module, data: Tensor, space: object = "int8") -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        return quantization.fit(model.eval(), [data], config=TuningConfig(space=space))


def exported(model: QuantizedModel, data: Tensor, path: Path) -> ExportReport:
    parts = model._parts
    traced = trace(parts.model, Example.of_batch(model.model, data))
    request = ExportRequest(traced, model.plan, dict(parts.model.ops), path)
    return IntegerExporter().export(request)


def rules(**schemes: object) -> SearchSpace:
    """Return a space in which every op has this one choice."""
    return SearchSpace(preset="int8", rules=[Rule(names=["*"], options=[OpConfig(**schemes)])])


@cache
def net() -> QuantizedModel:
    return fitted(Net(), image(16))


@cache
def words() -> QuantizedModel:
    return fitted(Words(), tokens(16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def net_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return exported(net(), image(), tmp_path_factory.mktemp("net") / "out")


@pytest.fixture(scope="module")
def net_folder(net_report: ExportReport) -> Path:
    return net_report.files[0].parent


@pytest.fixture(scope="module")
def words_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return exported(words(), tokens(), tmp_path_factory.mktemp("words") / "out")


@pytest.fixture(scope="module")
def words_folder(words_report: ExportReport) -> Path:
    return words_report.files[0].parent


def graph_of(folder: Path) -> dict:
    return json.loads((folder / "graph.json").read_text())


def test_every_quantized_tensor_is_within_one_step(net_report: ExportReport) -> None:
    report = net_report
    assert [layer.name for layer in report.layers] == [
        "stem|0", "depthwise|0", "grouped|0", "up|0", "head|0"
    ]  # fmt: skip
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert [layer.equal > 0.99 for layer in report.layers[:4]] == [True] * 4
    assert report.agreement is not None
    assert report.agreement.max_abs < 0.05
    assert report.left_float == ()
    assert any("4 float biases" in note for note in report.notes)
    assert report.latency == ()
    assert report.size_bytes == sum(path.stat().st_size for path in report.files)


def test_codes_of_the_weights_are_those_of_the_simulation(net_folder: Path) -> None:
    tensors = load_file(net_folder / "weights.safetensors")
    for name, module in net().model.named_modules():
        if hasattr(module, "weight"):
            codes, scale = (tensors[f"{name}.weight.{part}"] for part in ("codes", "scale"))
            shape = [-1 if a == (name == "up") else 1 for a in range(codes.ndim)]
            assert codes.dtype == np.int8
            values = codes.astype(np.float32) * scale.reshape(shape)
            assert np.array_equal(values, module.weight.detach().numpy())


def test_what_is_behind_a_clamp_is_requantized(net_folder: Path) -> None:
    nodes = {n.get("quantizer"): n for n in graph_of(net_folder)["nodes"]}
    assert nodes["stem|0"]["op"] == "integer.quantize"
    assert nodes["depthwise|0"]["op"] == "integer.requantize"
    assert nodes["depthwise|0"]["low"] == nodes["depthwise|0"]["zero_point"]  # the ReLU
    assert nodes["up|0"]["op"] == "integer.requantize"
    assert nodes["grouped|0"]["op"] == "integer.quantize"  # of a sum in floats
    assert not any(n["op"] == "aten.relu" and n["name"] == "relu_1" for n in nodes.values())


def test_a_clamp_from_above_is_in_the_codes(folder: Path) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.clamp(self.a(x), -0.25, 0.5).view(-1, 2, 3).flatten(1))

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    report = exported(fitted(Clamped(), x), x, folder)
    found = [n for n in graph_of(folder)["nodes"] if n["op"] == "integer.requantize"]
    assert len(found) == 1
    ends = [(found[0][end] - found[0]["zero_point"]) * found[0]["scale"] for end in ("low", "high")]
    assert ends == pytest.approx([-0.25, 0.5], abs=found[0]["scale"])
    assert report.layers[-1].max_steps <= 1
    # the codes are moved as the values were
    quantizer = next(n for n in graph_of(folder)["nodes"] if n.get("quantizer") == "b|0")
    assert quantizer["op"] in ("aten.view", "aten.reshape", "aten.flatten")


def test_a_product_with_a_turned_parameter_is_requantized(folder: Path) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))
            self.last = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(x @ self.weight.T))

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    report = exported(fitted(Product(), x), x, folder)
    assert [n["op"] for n in graph_of(folder)["nodes"] if n.get("quantizer")] == [
        "integer.quantize",
        "integer.requantize",
    ]
    assert report.layers[-1].max_steps <= 1
    assert report.layers[-1].equal > 0.98
    assert report.left_float == ()


def test_bounds_for_each_channel_are_kept(folder: Path) -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.register_buffer("cap", torch.tensor([0.1, 0.3, 0.6, 2.0]).view(4, 1, 1))

        def forward(self, image: Tensor) -> Tensor:
            return self.b(torch.minimum(torch.relu(self.a(image)), self.cap))

    report = exported(fitted(Capped(), image(16)), image(), folder)
    node = next(n for n in graph_of(folder)["nodes"] if n["op"] == "integer.requantize")
    assert load_file(folder / "weights.safetensors")[node["high"]].shape == (4, 1, 1)
    assert report.layers[-1].max_steps <= 1
    assert report.layers[-1].equal > 0.99


@pytest.mark.parametrize("n", [1, 3])
def test_other_batch_sizes_run(net_folder: Path, n: int) -> None:
    found = Runner(net_folder).run(image(n, 5).numpy())[0]
    expected = net()(image(n, 5))
    assert found.shape == (n, 5)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0.05)


def test_other_lengths_run(words_report: ExportReport) -> None:
    folder = words_report.files[0].parent
    assert {left.op for left in words_report.left_float} == set()
    assert graph_of(folder)["inputs"] == [
        {"name": "tokens", "dtype": "int64", "shape": ["batch", "sequence"]}
    ]
    found = Runner(folder).run(tokens(3, 9).numpy())[0]
    expected = words()(tokens(3, 9))
    assert found.shape == expected.shape
    assert np.abs(found - expected.detach().numpy()).max() < 0.1 * expected.abs().max()


def test_rows_of_one_parameter_are_weights_of_their_own(words_folder: Path) -> None:
    kept = load_file(words_folder / "weights.safetensors")
    rows = [kept[f"attention.in_proj_weight.{start}.codes"] for start in (0, 16, 32)]
    assert [codes.shape for codes in rows] == [(16, 16)] * 3


def test_the_runner_needs_no_torch(words_folder: Path, tmp_path: Path) -> None:
    expected = Runner(words_folder).run(tokens().numpy())[0]
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    code = f"""
import sys, types
import numpy as np
for name, place in (("tuner", ""), ("tuner.exporters", "/exporters")):
    module = types.ModuleType(name)
    module.__path__ = [{str(PACKAGE)!r} + place]
    sys.modules[name] = module
sys.modules["torch"] = None
from tuner.exporters.integer_runner import Runner
runner = Runner({str(words_folder)!r})
np.save("found.npy", runner.run(np.load("tokens.npy"))[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)


def layer_by_layer(**configs: OpConfig) -> SearchSpace:
    """Return a space in which each layer has a choice of its own."""
    each = [Rule(names=[name], options=[config]) for name, config in configs.items()]
    return SearchSpace(preset="int8", rules=each)


INT8, INT16 = TensorScheme(format="int8"), TensorScheme(format="int16")
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
    assert not any("float biases" in note for note in report.notes)
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


def width_of_head(folder: Path) -> int:
    """Return the bits of the worst sum, of a product of absolute codes by torch."""
    nodes, tensors = graph_of(folder)["nodes"], load_file(folder / "weights.safetensors")
    source = next(n for n in nodes if n.get("quantizer") == "head|0")
    reach = max(255 - source["zero_point"], source["zero_point"])
    codes, bias = torch.from_numpy(tensors["head.weight.codes"]).long(), tensors["linear.bias"]
    worst = (codes.abs() @ torch.full((6,), reach)) + torch.from_numpy(bias).long().abs()
    return len(bin(int(worst.max()))) - 2 + 1


def test_the_width_of_accumulators_is_enough_and_no_more(net_folder: Path) -> None:
    stated = {each["op"]: each["accumulator_bits"] for each in graph_of(net_folder)["layers"]}
    widest = max(stated.values())
    assert stated["head"] == width_of_head(net_folder)
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
    """QLinearConv takes the same codes, scales, zero points and int32 biases."""
    two = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, groups=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = fitted(two, image(16))
    exported(model, image(), folder)
    graph, tensors = graph_of(folder), load_file(folder / "weights.safetensors")
    quantize, requantize = (
        next(n for n in graph["nodes"] if n.get("quantizer") == key) for key in ("0|0", "2|0")
    )
    conv = next(n for n in graph["nodes"] if n["op"] == "integer.conv")
    reached: dict = {}
    Runner(folder, round_once=True).run(image().numpy(), reached=reached)
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
        "w": tensors["0.weight.codes"], "ws": tensors["0.weight.scale"], "wz": np.zeros(8, np.int8),
        "ys": np.float32(requantize["scale"]), "yz": kinds[1](requantize["zero_point"]),
        "b": tensors[conv["bias"]],
    }  # fmt: skip
    found = onnx_run(node, constants, reached[quantize["name"]].codes.astype(kinds[0]), kinds[1])
    clamped = np.clip(found.astype(int), requantize["low"], requantize["high"])
    difference = np.abs(reached[requantize["name"]].codes - clamped)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999


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


def test_an_op_that_the_runner_lacks_is_named(folder: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.a(x))

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    model = fitted(Odd(), x)
    with pytest.raises(ExportError, match=r"special_bessel_j0.*it knows .*softmax"):
        exported(model, x, folder)
    assert not folder.exists()


def test_inputs_that_are_no_integers_are_refused_by_name(folder: Path) -> None:
    space = rules(weight=W8, inputs=TensorScheme(format="e4m3fn"))
    with pytest.raises(ExportError, match=r"e4m3fn is no format of uniform integers.*stem"):
        exported(fitted(Net(), image(16), space), image(), folder)


def test_weights_that_are_no_integers_are_left_float(folder: Path) -> None:
    space = rules(weight=TensorScheme(format="e4m3fn", granularity=PerChannel(0)))
    report = exported(fitted(Net(), image(16), space), image(), folder)
    assert {left.op for left in report.left_float} == {"stem", "depthwise", "grouped", "up", "head"}
    assert "e4m3fn is no format of uniform integers" in report.left_float[0].reason
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-4


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        exported(net(), image(), tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_format_is_no_graph(folder: Path) -> None:
    exported(net(), image(), folder)
    graph = graph_of(folder)
    (folder / "graph.json").write_text(json.dumps({**graph, "version": 2}))
    with pytest.raises(ValueError, match="no graph of the format accutune-integer 1"):
        Runner(folder)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (OpConfig(), None),
        (OpConfig(weight=W8, inputs=A8), None),
        (OpConfig(weight=W8), "quantize its inputs too"),
        (OpConfig(weight=W8, inputs=TensorScheme(format="mxfp8_e4m3")), "mxfp8_e4m3"),
        (OpConfig(weight=TensorScheme(format="nf4"), inputs=A8), "nf4"),
    ],
)
def test_what_a_target_can_do_is_said_before(config: OpConfig, part: str | None) -> None:
    why = IntegerExporter().why_not(net()._parts.model.ops["stem"], config)
    assert (why is None) if part is None else (part in why)
