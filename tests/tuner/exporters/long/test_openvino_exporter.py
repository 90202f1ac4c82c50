"""The openvino target: the same file, OpenVINO's kernels, and what it says of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.tuner.exporters.long.test_onnx_graph import Tokens
from tests.tuner.exporters.onnx_nets import (
    A8,
    W8,
    Attention,
    Branches,
    Exported,
    exported,
    floats,
    int8,
    only,
    request,
    scheme,
    tokens,
)
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
from tuner.exporters.openvino_exporter import OpenVinoExporter
from tuner.exporters.openvino_graph import fusible
from tuner.exporters.openvino_kernels import why_not_in_openvino
from tuner.exporters.openvino_runtime import OpenVinoSession
from tuner.exporters.targets import exporter

A4 = scheme("uint4", symmetric=False)
ENDS = OpConfig(weight=W8, inputs=A8, output=A8)


class Scores(nn.Module):
    def __init__(self, is_negative: bool = True) -> None:
        super().__init__()
        self.first = nn.Tanh() if is_negative else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ torch.sin(x).transpose(-1, -2)


def behind(module: nn.Module) -> nn.Module:
    """Give a module an input of its own: OpenVINO has one precision for all that read a tensor."""
    return nn.Sequential(nn.Tanh(), module)


CASES: Mapping[str, tuple[nn.Module, str, OpConfig, bool]] = {
    "plain": (nn.Linear(32, 24), "", OpConfig(weight=W8, inputs=A8), True),
    "few": (
        nn.Linear(32, 24),
        "",
        OpConfig(weight=scheme("int4", PerChannel(0)), inputs=A4),
        True,
    ),
    "conv": (behind(nn.Conv1d(6, 6, 3)), ".1", ENDS, True),
    "few_conv": (
        behind(nn.Conv1d(6, 6, 3)),
        ".1",
        OpConfig(weight=scheme("int4", PerChannel(0)), inputs=A4, output=A4),
        True,
    ),
    "zeros": (
        nn.Linear(32, 24),
        "",
        OpConfig(weight=scheme("uint8", PerChannel(0), symmetric=False), inputs=A8),
        False,
    ),
    "groups": (
        nn.Linear(32, 24),
        "",
        OpConfig(weight=scheme("int8", PerGroup(16, -1)), inputs=A8),
        False,
    ),
    "wide": (nn.Linear(32, 24), "", OpConfig(weight=W8, inputs=scheme("int16")), False),
    "unsigned": (
        Scores(False),
        "/matmul:0",
        OpConfig(inputs=(A8, scheme("int8", reduce_range=W8.reduce_range))),
        True,
    ),
    "signed": (Scores(), "/matmul:0", OpConfig(inputs=scheme("int8")), False),
    "affine": (Scores(False), "/matmul:0", OpConfig(inputs=A8), False),
    "transposed": (
        nn.ConvTranspose1d(6, 6, 2),
        "",
        OpConfig(
            weight=scheme("int8", PerChannel(1), reduce_range=W8.reduce_range), inputs=A8, output=A8
        ),
        False,
    ),
}


@pytest.fixture(scope="module", params=[True, False])
def tried(request: pytest.FixtureRequest) -> tuple[Exported, OpenVinoSession]:
    """Export what is expected to be of integers, then what is not: one may change the other."""
    torch.manual_seed(0)
    names = [name for name, (*_, is_integer) in CASES.items() if is_integer == request.param]
    configs = {f"{name}{CASES[name][1]}": CASES[name][2] for name in names}
    branches = {name: CASES[name][0] for name in names}
    model = exported(Branches(**branches), floats(3, 6, 32), only(configs), clips_values=True)
    session = OpenVinoSession(fusible(model.model).to_bytes())
    session.run(model.traced.example.tensors)
    return model, session


def test_the_table_says_which_products_are_of_integers(
    tried: tuple[Exported, OpenVinoSession],
) -> None:
    model, session = tried
    ops = model.quantized._parts.model.ops
    names = list(model.traced.outputs)
    expected = []
    for name in names:
        _, op, config, is_integer = CASES[name]
        why = why_not_in_openvino(ops[f"{name}{op}"], config)
        assert (why is None) == is_integer, (name, why)
        expected.append(is_integer)
    assert sorted(kernel.is_integer for kernel in session.products()) == sorted(expected)


def test_openvino_gives_what_is_simulated(tried: tuple[Exported, OpenVinoSession]) -> None:
    model, session = tried
    inputs = model.traced.example.tensors
    for name, expected, found in zip(
        model.traced.outputs, model.traced.simulate(*inputs), session.run(inputs), strict=True
    ):
        steps = 1 / 7 if name == "few_conv" else 1 / 100
        assert (found - expected).abs().max() < steps * expected.abs().max(), name


def test_a_report_from_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Branches(plain=nn.Linear(32, 256), alone=nn.Conv1d(6, 64, 3), table=nn.Linear(32, 256))
    space = only({"plain": CASES["plain"][2], "alone": OpConfig(weight=W8)})
    asked = request(net, floats(3, 6, 32), tmp_path, space, batches=(2,))
    report = exporter("openvino").export(asked)
    assert report.target == "openvino"
    assert report.files == (tmp_path / "model.onnx",)
    assert {entry.op for entry in report.left_float} == {"alone"}
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-4
    assert [entry.batch for entry in report.latency] == [2]
    assert report.latency[0].baselines_ms["FP32 in ONNX Runtime"] > 0
    notes = "\n".join(report.notes)
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE=0: give them to compile_model" in notes


def test_weights_alone_are_exact_and_inputs_stay_float(tmp_path: Path) -> None:
    asked = request(Tokens(), tokens(), tmp_path, "int4-weight-only", batches=())
    report = OpenVinoExporter().export(asked)
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-4
    ids = tokens(2, 9)
    found = OpenVinoSession(report.files[0]).run([ids])[0]
    torch.testing.assert_close(found, asked.traced.simulate(ids)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fmt", "group"), [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 128), ("int8", None)]
)
def test_weights_alone_stay_in_their_codes(fmt: str, group: int | None, tmp_path: Path) -> None:
    reach = PerChannel(0) if group is None else PerGroup(group, -1)
    net = nn.Sequential(nn.Linear(256, 512))
    space = only({"0": OpConfig(weight=scheme(fmt, reach))})
    asked = request(net, floats(2, 256), tmp_path, space, batches=())
    report = OpenVinoExporter().export(asked)
    assert report.left_float == ()
    assert 0 < (report.size_ratio or 0) < (0.2 if fmt == "int4" else 0.3)
    session = OpenVinoSession(report.files[0])
    session.run(asked.traced.example.tensors)
    (kernel,) = session.products()
    assert kernel.weight == fmt.replace("int", "i")
    assert not kernel.is_integer


def test_rows_of_a_table_of_four_bits_are_looked_up_exactly(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 8))
    report = OpenVinoExporter().export(request(model, tokens(), tmp_path, "int4-weight-only"))
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-5


def test_a_product_keeps_its_bias_and_what_follows_in_one_kernel(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    asked = request(net, floats(4, 3, 32), tmp_path, int8(net), batches=())
    report = OpenVinoExporter().export(asked)
    session = OpenVinoSession(report.files[0])
    session.run(asked.traced.example.tensors)
    first, second = session.products()
    assert first.is_integer
    assert second.is_integer
    for what in ("add", "gelu", "quantize"):
        assert any(what in node for node in first.nodes), what
    assert any("output" in node for node in second.nodes)


def test_attention_stays_float_for_openvino_and_says_why(tmp_path: Path) -> None:
    config = TuningConfig(target="openvino")
    model = quantization.fit(Attention(True).eval(), [floats(3, 5, 16)], config=config)
    assert {name for name, each in model.plan.items() if not each.is_float} == {"qkv", "out"}
    report = model.export(tmp_path, target="openvino", batches=())
    assert report.left_float == ()
    assert any("attention in FP32 is the faster one" in note for note in report.notes)


def test_quantized_attention_agrees_and_is_listed_as_float(tmp_path: Path) -> None:
    net = Attention(True)
    asked = request(net, floats(3, 5, 16), tmp_path, int8(net), batches=())
    report = OpenVinoExporter().export(asked)
    assert len(report.layers) >= 5
    assert max(layer.max_steps for layer in report.layers) <= 1
    (left,) = report.left_float
    assert left.op == "/scaled_dot_product_attention:0"
    assert "attention in FP32 is the faster one" in left.reason


def test_products_of_activations_agree_one_by_one(tmp_path: Path) -> None:
    net = Tokens()
    asked = request(net, tokens(), tmp_path, int8(net), batches=())
    report = OpenVinoExporter().export(asked)
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert {left.op for left in report.left_float} == {"attention/matmul:0", "attention/matmul:1"}


def test_a_file_that_openvino_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match="OpenVINO refuses the model"):
        OpenVinoSession(path)


class Largest(nn.Module):
    """A layer behind the largest or smallest values of each channel."""

    def __init__(self, extreme: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.extreme = extreme

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.extreme(x))


@pytest.mark.parametrize(
    "extreme",
    [
        lambda x: x.amax((2, 3)),
        lambda x: x.amin((2, 3)),
        lambda x: functional.adaptive_max_pool2d(x, 1).flatten(1),
    ],
    ids=["amax", "amin", "pool"],
)
def test_extremes_are_not_rounded_while_they_are_sought(
    extreme: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8, 6, 6)
    config = TuningConfig(target="openvino")
    model = quantization.fit(Largest(extreme).eval(), [x], config=config)
    assert model.result.quantized_ops == 1
    report = model.export(tmp_path / "model.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) < 0.01


class Columns(nn.Module):
    """A layer behind a number for each column, which no other layer takes in."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 4)
        self.combine = combine
        self.numbers: Tensor
        self.register_buffer("numbers", torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.combine(torch.cat([x, x[:, :4]], 1), self.numbers))


@pytest.mark.parametrize("codes", ["uint4", "uint8"])
@pytest.mark.parametrize(
    "combine",
    [
        lambda x, numbers: x + numbers,
        lambda x, numbers: numbers - x,
        lambda x, numbers: x * numbers,
        lambda x, numbers: x * numbers + numbers,
    ],
    ids=["add", "sub", "mul", "affine"],
)
def test_numbers_of_columns_are_not_merged_into_a_quantizer(
    combine: Callable[[Tensor, Tensor], Tensor], codes: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    scheme = TensorScheme(format=codes, symmetric=False, calibration="minmax")
    w8 = TensorScheme(format="int8", granularity=PerChannel(0))
    rule = Rule(names=["layer"], options=[OpConfig(weight=w8, inputs=scheme)])
    config = TuningConfig(space=SearchSpace(preset="int8", rules=[rule]), target="openvino")
    model = quantization.fit(Columns(combine).eval(), [x], config=config)
    report = model.export(tmp_path / "model.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) < 0.01
