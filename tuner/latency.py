"""Latency as a cost: times of ops add up to a prediction, whole models are measured.

What is predicted for a plan is FP32's measured time less what each op saves alone. Whole candidates
are then measured beside FP32, in turns: what counts in the end is this, and a plan that is slower
than FP32 never wins.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import Exporter
from tuner.exporters.probes import faithful_trace
from tuner.exporters.timing import interleaved, takes_batch
from tuner.exporters.tracing import trace
from tuner.kernels.build import processor
from tuner.model import InstrumentedModel
from tuner.op_times import OpTimes
from tuner.ops import Op
from tuner.schemes import OpConfig

_ROUNDS = 25
_LIMIT_S = 8.0


@dataclass(frozen=True)
class MeasuredLatency:
    """The time of one call at batch 1, in milliseconds, with its quartiles.

    It is the ratio to FP32 in the same turns, times what FP32 took at the start: so plans can be
    compared that were measured minutes apart.
    """

    latency_ms: float
    lower_ms: float
    upper_ms: float

    def to_costs(self) -> dict[str, float]:
        """Return the costs of a record."""
        return {
            "latency_ms": self.latency_ms,
            "latency_lower_ms": self.lower_ms,
            "latency_upper_ms": self.upper_ms,
        }


def circumstances(exporter: Exporter) -> str:
    """Return what times depend on beside the model: those of other machines cannot be compared.

    Raises ExportError where the target has no runtime that can be timed.
    """
    machine = hashlib.sha256(processor().encode()).hexdigest()[:8]
    return f"{exporter.runtime}, processor {machine}, {torch.get_num_threads()} threads"


class LatencyModel:
    """Times of one model in one runtime: of its ops, and of plans as a whole.

    No plan may be on the model when it is made. Raises ExportError for models that an export would
    refuse, and for those that do not run at batch 1.
    """

    def __init__(self, model: InstrumentedModel, exporter: Exporter, example: Example) -> None:
        self._model = model
        self._exporter = exporter
        self._example = example
        self._one = example.with_batch(1)
        self._times = OpTimes(exporter)
        traced = faithful_trace(model, example)
        if not takes_batch(traced, 1):
            raise ExportError(
                "objective='latency' times calls at batch 1, and the model computes with the batch "
                f"of {example.batch} as a constant. Mend it, or give calibration batches of 1"
            )
        self._axes = traced.dynamic
        self._ops = self._recorded()
        self._float = exporter.compiled(traced)
        timing = interleaved({"float": self._float}, _ROUNDS, _LIMIT_S)["float"]
        self.baseline = MeasuredLatency(timing.median_ms, timing.lower_ms, timing.upper_ms)

    def anchor(self, baseline_ms: float) -> None:
        """Make all times relative to an earlier measurement of FP32: that of a resumed study."""
        self.baseline = MeasuredLatency(baseline_ms, baseline_ms, baseline_ms)

    def option_ms(self, op: Op, config: OpConfig) -> float:
        """Return how long an op takes alone under a configuration; 0 where that is not known."""
        alone = self._ops.get(op.name)
        return 0.0 if alone is None else self._times.time_ms(self._model, alone, config)

    def measure(self) -> MeasuredLatency:
        """Measure the plan that is on the model, in turns with FP32."""
        call = self._exporter.compiled(trace(self._model, self._example, self._axes))
        times = interleaved({"float": self._float, "plan": call}, _ROUNDS, _LIMIT_S)
        share = self.baseline.latency_ms / times["float"].median_ms
        plan = times["plan"]
        return MeasuredLatency(plan.median_ms * share, plan.lower_ms * share, plan.upper_ms * share)

    def _recorded(self) -> Mapping[str, Op]:
        """Return the ops with the shapes that they have at batch 1."""
        args, kwargs = self._one.call(self._one.tensors)
        with torch.no_grad():
            return self._model.record(lambda: self._model.model(*args, **kwargs), 1).ops


def latency_model(
    model: InstrumentedModel, exporter: Exporter | None, example: Example | None
) -> LatencyModel:
    """Return the latency model for a target; raises ExportError where there is nothing to time."""
    if exporter is None:
        raise ExportError(
            "objective='latency' is the latency in a runtime: name it, "
            "TuningConfig(objective='latency', target='onnxruntime')"
        )
    if example is None:
        raise ExportError("objective='latency' takes calibration batches that hold tensors")
    return LatencyModel(model, exporter, example)
