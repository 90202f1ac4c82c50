"""The `openvino` target: the same QDQ file, checked and measured in OpenVINO."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import onnx_ir as ir

from tuner.exporters.base import Call, Exporter, ExportRequest
from tuner.exporters.hoisting import hoisted
from tuner.exporters.onnx_codes import inputs_of, without_ends
from tuner.exporters.onnx_exporter import Spelled, check_float, merged, spelled, written
from tuner.exporters.onnx_file import to_onnx
from tuner.exporters.onnx_graph import qdq_graph
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.openvino_kernels import why_not_in_openvino
from tuner.exporters.openvino_runtime import Kernel, OpenVinoSession
from tuner.exporters.report import ExportReport, LeftFloat
from tuner.exporters.timing import latencies
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.schemes import OpConfig

_PASSED = ("Unsqueeze", "Squeeze", "Transpose", "Reshape", "Slice", "Clip", "Pad")


class OpenVinoExporter(Exporter):
    """A QDQ file for OpenVINO: of fewer bits the values are clipped, which its kernels take in."""

    target = "openvino"
    reads_sums = True

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why OpenVINO has no low-precision kernel for an op's choice, None if it has."""
    adds_before_rounding = True
        return why_not_in_openvino(op, config)

    def check(self, traced: Traced) -> None:
        """Raise ExportError where OpenVINO does not run a model."""
        check_float(traced, OpenVinoSession)

    @property
    def runtime(self) -> str:
        """OpenVINO and its version."""
        return f"openvino-{version('openvino')}"

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        """Return a call that runs a traced model on its example, with codes where it is told so."""
        prepared = hoisted(traced)
        model = to_onnx(qdq_graph(prepared, clips_values=True).module, prepared)
        if on_codes:
            model = without_ends(model)
        session = OpenVinoSession(model.to_bytes())
        return partial(session.run, inputs_of(model, traced.example.with_batch(batch).tensors))

    def export(self, request: ExportRequest) -> ExportReport:
        """Write the file, check it in OpenVINO layer by layer and as a whole, and time it."""
        found = spelled(request, clips_values=True)
        report = written(found, request, self.target, OpenVinoSession)
        session = OpenVinoSession(report.files[0])
        session.run(found.traced.example.tensors)
        left = _in_float(session, found, request)
        notes = tuple(_beside_onnx_runtime(session, found, request))
        left_float = merged(report.left_float, left)
        return replace(report, left_float=left_float, notes=(*report.notes, *notes))


def _beside_onnx_runtime(
    session: OpenVinoSession, found: Spelled, request: ExportRequest
) -> Iterator[str]:
    """Say how fast FP32 is in ONNX Runtime, whose QDQ the file is."""
    if not request.batches:
        return
    reference = OnnxRuntimeSession(found.reference).run
    for entry in latencies(found.traced, session.run, reference, request.batches):
        yield (
            f"FP32 in ONNX Runtime takes {entry.float_ms:.3g} ms at batch {entry.batch}: "
            f"this is {entry.speedup:.2f}× as fast"
        )


def _in_float(
    session: OpenVinoSession, found: Spelled, request: ExportRequest
) -> Iterator[LeftFloat]:
    """Yield the quantized ops that OpenVINO multiplies in float."""
    owners = dict(_owners(found))
    for kernel in session.products():
        # a product apart from its bias is called "its name/WithoutBiases"
        names = (name.partition("/")[0] for name in kernel.nodes)
        ops = next((owners[name] for name in names if name in owners), ())
        if ops and not kernel.is_integer:
            yield LeftFloat(", ".join(ops), _why_float(request, ops[0], kernel))


def _why_float(request: ExportRequest, op: str, kernel: Kernel) -> str:
    config = request.plan.get(op)
    if config is not None and config.inputs is None:
        return "only its weight is quantized: OpenVINO computes such an op in float"
    if op in request.ops and config is not None:
        why = why_not_in_openvino(request.ops[op], config)
        if why is not None:
            return why
    return f"OpenVINO computes it by {kernel.primitive}"


def _owners(found: Spelled) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of nodes that multiply quantized tensors, with their ops."""
    for node in found.model.model.graph:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"):
            for value in reversed(node.inputs[:2]):
                scale = None if value is None else _scale_behind(value)
                if scale is not None and (ops := found.graph.ops_of(scale)):
                    yield str(node.name), ops
                    break


def _scale_behind(value: ir.Value) -> str | None:
    """Return the name of the scale of what is dequantized to a value, moved about or not."""
    node = value.producer()
    while node is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    return str(node.inputs[1].name)
