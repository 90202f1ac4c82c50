"""PyTorch as a runtime: packages for any batch, ops alone on codes, kernels one by one."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.torch_nets import A8, W8, Small
from tuner import (
    NothingQuantizedWarning,
    OpConfig,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters import torch_runtime
from tuner.exporters.targets import exporter
from tuner.exporters.torch_graph import spelled_graph
from tuner.exporters.torch_package import has_compiler
from tuner.exporters.torch_runtime import alone
from tuner.exporters.tracing import Traced, trace
from tuner.model import InstrumentedModel
from tuner.op_times import OpTimes
from tuner.qparams import QParams, quantize

needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler: compiled kernels are NOT tested here"
)
ENDS = OpConfig(weight=W8, inputs=A8, output=A8)


class Fixed(nn.Module):
    """Counts on the batch that it was traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 2, 8) if len(x) == 4 else x


def images(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def traced(model: nn.Module, batch: Tensor, plan: dict[str, OpConfig] | None = None) -> Traced:
    """Return a model's graph with a plan on it, its ranges those of the batch."""
    instrumented = InstrumentedModel(model.eval())
    with torch.no_grad():
        graph = instrumented.record(lambda: instrumented.model(batch), len(batch))
    instrumented.install(graph.ops, _Ranges())
    instrumented.apply(plan or {})
    return trace(instrumented, Example.of_batch(instrumented.model, batch))


class _Ranges:
    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        return QParams(torch.tensor(0.03), torch.tensor(120, dtype=torch.int32))


@needs_compiler
def test_one_package_runs_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    compile_package = torch_runtime.compile_package

    def counted(program: torch.export.ExportedProgram, path: Path) -> None:
        written.append(path)
        compile_package(program, path)

    monkeypatch.setattr(torch_runtime, "compile_package", counted)
    torch.manual_seed(0)
    model, found = traced(Small(), images(4), {"conv": OpConfig(weight=W8, inputs=A8)}), []
    target = exporter("torch")
    for batch in (1, 8):
        (output,) = target.compiled(model, batch)()  # type: ignore[misc]
        expected = model.simulate(*model.example.with_batch(batch).tensors)[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
        found.append(output.shape)
    assert found == [(1, 4), (8, 4)]
    assert len(written) == 1
    assert not written[0].exists()


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False])
def test_an_op_alone_takes_and_gives_codes(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runtime, "has_compiler", lambda: compiles)
    torch.manual_seed(0)
    model = traced(nn.Sequential(nn.Conv2d(4, 8, 3)), images(2), {"0": ENDS})
    (codes,) = alone(model, spelled_graph(model), on_codes=True)()  # type: ignore[misc]
    assert codes.dtype == torch.uint8
    (values,) = model.simulate(*model.example.tensors)
    scale, zero = _Ranges().qparams("", 0, A8).scale, 120
    expected = quantize(values, A8, QParams(scale, torch.tensor(zero, dtype=torch.int32)))
    torch.testing.assert_close(codes.int(), expected.int(), rtol=0, atol=1)
    assert (codes.int() == expected.int()).float().mean() > 0.99
    (full,) = alone(model, spelled_graph(model))()  # type: ignore[misc]
    torch.testing.assert_close(full, values, rtol=0, atol=0.031)


def test_what_does_not_compile_runs_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise ExportError("PyTorch cannot compile an op alone")

    monkeypatch.setattr(torch_runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch_runtime, "compile_freezing", fails)
    model = traced(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), {"0": ENDS})
    with caplog.at_level(logging.WARNING):
        (found,) = alone(model, spelled_graph(model))()  # type: ignore[misc]
    assert "one by one" in caplog.text
    torch.testing.assert_close(found, model.simulate(*model.example.tensors)[0], rtol=0, atol=0.031)


def test_a_batch_that_is_a_constant_cannot_be_another() -> None:
    model = traced(Fixed(), torch.randn(4, 16))
    with pytest.raises(ExportError, match="cannot be timed at 8"):
        exporter("torch").compiled(model, 8)


@needs_compiler
def test_ops_are_timed_in_compiled_kernels(tmp_path: Path) -> None:
    model = InstrumentedModel(Small().eval())
    with torch.no_grad():
        ops = model.record(lambda: model.model(images(1)), 1).ops
    times = OpTimes(exporter("torch"), tmp_path)
    config = OpConfig(weight=W8, inputs=(A8,))
    assert 0 < times.time_ms(model, ops["conv"], config) < 1000
    assert 0 < times.time_ms(model, ops["conv"], OpConfig.float()) < 1000
    (kept,) = tmp_path.glob("torch-*-compiled-*.json")
    assert kept.exists()


def test_without_a_compiler_the_search_times_kernels_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tuner.op_times.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch_runtime, "has_compiler", lambda: False)
    x = images(4)
    config = TuningConfig(objective="latency", target="torch", max_trials=2)
    with warnings.catch_warnings(), torch.no_grad(), caplog.at_level(logging.WARNING):
        # so small a model may be fastest in FP32, and then that is what comes back
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        result = quantization.fit(
            Small().eval(), [x], lambda model: -float(model(x).abs().mean()), config
        ).result
    assert "no C++ compiler" in caplog.text
    assert result.best.costs["latency_ms"] <= result.baseline_costs["latency_ms"]
    assert list(tmp_path.rglob("torch-*-eager-*.json"))
