"""ONNX Runtime on the CPU: runs files on torch tensors, and tells what became of their ops."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from tuner.errors import ExportError, brief

SETTINGS = {
    # at its default, products with 4-bit weights round their float input to 8 bits, unasked
    "session.qdq_matmulnbits_accuracy_level": "1",
}
"""What sessions are told beside the number of threads; those of users should be told the same.

Not session.set_denormal_as_zero, though a softmax over masked scores is seven times as fast with
it: it changes the arithmetic of the whole thread, for everybody and for good.
"""

_CONSTANTS_BESIDE = "session.optimized_model_external_initializers_file_name"


class OnnxRuntimeSession:
    """A session of ONNX Runtime with as many threads as torch has.

    Raises ExportError where ONNX Runtime refuses the model.
    """

    def __init__(
        self, source: Path | bytes, optimized: bool = True, keep: Path | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        # a graph that is kept is meant to be read: without layouts for this machine
        options.graph_optimization_level = level if keep is None else levels.ORT_ENABLE_EXTENDED
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        for name, value in SETTINGS.items():
            options.add_session_config_entry(name, value)
        if keep is not None:
            options.optimized_model_filepath = str(keep)
            options.add_session_config_entry(_CONSTANTS_BESIDE, f"{keep.name}.data")
        try:
            self._session = onnxruntime.InferenceSession(
                source if isinstance(source, bytes) else str(source),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # its exceptions have no common base of their own
            raise ExportError(f"ONNX Runtime refuses the model: {brief(str(error))}") from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run on the inputs, in the order of the file."""
        arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors]
        given = dict(zip(self.inputs, arrays, strict=True))
        try:
            found = self._session.run(None, given)
        except Exception as error:  # its exceptions have no common base of their own
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
            raise ExportError(
                f"ONNX Runtime cannot run the model on {shapes}: {brief(str(error))}"
            ) from error
        return [torch.from_numpy(array) for array in found]


def optimized_graph(path: Path) -> onnx.GraphProto:
    """Return the graph that ONNX Runtime makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "optimized.onnx"
        OnnxRuntimeSession(path, keep=kept)
        return onnx.load(kept, load_external_data=False).graph
