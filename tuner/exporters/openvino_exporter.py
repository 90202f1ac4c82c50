"""The `openvino` target: the same QDQ file, checked and measured in OpenVINO."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version

import onnx_ir as ir
import torch

from tuner.errors import ExportError
from tuner.exporters.agreement import Run
from tuner.exporters.base import Call, Exporter, ExportRequest
from tuner.exporters.hoisting import hoisted
from tuner.exporters.onnx_codes import inputs_of, without_ends
from tuner.exporters.onnx_exporter import SUFFIX, Spelled, check_float, merged, spelled, written
from tuner.exporters.onnx_file import to_onnx
from tuner.exporters.onnx_graph import float_graph, qdq_graph
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.onnx_saturation import PASSED, make_exact, overflowing, saturates
from tuner.exporters.openvino_graph import fusible
from tuner.exporters.openvino_kernels import better_in_float, why_not_in_openvino
from tuner.exporters.openvino_runtime import SETTINGS, Kernel, OpenVinoSession
from tuner.exporters.probes import named
from tuner.exporters.report import ExportReport, LeftFloat
from tuner.exporters.saturation import advice, products_overflow, warning
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.schemes import OpConfig

_LINEAR = torch.ops.aten.linear.default
_TOLD = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())


class OpenVinoExporter(Exporter):
    """A QDQ file for OpenVINO: of fewer bits the values are clipped, which its kernels take in."""

    target = "openvino"
    suffix = SUFFIX
    reads_sums = True
    adds_before_rounding = True

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why OpenVINO has no low-precision kernel for an op's choice, None if it has."""
        return why_not_in_openvino(op, config)

    def check(self, traced: Traced) -> None:
        """Raise ExportError where OpenVINO does not run a model, or not once it is quantized."""
        check_float(traced, OpenVinoSession, fusible)
        if (why := next(_misread(traced), None)) is not None:
            raise ExportError(why)

    @property
    def saturates(self) -> bool:
        """Whether its integer kernels overflow on this CPU."""
        return _saturates()

    @property
    def runtime(self) -> str:
        """OpenVINO and its version."""
        return f"openvino-{version('openvino')}"

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        """Return a call that runs a traced model on its example, with codes where it is told so."""
        prepared = hoisted(traced)
        graph = qdq_graph(prepared, clips_values=True)
        model = to_onnx(graph.module, prepared)
        if self.saturates:
            make_exact(model, graph)
        model = fusible(model)
        if on_codes:
            model = without_ends(model)
        session = model.load(OpenVinoSession)
        return partial(session.run, inputs_of(model, traced.example.with_batch(batch).tensors))

    def export(self, request: ExportRequest) -> ExportReport:
        """Write the file, check it in OpenVINO layer by layer and as a whole, and time it."""
        if self.saturates:
            _refuse_products(request)
        found, count, floats = _spelled(request, self.saturates)
        baselines = _baselines(found.traced) if request.batches else {}
        report = written(found, request, self.target, OpenVinoSession, baselines)
        session = OpenVinoSession(report.files[0])
        session.run(found.traced.example.tensors)
        left = merged(floats, _in_float(session, found, request))
        notes = (
            *report.notes,
            *_better_in_float(request),
            f"Checked and timed with {_TOLD}: give them to compile_model, too",
            *([warning(count)] if count else []),
        )
        return replace(report, left_float=merged(report.left_float, left), notes=notes)


@cache
def _saturates() -> bool:
    return saturates(OpenVinoSession)


def _misread(traced: Traced) -> Iterator[str]:
    """Say what OpenVINO computes in FP32, but wrongly or not at all with quantizers before it."""
    for name, tensor in named(traced.example):
        if tensor.dtype == torch.float64:
            yield (
                f"OpenVINO quantizes nothing that comes from float64, as input {name!r} is: let "
                "the model take float32"
            )
    for node in traced.module.graph.find_nodes(op="call_function", target=_LINEAR):
        if node.args[0].meta["val"].ndim == 1:
            yield (
                f"OpenVINO gives quantized layers of one vector [{node.args[0].meta['val'].numel()}"
                "] an axis more: let the model take a batch of them"
            )


