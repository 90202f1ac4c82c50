"""What is timed is what would be exported: a model that an export refuses is not timed at all."""

import pytest
import torch
from torch import Tensor, nn

from tuner import TuningConfig, quantization
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.benchmark import benchmark
from tuner.exporters.targets import exporter
from tuner.latency import LatencyModel
from tuner.model import InstrumentedModel

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Moody(nn.Module):
    """Computes otherwise when it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.fc(x), 0.5)


class Branching(nn.Module):
    """Takes another way for a batch of one, which a trace of more does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if x.shape[0] > 1 else 2 * y - 3


def timed(model: nn.Module) -> LatencyModel:
    instrumented = InstrumentedModel(model.eval())
    example = Example.of_batch(model, X)
    return LatencyModel(instrumented, exporter("onnxruntime"), example)


def test_a_model_that_changes_from_call_to_call_is_not_timed() -> None:
    with pytest.raises(ExportError, match="other outputs when it is called again"):
        timed(Moody())


def test_a_model_with_another_way_for_one_is_not_timed_as_if_it_had_none() -> None:
    with pytest.raises(ExportError, match="computes with the batch of 4 as a constant"):
        timed(Branching())
    config = TuningConfig(objective="latency", target="onnxruntime")
    with pytest.raises(ExportError, match="give calibration batches of 1"):
        quantization.fit(Branching().eval(), [X], lambda model: 1.0, config)


def test_a_benchmark_says_which_batch_it_takes() -> None:
    model = quantization.fit(Branching().eval(), [X], config=TuningConfig())
    parts = model._parts
    example = Example.of_batch(model.model, X)
    with pytest.raises(ExportError, match=r"cannot be timed at 1\. Time it at 4"):
        benchmark(parts.model, example, "onnxruntime", (4, 1))
    (row,) = benchmark(parts.model, example, "onnxruntime", (4,))
    assert row.batch == 4
    assert row.runtime_quantized.median_ms > 0
