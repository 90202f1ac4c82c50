"""A package agrees with the simulation, runs integer kernels, and leaves its inputs alone."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.torch_nets import A8, S8, TOKEN, W8
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
from tuner.exporters import torch_exporter
from tuner.exporters.base import ExportRequest
from tuner.exporters.report import ExportReport
from tuner.exporters.torch_exporter import TorchExporter, checked
from tuner.exporters.torch_package import has_compiler, load_package
from tuner.exporters.tracing import Traced, trace

# clips a good part of what comes in
A4 = TensorScheme(format="uint4", symmetric=False, calibration="percentile", percentile=80)

needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler: packages are NOT tested here"
)


class Cnn(nn.Module):
    """One input channel, signed and four-bit activations, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.signed = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.signed(self.stem(image))
        x = torch.relu(self.narrow(torch.relu(x)) + x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """What comes in is a term of a sum of matrices, once as it is and once as a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.flat = nn.Linear(16, 16)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.proj(x)
        rows = other.view(-1, 16)
        return y.sin() + self.fc2(torch.relu(self.fc1(y))), rows + self.flat(rows)


def named(types: list[str], **options: OpConfig) -> SearchSpace:
    """Return a space of 8 bits for ops of some types, and of others for some names."""
    rules = [Rule(op_types=[t], options=[OpConfig(weight=W8, inputs=A8)]) for t in types]
    rules += [Rule(names=[name], options=[option]) for name, option in options.items()]
    return SearchSpace(preset="int8", rules=rules)


CNN = named(
    ["Conv2d", "Linear"],
    signed=OpConfig(weight=W8, inputs=S8),
    narrow=OpConfig(weight=W8, inputs=A4),
)
BLOCK = named(["Linear"], fc1=OpConfig(weight=W8, inputs=TOKEN), fc2=OpConfig(weight=W8, inputs=A8))


def call(model: nn.Module, batch: object) -> object:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def pair(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 16, generator=generator), torch.randn(n, 4, 4, generator=generator)


def request(make: type[nn.Module], batch: object, space: object, path: Path) -> ExportRequest:
    torch.manual_seed(0)
    config = TuningConfig(space=space)
    model = quantization.fit(make().eval(), [batch], config=config, forward=call)
    traced = trace(model._parts.model, Example.of_batch(model.model, batch, call))
    return ExportRequest(traced, model.plan, dict(model._parts.model.ops), path, batches=())


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportReport, Traced]:
    batch = 2 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = request(Cnn, batch, CNN, tmp_path_factory.mktemp("cnn") / "cnn.pt2")
    return TorchExporter().export(asked), asked.traced


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportReport, Traced]:
    asked = request(Block, pair(4), BLOCK, tmp_path_factory.mktemp("block"))
    return TorchExporter().export(asked), asked.traced


@needs_compiler
def test_a_cnn_agrees_at_every_batch_size(cnn: tuple[ExportReport, Traced]) -> None:
    report, traced = cnn
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(2 * report.agreement.floor, 1e-4)
    run = load_package(report.files[0])
    for n in (1, 5):
        x = 5 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
        found, expected = run([x])[0], traced.simulate(x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.02)


@needs_compiler
def test_every_product_is_an_integer_kernel(
    cnn: tuple[ExportReport, Traced], block: tuple[ExportReport, Traced]
) -> None:
    for report, _ in (cnn, block):
        assert "4 integer kernels" in report.notes[0]
        assert report.left_float == ()
        assert all(layer.max_steps <= 1 for layer in report.layers)
        assert len(report.layers) >= 4


@needs_compiler
def test_a_package_is_compressed_and_holds_no_sources(cnn: tuple[ExportReport, Traced]) -> None:
    report, _ = cnn
    with zipfile.ZipFile(report.files[0]) as package:
        entries = package.infolist()
    assert not [entry.filename for entry in entries if entry.filename.endswith(".cpp")]
    (code,) = [entry for entry in entries if entry.filename.endswith(".so")]
    assert code.compress_size < 0.7 * code.file_size
    assert report.size_bytes < code.file_size


@needs_compiler
def test_a_block_agrees_and_leaves_its_input_alone(block: tuple[ExportReport, Traced]) -> None:
    report, traced = block
    run = load_package(report.files[0])
    assert report.agreement is not None
    inputs = pair(3)
    before = [tensor.clone() for tensor in inputs]
    found = run(inputs)
    for tensor, old in zip(inputs, before, strict=True):
        assert torch.equal(tensor, old)
    for one, two in zip(found, traced.simulate(*inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=0.02)


@needs_compiler
def test_the_report_names_the_file_in_a_folder(block: tuple[ExportReport, Traced]) -> None:
    report, _ = block
    assert report.files[0].name == "model.pt2"
    assert report.size_bytes == report.files[0].stat().st_size
    parameters = 16 * 16 + 16 + 2 * 16 * 32 + 32 + 16 + 16 * 16 + 16
    assert report.float_size_bytes == 4 * parameters
    assert "takes x, other and returns output_0, output_1" in report.notes[-1]


class Wide(nn.Module):
    """One large layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2048, 1536)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@needs_compiler