def _better_in_float(request: ExportRequest) -> Iterator[str]:
    """Say of which ops the space for OpenVINO has no choice but FP32, and why."""
    reasons: dict[str, list[str]] = {}
    for name, op in request.ops.items():
        why = better_in_float(op)
        config = request.plan.get(name)
        if why is not None and (config is None or config.is_float):
            reasons.setdefault(f"OpenVINO computes {op.type} in float: {why}", []).append(name)
    yield from (f"{why} ({len(names)} ops)" for why, names in reasons.items())


def _refuse_products(request: ExportRequest) -> None:
    """Raise ExportError for products of two activations whose sums overflow."""
    for name, op in request.ops.items():
        config = request.plan.get(name)
        if config is None or op.weights or op.type not in ("matmul", "bmm"):
            continue
        first, second = (config.input_scheme(index) for index in op.activations)
        if first is None or second is None or second.quant_range[0] >= 0:
            continue
        if products_overflow(first, second):
            raise ExportError(
                f"{name} ({op.type}): OpenVINO adds products of 8-bit codes in 16 bits on this "
                "CPU, where those of two activations overflow: give input 1 reduce_range=True"
            )


def _spelled(request: ExportRequest, saturates: bool) -> tuple[Spelled, int, list[LeftFloat]]:
    """Return a model and its FP32 counterpart, both as OpenVINO fuses them.

    Return as well how many of its weights overflow on other CPUs, and which are float on this one.
    """
    found = spelled(request, clips_values=True)
    changed = make_exact(found.model, found.graph) if saturates else ()
    count = 0 if saturates else overflowing(found.model, found.graph)
    ops = (", ".join(found.graph.ops_of(scale)) for scale in changed)
    floats = [LeftFloat(names, advice(OpenVinoExporter.target)) for names in ops]
    fused = replace(found, model=fusible(found.model), reference=fusible(found.reference))
    return fused, count, floats


def _baselines(traced: Traced) -> dict[str, Run]:
    """Return FP32 in ONNX Runtime, whose QDQ the file is."""
    plain = to_onnx(float_graph(traced), traced)
    return {"FP32 in ONNX Runtime": plain.load(OnnxRuntimeSession).run}


def _in_float(
    session: OpenVinoSession, found: Spelled, request: ExportRequest
) -> Iterator[LeftFloat]:
    """Yield the quantized ops that OpenVINO does not show to multiply integers."""
    # a product apart from its bias is called "its name/WithoutBiases"
    kernels = {name.partition("/")[0]: k for k in session.products() for name in k.nodes}
    for names, ops in _owners(found):
        kernel = next((kernels[name] for name in names if name in kernels), None)
        why = _why_float(request, ops[0], kernel)
        if why is not None:
            yield LeftFloat(", ".join(ops), why)


def _why_float(request: ExportRequest, op: str, kernel: Kernel | None) -> str | None:
    """Return why an op is not computed as the plan says, None where the kernel shows that it is."""
    if kernel is not None and kernel.is_integer:
        return None
    config = request.plan.get(op)
    if config is not None and config.inputs is None:
        if kernel is not None and kernel.reads_codes:
            return None
        return "only its weight is quantized: OpenVINO makes floats of it when it loads the model"
    if op in request.ops and config is not None:
        why = why_not_in_openvino(request.ops[op], config)
        if why is not None:
            return why
    if kernel is None:
        return "OpenVINO makes one kernel of it and its neighbours, and does not show which numbers"
    return f"OpenVINO computes it by {kernel.primitive}"


def _owners(found: Spelled) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Yield what OpenVINO may call nodes that multiply quantized tensors, with their ops."""
    for node in found.model.model.graph:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"):
            for value in reversed(node.inputs[:2]):
                scale = None if value is None else _scale_behind(value)
                if scale is not None and (ops := found.graph.ops_of(scale)):
                    yield list(_names(node)), ops
                    break


def _names(product: ir.Node) -> Iterator[str]:
    """Yield the names of a product: its own, that of the sum with its bias, those of outputs."""
    result = product.outputs[0]
    users = [usage.node for usage in result.uses()]
    for node in (product, *(user for user in users if user.op_type == "Add" and len(users) == 1)):
        yield str(node.name)
        if node.outputs[0].is_graph_output():
            yield str(node.outputs[0].name)


def _scale_behind(value: ir.Value) -> str | None:
    """Return the name of the scale of what is dequantized to a value, moved about or not."""
    node = value.producer()
    while node is not None and node.op_type in PASSED and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    return str(node.inputs[1].name)
