"""Writes a graph as an ONNX file: opset by need, names kept, INT4 packed."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram

from tuner.errors import ExportError, brief
from tuner.exporters.onnx_ops import BLOCKS_FROM, translations
from tuner.exporters.onnx_storage import store_small
from tuner.exporters.onnx_weights import dequantized
from tuner.exporters.staging import data_name, writing
from tuner.exporters.tracing import Traced

_BASE_OPSET = 20
_EXTERNAL_BYTES = 2_000_000_000
_OF_NO_USE = {
    "onnx_ir.passes.common.initializer_deduplication": "Skipped deduplication of initializer",
    "onnxscript.optimizer._constant_folding": "Skipping constant folding for op",
}
"""What the optimizer says on stderr of graphs that are well as they are, by its logger."""

_NEW_TYPES = (torch.int16, torch.uint16)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """An ONNX model in memory."""

    model: ir.Model

    @property
    def is_large(self) -> bool:
        """Whether the constants exceed what one file can hold."""
        return self._constant_bytes > _EXTERNAL_BYTES

    @property
    def size_bytes(self) -> int:
        """The size of the files; of large ones that of the constants, all but some KiB of it."""
        return self._constant_bytes if self.is_large else len(self.to_bytes())

    @property
    def _constant_bytes(self) -> int:
        values = self.model.graph.initializers.values()
        return sum(v.const_value.nbytes for v in values if v.const_value is not None)

    def load(self, runtime: Callable[[Path | bytes], T]) -> T:
        """Return what a runtime makes of the model: of a file that is then gone, if it is large."""
        if not self.is_large:
            return runtime(self.to_bytes())
        with tempfile.TemporaryDirectory() as folder:
            return runtime(self.save(Path(folder) / "model.onnx")[0])

    def to_bytes(self) -> bytes:
        """Return the file's contents, but for shapes within the graph: readers infer them.

        ONNX Runtime infers more than the tracer knows, and fuses more where it does.
        """
        return _without_shapes(ir.to_proto(self.model))

    def save(self, path: Path) -> tuple[Path, ...]:
        """Write the file, with its constants beside it where they exceed 2 GB; return the files.

        Raises ExportError where that cannot be done.
        """
        with writing(path):
            if self.is_large:
                return path, self._save_apart(path)
            path.write_bytes(self.to_bytes())
        return (path,)

    def _save_apart(self, path: Path) -> Path:
        """Write the file and its constants, which have the name that the file knows them by."""
        made = path.with_name(f"{path.name}.data")
        ir.save(self.model, path, external_data=made.name)
        named = made.with_name(data_name(path, made))
        made.replace(named)
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = named.name
        path.write_bytes(_without_shapes(proto))
        return named


def _without_shapes(proto: onnx.ModelProto) -> bytes:
    del proto.graph.value_info[:]
    contents: bytes = proto.SerializeToString()
    return contents


def to_onnx(graph: fx.GraphModule, traced: Traced) -> OnnxModel:
    """Return a graph over the inputs and outputs of a traced model as ONNX."""
    opset = BLOCKS_FROM if _needs_new_types(graph) else _BASE_OPSET
    program = traced.exported(graph)
    with torch.no_grad():
        model = _written(program, traced, opset).model
    store_small(model)
    _tell_apart(model)
    _name_axes(model, traced.dynamic)
    return OnnxModel(model)


def _written(program: ExportedProgram, traced: Traced, opset: int) -> torch.onnx.ONNXProgram:
    with _silent():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(traced.example.names),
                output_names=list(traced.outputs),
                opset_version=opset,
                custom_translation_table=translations(opset),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"torch.onnx.export cannot write this model: {brief(str(error))}"
            ) from error
    assert written is not None
    return written


@contextmanager
def _silent() -> Iterator[None]:
    """Keep from the user what torch.onnx says of torch's deprecations and of packages it lacks,
    and its optimizer of what it leaves as it is; other messages of both go on.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), ExitStack() as muted:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            for name, message in _OF_NO_USE.items():
                muted.enter_context(_muted(logging.getLogger(name), message))
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _muted(logger: logging.Logger, message: str) -> Iterator[None]:
    """Drop the messages of a logger that begin like this one."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(message)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _needs_new_types(graph: fx.GraphModule) -> bool:
    """Whether the graph has INT4, 16-bit codes or blocks, which opset 21 brings."""
    if any(buffer.dtype in _NEW_TYPES for buffer in graph.buffers()):
        return True
    calls = [node.args for node in graph.graph.nodes if node.target is dequantized]
    return any(block or stored for *_, block, _, stored in calls)


def _tell_apart(model: ir.Model) -> None:
    """Rename values within the graph that are called like one of its inputs or outputs."""
    ends = {*model.graph.inputs, *model.graph.outputs}
    names = {value.name for value in ends}
    inner = [value for node in model.graph for value in node.outputs]
    for value in [*inner, *model.graph.initializers.values()]:
        if value not in ends and value.name in names:
            value.name = f"{value.name}_within"


def _name_axes(model: ir.Model, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Give free axes of the inputs their names, in inputs and outputs alike."""
    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in dynamic.get(str(value.name), {}).items():
            length = None if value.shape is None else value.shape[axis]
            if isinstance(length, ir.SymbolicDim):
                renamed.setdefault(str(length.value), name)
    values: list[Any] = [*model.graph.inputs, *model.graph.outputs]
    for value in values:
        if value.shape is not None:
            for axis, length in enumerate(value.shape):
                if isinstance(length, ir.SymbolicDim) and str(length.value) in renamed:
                    value.shape[axis] = ir.SymbolicDim(renamed[str(length.value)])
