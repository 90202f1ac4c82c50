"""OpenVINO on the CPU: runs ONNX files on torch tensors, and tells how it computes each op."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import openvino
import torch
from torch import Tensor

from tuner.errors import ExportError, brief

_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq")
_INTEGER = ("I8", "U8")
_SMALL = ("i4", "u4", "i8", "u8")

SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    # at its default, products with weights alone round their float input to 8 bits, unasked
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""What models are compiled with beside the number of threads; those of users should be, too."""


@dataclass(frozen=True)
class Kernel:
    """How OpenVINO computes one product: its kind, the kernel, and the ONNX nodes that it holds.

    `weight` is the type of the second operand as the kernel reads it.
    """

    kind: str
    primitive: str
    nodes: tuple[str, ...]
    weight: str

    @property
    def is_integer(self) -> bool:
        """Whether the kernel multiplies integers."""
        return self.primitive.endswith(_INTEGER)

    @property
    def reads_codes(self) -> bool:
        """Whether the weight stays in its codes, of integers or beside a float input."""
        return self.weight in _SMALL


class OpenVinoSession:
    """A model compiled by OpenVINO for the CPU, with as many threads as torch has.

    It computes what the file says: what is float stays FP32, and nothing is quantized unasked.
    Raises ExportError where OpenVINO refuses the model.
    """

    def __init__(self, source: Path | bytes) -> None:
        core = _core()
        options = {**SETTINGS, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            self._compiled = core.compile_model(core.read_model(source), "CPU", options)
        except Exception as error:  # its exceptions have no common base of their own
            raise ExportError(f"OpenVINO refuses the model: {_gist(error)}") from error
        self._request = self._compiled.create_infer_request()
        read = {name for port in self._compiled.inputs for name in port.get_names()}
        self._names = [name if name in read else None for name in _input_names(source)]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run on the inputs, in the order of the file."""
        arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors]
        try:
            found = self._request.infer(
                {name: a for name, a in zip(self._names, arrays, strict=True) if name is not None}
            )
        except Exception as error:  # its exceptions have no common base of their own
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise ExportError(
                f"OpenVINO cannot run the model on {shapes}: {brief(str(error))}"
            ) from error
        return [torch.from_numpy(found[output].copy()) for output in self._compiled.outputs]

    def products(self) -> Iterator[Kernel]:
        """Yield how each product is computed; kernels are known once the model has run."""
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            kind = str(facts["layerType"].get())
            if kind in _PRODUCTS:
                names = tuple(str(facts["originalLayersNames"].get()).split(","))
                second = node.input_value(1).get_node().get_rt_info()
                weight = str(second["outputPrecisions"].get())
                yield Kernel(kind, str(facts["primitiveType"].get()), names, weight)


@cache
def _core() -> openvino.Core:
    """Return the one Core of the process.

    Each gives its thread an alternate signal stack, and gives back the one before when it ends. Of
    two whose lives overlap, the first to end leaves memory that is gone to the second, and what the
    second gives back kills the process at the next signal, such as Ctrl-C.
    """
    return openvino.Core()


def _gist(error: Exception) -> str:
    """Return which ops OpenVINO cannot convert where it says so, else what it says."""
    found = re.search(r"Conversion is failed for: (.+)", str(error))
    return f"it does not convert {found[1].strip()} of this model" if found else brief(str(error))


def _input_names(source: Path | bytes) -> list[str]:
    """Return the names of a file's inputs; OpenVINO forgets those that nothing reads."""
    if isinstance(source, Path):
        proto = onnx.load(source, load_external_data=False)
    else:
        proto = onnx.load_model_from_string(source)
    return [given.name for given in proto.graph.input]
