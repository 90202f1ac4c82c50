"""The target `calibration`: ranges as JSON, and TensorRT's calibration cache."""

import hashlib
import json
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import ExportRequest
from tuner.exporters.calibration import CalibrationExporter, TensorRange, cache_text, scale_hex
from tuner.exporters.report import ExportReport
from tuner.exporters.tracing import trace
from tuner.quantized_model import QuantizedModel

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
DYNAMIC = TensorScheme(format="int8", dynamic=True)


class Net(nn.Module):
    """Three layers, two of which read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(x))
        return {"sum": self.b(h) + self.c(h)}


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


@cache
def model() -> QuantizedModel:
    space = SearchSpace(
        preset="int8",
        rules=[
            Rule(names=["a"], options=[OpConfig(weight=W4, inputs=A8, output=A8)]),
            Rule(names=["b"], options=[OpConfig(weight=W4, inputs=A8)]),
            Rule(names=["c"], options=[OpConfig(weight=W4, inputs=DYNAMIC)]),
        ],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantization.fit(Net().eval(), [X], config=TuningConfig(space=space))


def exported(path: Path, **options: int) -> ExportReport:
    parts = model()._parts
    traced = trace(parts.model, Example.of_batch(model().model, X))
    request = ExportRequest(traced, model().plan, dict(parts.model.ops), path)
    return CalibrationExporter(**options).export(request)


def test_every_weight_input_and_output_has_its_range(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    read = json.loads((tmp_path / "out" / "ranges.json").read_text())
    assert (read["format"], read["version"]) == ("accutune-calibration", 1)
    assert read["model_inputs"] == ["x"]
    assert read["model_outputs"] == ["sum"]
    found = {each["name"]: each for each in read["tensors"]}
    assert list(found) == [
        "a.weight", "b.weight", "c.weight", "a.input0", "a.output", "b.input0", "c.input0"
    ]  # fmt: skip
    assert {name: each["bits"] for name, each in found.items()}["a.weight"] == 4
    weight = model().model.a.weight.detach()
    scale = torch.tensor(found["a.weight"]["scale"])
    assert torch.equal(weight.div(scale[:, None]).round().abs().amax(1), torch.full((8,), 7.0))
    assert found["a.weight"]["max"] == pytest.approx((7 * scale).tolist())
    assert report.files == (tmp_path / "out/ranges.json", tmp_path / "out/calibration.cache")
    cache = (tmp_path / "out/calibration.cache").read_bytes()
    assert read["cache_sha256"] == hashlib.sha256(cache).hexdigest()
    assert report.latency == ()
    assert report.agreement is None


def test_the_ends_of_a_range_are_what_the_grid_reaches(tmp_path: Path) -> None:
    exported(tmp_path / "out")
    read = json.loads((tmp_path / "out" / "ranges.json").read_text())
    found = {each["name"]: each for each in read["tensors"]}["a.input0"]
    quantizer = model()._parts.model.runtime.sites["a"].inputs[0]
    ends = quantizer(torch.tensor([-1e6, 1e6]))
    assert [found["min"], found["max"]] == pytest.approx(ends.tolist())
    assert found["tensor"] == "x"


def test_scales_from_the_data_are_null(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    read = json.loads((tmp_path / "out" / "ranges.json").read_text())
    found = {each["name"]: each for each in read["tensors"]}["c.input0"]
    assert [found[k] for k in ("scale", "zero_point", "min", "max")] == [None] * 4
    assert any("1 activations take their scale from the data" in note for note in report.notes)


def test_the_cache_has_the_widest_range_of_each_tensor(tmp_path: Path) -> None:
    exported(tmp_path / "out", tensorrt_version=100900)
    header, *lines = (tmp_path / "out" / "calibration.cache").read_text().splitlines()
    assert header == "TRT-100900-EntropyCalibration2"
    cached = {}
    for line in lines:
        name, _, digits = line.partition(": ")
        cached[name] = struct.unpack("!f", bytes.fromhex(digits))[0]
    assert list(cached) == ["x", "linear", "relu"]  # the output of a is the node behind it
    ranges = json.loads((tmp_path / "out" / "ranges.json").read_text())["tensors"]
    first = next(each for each in ranges if each["name"] == "a.input0")
    widest = max(-first["min"], first["max"])
    assert cached["x"] == pytest.approx(widest / 127, rel=1e-6)


def test_hexadecimal_scales_are_those_of_tensorrt() -> None:
    # a pair that ONNX Runtime documents for its TensorRT tables
    assert scale_hex(2.008338212966919) == "4000889d"
    assert scale_hex(1.0) == "3f800000"
    assert scale_hex(1 / 127.0).startswith("3c0")


def test_two_ranges_of_one_tensor_become_the_widest() -> None:
    def row(low: float, high: float) -> TensorRange:
        return TensorRange("n", "o", "input", 0, "t", "int8", 8, 1.0, 0, low, high)

    text = cache_text([row(-1.0, 2.0), row(-127.0, 3.0), row(0.0, 5.0)], 8601)
    assert text == "TRT-8601-EntropyCalibration2\nt: 3f800000\n"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        exported(tmp_path / "file" / "out")


def test_every_choice_has_a_range() -> None:
    ops = model()._parts.model.ops
    assert CalibrationExporter().why_not(ops["a"], OpConfig(weight=W4)) is None


def test_ranges_are_no_share_of_the_model(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    assert report.size_ratio is None
    assert "of FP32" not in report.summary()
    assert report.to_dict()["float_size_bytes"] is None


def test_an_input_called_like_an_op_has_a_range_of_its_own(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, relu: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(relu)))

    torch.manual_seed(0)
    tuned = quantization.fit(Named().eval(), [100 * X], config=TuningConfig())
    tuned.export(tmp_path, target="calibration", batches=())
    _, *lines = (tmp_path / "calibration.cache").read_text().split()
    scales = {key.rstrip(":"): value for key, value in zip(lines[::2], lines[1::2], strict=True)}
    found, inner = (
        struct.unpack(">f", bytes.fromhex(scales[name]))[0] for name in ("relu", "relu_within")
    )
    # the range of an affine scheme ends at a code
    assert found == pytest.approx(100 * X.abs().max().item() / 127, rel=0.01)
    assert inner < 0.8 * found
