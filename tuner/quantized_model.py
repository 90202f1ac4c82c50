"""What fit() returns: the user's model with a plan on it, and how it was found."""

from pathlib import Path
from typing import Any

from torch import nn

from tuner.errors import UnsupportedError
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

    def export(self, path: str | Path, target: str = "onnx", **options: Any) -> Any:
        """Refuse: exporters come with a later version."""
        raise UnsupportedError(
            f"export to {target!r} is not supported by this version: save() keeps the model, and "
            "quantization.load() brings it back for export later"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state_dict, its names as in the user's model."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model, its names as in the user's model."""
        return self.model.load_state_dict(*args, **kwargs)
