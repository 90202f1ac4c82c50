"""What fit() returns: the user's model with a plan on it, and how it was found."""

from pathlib import Path
from typing import Any

from torch import nn

from tuner.evaluation import EvalFunc
from tuner.example import Axes
from tuner.exporters.exporting import example_of, export_model
from tuner.exporters.report import ExportReport
from tuner.op_table import op_table_text
from tuner.plan import Plan
from tuner.results import TuningResult
from tuner.saving import Parts, save_parts


class QuantizedModel(nn.Module):
    """A model of the user's class with a plan on it. Call it as the model itself.

    `model` is the instrumented model, `plan` what was chosen per op, `result` how it was found.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model = parts.model.model
        self._parts = parts

    @property
    def plan(self) -> Plan:
        """The plan that is on the model."""
        return self._parts.plan

    @property
    def result(self) -> TuningResult:
        """The tuning run that found the plan."""
        return self._parts.result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the quantized model."""
        return self.model(*args, **kwargs)

    def summary(self) -> str:
        """Return the result and the table of ops as text."""
        return f"{self.result.summary()}\n\n{op_table_text(self.result.op_table)}"

    def save(self, directory: str | Path) -> Path:
        """Write plan.json, weights.safetensors, config.json and result.json to a directory.

        Raises SaveError where that cannot be done; nothing is left half-written.
        """
        return save_parts(self._parts, directory)

    def export(
        self,
        path: str | Path,
        target: str = "onnx",
        example_inputs: Any = None,
        dynamic_axes: Axes | None = None,
        *,
        eval_func: EvalFunc | None = None,
        batches: tuple[int, ...] = (1, 8),
    ) -> ExportReport:
        """Write the model for a runtime, check it against the simulation, and time it beside FP32.

        Args:
            path: the file or folder to write; what is there is replaced once all is checked.
            target: one of `tuner.exporters.targets.targets()`: onnx, onnxruntime, openvino, torch,
                torch-bf16 (products that stay float in bfloat16), integer, calibration.
            example_inputs: one batch as the calibration data have it; None takes the first batch
                that fit() read. A loaded model needs one.
            dynamic_axes: input name → its axes whose length may change, named or not. Without it
                the batch, and the length of sequences of tokens.
            eval_func: is called with a model of the user's class that runs the artifact; what it
                returns is the report's `metric`. It is called again for `simulated_metric`, and
                once or twice for `metric_floor` where both are more than 0.2 % apart.
            batches: batch sizes to time, () for none.

        Raises:
            UnknownNameError: no such target.
            ExportError: a missing package, a path that cannot be written, a model or plan that the
                target cannot express, or an artifact that does not agree with the simulation.
        """
        model, known = self._parts.model, self._parts.example
        example = known if example_inputs is None else example_of(model, example_inputs)
        return export_model(
            model=model,
            plan=self.plan,
            path=path,
            target=target,
            example=example,
            dynamic_axes=dynamic_axes,
            batches=batches,
            eval_func=eval_func,
            metric=self.result.goal.metric,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state_dict, its names as in the user's model."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model, its names as in the user's model."""
        return self.model.load_state_dict(*args, **kwargs)
