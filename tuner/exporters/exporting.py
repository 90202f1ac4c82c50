"""From a quantized model to an artifact of a target, checked and measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import ExportError
from tuner.evaluation import EvalFunc
from tuner.example import Axes, Example
from tuner.exporters.agreement import Run
from tuner.exporters.artifact import artifact_model
from tuner.exporters.base import ExportRequest
from tuner.exporters.report import ExportReport
from tuner.exporters.targets import exporter
from tuner.exporters.tracing import trace
from tuner.isolation import isolated_random_state
from tuner.model import InstrumentedModel
from tuner.plan import Plan
from tuner.scores import read_score


def export_model(
    model: InstrumentedModel,
    plan: Plan,
    path: str | Path,
    target: str,
    example: Example | None,
    dynamic_axes: Axes | None = None,
    batches: tuple[int, ...] = (1, 8),
    eval_func: EvalFunc | None = None,
    metric: str | None = None,
) -> ExportReport:
    """Export a model with a plan on it; nothing of it changes.

    Raises UnknownNameError for an unknown target, ExportError for all that cannot be done.
    """
    found = exporter(target)
    if example is None:
        raise ExportError(
            "a model that was loaded knows no inputs (they are the user's data, and not saved): "
            "give example_inputs, a batch as the calibration data have it"
        )
    with isolated_random_state():
        traced = trace(model, example, dynamic_axes)

        def evaluate(run: Run) -> float:
            assert eval_func is not None
            return read_score(eval_func(artifact_model(model, example, run)), metric).accuracy

        request = ExportRequest(
            traced=traced,
            plan=plan,
            ops=dict(model.ops),
            path=Path(path),
            batches=batches,
            evaluate=None if eval_func is None else evaluate,
        )
        return found.export(request)


def example_of(model: InstrumentedModel, inputs: Any) -> Example:
    """Return the call that a batch makes of the model: a tensor, a tuple of inputs, a mapping."""
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, (list, tuple)):
        inputs = tuple(inputs)
    elif not isinstance(inputs, Mapping) and not hasattr(inputs, "shape"):
        raise ExportError(
            f"example_inputs is a {type(inputs).__name__}: give a tensor, a tuple of inputs or a "
            "mapping of them by name"
        )
    return Example.of_batch(model.model, inputs)
