"""Latency as a cost: times of ops add up to a prediction, whole models are measured.

What is predicted for a plan is FP32's measured time less what its ops save, each as it is timed
alone. Whole candidates are then measured beside FP32, in turns: what counts in the end is this, and
a plan that is not measured faster than FP32, beyond the noise, never wins.
"""

import hashlib
import logging
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import Call, Exporter
from tuner.exporters.batch_sizes import check_batch
from tuner.exporters.probes import faithful_trace
from tuner.exporters.timing import Timing, interleaved, round_ms
from tuner.exporters.torch_graph import eager
from tuner.exporters.tracing import Traced, trace
from tuner.kernels.build import processor
from tuner.model import InstrumentedModel
from tuner.op_times import OpTimes
from tuner.ops import Op
from tuner.schemes import OpConfig

_log = logging.getLogger(__name__)
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 9
_BLOCK_S = 0.1
_LIMIT_S = 12.0
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 200
_CLEAR = 0.02
"""By how much a plan must be faster: the same model, loaded twice, stayed up to 0.5 % apart."""
_TORCH = "torch"
_FLOAT = OpConfig.float()


@dataclass(frozen=True)
class MeasuredLatency:
    """The time of one call at batch 1, in milliseconds, with its quartiles.

    It is the ratio to FP32 in the same turns, times what FP32 took at the start: so plans can be
    compared that were measured minutes apart. The quartiles are those of the ratio.
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


def is_faster(costs: Mapping[str, float], baseline_costs: Mapping[str, float]) -> bool:
    """Whether a measured plan is clearly faster than FP32, in three of four measurements at least.

    What was not measured is not.
    """
    upper_ms = costs.get("latency_upper_ms", math.inf)
    return upper_ms < (1 - _CLEAR) * baseline_costs["latency_ms"]


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
        self._threads = torch.get_num_threads()
        traced = faithful_trace(model, example)
        check_batch(traced, 1)
        self._axes = traced.dynamic
        self._ops = self._recorded()
        self._float, self.baseline = self._fastest_float(traced)

    def anchor(self, baseline_ms: float) -> None:
        """Make all times relative to an earlier measurement of FP32: that of a resumed study."""
        self.baseline = MeasuredLatency(baseline_ms, baseline_ms, baseline_ms)

    def option_ms(self, op: Op, config: OpConfig) -> float:
        """Return what an op takes of a call under a configuration; 0 where that is not known.

        No plan may be on the model.
        """
        alone = self._ops.get(op.name)
        if alone is None:
            return 0.0
        with _on_threads(self._threads):
            return self._share * self._times.time_ms(self._model, alone, config)

    @cached_property
    def _share(self) -> float:
        """What a millisecond of an op alone counts within the model, at most 1.

        An op alone is called by itself, and takes and gives tensors as the runtime's users have
        them: of small ops all of them alone take longer than the model.
        """
        floats = (self._times.time_ms(self._model, op, _FLOAT) for op in self._ops.values())
        alone_ms = math.fsum(floats)
        return min(1.0, self.baseline.latency_ms / alone_ms) if alone_ms else 1.0

    def predicted_ms(self, plan: Mapping[str, OpConfig]) -> float:
        """Return FP32's time less what each op of a plan saves alone; no plan may be on."""
        ops = {name: self._ops[name] for name in plan if name in self._ops}
        saved = (
            self.option_ms(op, _FLOAT) - self.option_ms(op, plan[name]) for name, op in ops.items()
        )
        return self.baseline.latency_ms - math.fsum(saved)

    def measure(self) -> MeasuredLatency:
        """Measure the plan that is on the model, in turns with FP32, on as many threads as that.

        What seems faster than FP32 is measured once more, and both count.
        """
        with _on_threads(self._threads):
            call = self._exporter.compiled(trace(self._model, self._example, self._axes))
            ratios = _ratios(self._float, call)
            if statistics.median(ratios) < 1:
                ratios += _ratios(self._float, call)
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        whole_ms = self.baseline.latency_ms
        _log.info("measured %.4g of FP32 (%.4g to %.4g)", median, lower, upper)
        return MeasuredLatency(median * whole_ms, lower * whole_ms, upper * whole_ms)

    def _fastest_float(self, traced: Traced) -> tuple[Call, MeasuredLatency]:
        """Return FP32 as users have it at its fastest in the runtime, and its time.

        PyTorch runs a model op by op, too, and small ones are faster so.
        """
        calls = {"compiled": self._exporter.compiled(traced)}
        if self._exporter.target == _TORCH:
            run, inputs = eager(traced), traced.example.with_batch(1).tensors
            calls["eager"] = lambda: run(inputs)
        blocks = _blocks(calls)
        times = {name: [block[name].median_ms for block in blocks] for name in calls}
        fastest = min(times, key=lambda name: statistics.median(times[name]))
        lower, median, upper = statistics.quantiles(times[fastest], n=4, method="inclusive")
        return calls[fastest], MeasuredLatency(median, lower, upper)

    def _recorded(self) -> Mapping[str, Op]:
        """Return the ops with the shapes that they have at batch 1."""
        args, kwargs = self._one.call(self._one.tensors)
        with torch.no_grad():
            return self._model.record(lambda: self._model.model(*args, **kwargs), 1).ops


@contextmanager
def _on_threads(count: int) -> Iterator[None]:
    """Run on so many threads, whatever the user's code has set meanwhile; then again on those."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(reference: Call, plan: Call) -> list[float]:
    """Return the time of a plan ÷ FP32's, block by block."""
    blocks = _blocks({"float": reference, "plan": plan})
    return [block["plan"].median_ms / block["float"].median_ms for block in blocks]


def _blocks(calls: Mapping[str, Call]) -> list[Mapping[str, Timing]]:
    """Time calls in turns, in several blocks of many rounds; of slow calls in fewer.

    What disturbs the machine for the length of a block hits all calls alike.
    """
    once = interleaved(calls, _LEAST_ROUNDS)
    round_s = round_ms(once.values()) / 1e3
    rounds = min(max(math.ceil(_BLOCK_S / round_s), _LEAST_ROUNDS), _MOST_ROUNDS)
    affordable = int(_LIMIT_S / (rounds * round_s))
    count = min(max(affordable, _LEAST_BLOCKS), _MOST_BLOCKS)
    return [interleaved(calls, rounds, warm_up=0) for _ in range(count)]


def timed_target(exporter: Exporter | None) -> Exporter:
    """Return a target that can be timed; raises ExportError for none, and for those without one."""
    if exporter is None:
        raise ExportError(
            "objective='latency' is the latency in a runtime: name it, "
            "TuningConfig(objective='latency', target='onnxruntime')"
        )
    _ = exporter.runtime  # which raises where there is none
    return exporter


def latency_model(
    model: InstrumentedModel, exporter: Exporter | None, example: Example | None
) -> LatencyModel:
    """Return the latency model for a target; raises ExportError where there is nothing to time."""
    exporter = timed_target(exporter)
    if example is None:
        raise ExportError("objective='latency' takes calibration batches that hold tensors")
    return LatencyModel(model, exporter, example)
