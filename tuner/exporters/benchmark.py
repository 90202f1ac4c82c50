"""The latency of a quantized model beside FP32, in torch and in the target's runtime."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import Exporter
from tuner.exporters.batch_sizes import check_batch, checked_sizes
from tuner.exporters.probes import faithful_trace
from tuner.exporters.targets import exporter
from tuner.exporters.timing import Timing, interleaved
from tuner.exporters.tracing import ONE_AT_A_TIME, Traced, trace
from tuner.isolation import isolated_random_state
from tuner.model import InstrumentedModel


@dataclass(frozen=True)
class BenchmarkRow:
    """Times at one batch size, all measured in turns."""

    batch: int
    torch_float: Timing
    runtime_float: Timing
    runtime_quantized: Timing

    @property
    def speedup(self) -> float:
        """How many times faster than FP32 in the same runtime."""
        return self.runtime_float.median_ms / self.runtime_quantized.median_ms


def benchmark(
    model: InstrumentedModel, example: Example, target: str, batches: Iterable[int] = (1, 8)
) -> tuple[BenchmarkRow, ...]:
    """Time the plan that is on a model; nothing of the model changes.

    Raises UnknownNameError for an unknown target, ExportError for one that has no runtime here.
    """
    sizes = checked_sizes(batches, example)
    if not sizes:
        raise ExportError("there are no batch sizes: give numbers from 1")
    found = exporter(target)
    with ONE_AT_A_TIME, isolated_random_state():
        plain = model.copy()
        plain.apply({})
        floats = faithful_trace(plain, example)
        for size in sizes:
            check_batch(floats, size)
        graphs = floats, trace(model, example, floats.dynamic)
        return tuple(_row(found, plain, example, graphs, size) for size in sizes)


def _row(
    found: Exporter,
    plain: InstrumentedModel,
    example: Example,
    graphs: tuple[Traced, Traced],
    size: int,
) -> BenchmarkRow:
    floats, quantized = graphs
    inputs = example.with_batch(size)
    args, kwargs = inputs.call(inputs.tensors)
    with torch.no_grad():
        times = interleaved(
            {
                "torch": partial(plain.model, *args, **kwargs),
                "float": found.compiled(floats, size),
                "quantized": found.compiled(quantized, size),
            }
        )
    return BenchmarkRow(size, times["torch"], times["float"], times["quantized"])