def test_four_bits_are_stored_in_half_a_byte(tmp_path: Path) -> None:
    four = OpConfig(weight=TensorScheme(format="int4", granularity=PerGroup(128)))
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    asked = request(Wide, x, named([], fc=four), tmp_path)
    report = TorchExporter().export(asked)
    assert 0 < (report.size_ratio or 0) < 0.21
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-4


class Tied(nn.Module):
    """An embedding whose table is the head's, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_a_tied_table_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_exporter, "has_compiler", lambda: False)
    tokens = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    report = TorchExporter().export(request(Tied, tokens, "int8", tmp_path))
    assert report.float_size_bytes == 4 * 50 * 16


def test_without_a_compiler_kernels_are_called_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_exporter, "has_compiler", lambda: False)
    asked = request(Block, pair(4), BLOCK, tmp_path / "block.pt2")
    report = TorchExporter().export(asked)
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(2 * report.agreement.floor, 1e-4)
    assert "No C++ compiler" in report.notes[0]
    # someone else's PyTorch runs the file as it is
    program = torch.export.load(report.files[0]).module(check_guards=False)
    expected = asked.traced.simulate(*pair(4))
    torch.testing.assert_close(program(*pair(4))[0], expected[0], rtol=1e-4, atol=1e-4)


def test_an_artifact_that_overwrites_its_input_is_refused() -> None:
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return (inputs[0].add_(1),)

    with pytest.raises(ExportError, match="overwrites its input 0"):
        checked(run)([torch.zeros(3)])


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = request(Block, pair(4), BLOCK, tmp_path / "file" / "inside")
    with pytest.raises(ExportError, match="cannot write"):
        TorchExporter().export(asked)


def test_ranges_that_need_values_cannot_be_exported(tmp_path: Path) -> None:
    moving = TensorScheme(format="int8", dynamic=True, calibration="mse")
    space = named([], fc1=OpConfig(weight=W8, inputs=moving))
    asked = request(Block, pair(4), space, tmp_path)
    with pytest.raises(ExportError, match="minmax"):
        TorchExporter().export(asked)


def reasons(config: OpConfig, make: Callable[[], Any] = Block) -> str | None:
    model = quantization.fit(make().eval(), [pair(4)], forward=call)
    return TorchExporter().why_not(model._parts.model.ops["fc1"], config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OpConfig(weight=W8, inputs=A8), None),
        (OpConfig(weight=W8, inputs=TOKEN), None),
        (OpConfig.float(), "keeps it in FP32"),
        (OpConfig(inputs=A8), "quantized weight as well"),
        (OpConfig(weight=W8), "quantized input as well"),
        (OpConfig(weight=TensorScheme(format="e4m3fn"), inputs=A8), "weights in e4m3fn"),
        (OpConfig(weight=TensorScheme(symmetric=False), inputs=A8), "zero point"),
        (OpConfig(weight=W8, inputs=TensorScheme(format="int16")), "activations in int16"),
        (OpConfig(weight=W8, inputs=TensorScheme(dynamic=True)), "for each token"),
        (OpConfig(weight=W8.model_copy(update={"granularity": PerChannel(1)}), inputs=A8), "axis"),
    ],
)
def test_the_table_of_capabilities(config: OpConfig, message: str | None) -> None:
    reason = reasons(config)
    assert reason is None if message is None else message in (reason or "")
