"""The table of deployment targets, by name; their packages are imported when one is asked for."""

import importlib
from dataclasses import dataclass

from tuner.errors import ExportError, UnknownNameError
from tuner.exporters.base import Exporter


@dataclass(frozen=True)
class _Row:
    """Where a target's exporter is, and which extra of the package installs what it needs."""

    module: str
    name: str
    extra: str | None = None


_TARGETS = {
    "onnx": _Row("tuner.exporters.onnx_exporter", "OnnxExporter", "onnx"),
    "onnxruntime": _Row("tuner.exporters.onnx_exporter", "OnnxRuntimeExporter", "onnx"),
    "openvino": _Row("tuner.exporters.openvino_exporter", "OpenVinoExporter", "openvino"),
    "torch": _Row("tuner.exporters.torch_exporter", "TorchExporter"),
    "torch-bf16": _Row("tuner.exporters.torch_exporter", "TorchBf16Exporter"),
    "integer": _Row("tuner.exporters.integer_exporter", "IntegerExporter"),
    "calibration": _Row("tuner.exporters.calibration", "CalibrationExporter"),
}


def targets() -> tuple[str, ...]:
    """Return the names of all targets."""
    return tuple(_TARGETS)


def exporter(target: str) -> Exporter:
    """Return the exporter of a target.

    Raises UnknownNameError for a name that is none, ExportError where a package is missing or
    broken.
    """
    row = _TARGETS.get(target)
    if row is None:
        raise UnknownNameError("target", target, _TARGETS)
    try:
        module = importlib.import_module(row.module)
    except ImportError as error:
        if row.extra is None or (error.name or "").startswith("tuner"):
            raise
        if isinstance(error, ModuleNotFoundError):
            needed = f"the package {error.name!r}"
        else:
            needed = f"what cannot be loaded ({error})"
        raise ExportError(
            f"target {target!r} needs {needed}: pip install 'accutune[{row.extra}]'"
        ) from error
    found: Exporter = getattr(module, row.name)()
    return found
