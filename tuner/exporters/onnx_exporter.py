"""The `onnx` and `onnxruntime` targets: a QDQ file, checked and measured in ONNX Runtime."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import onnx
import onnxruntime
from torch import Tensor

from tuner.errors import ExportError
from tuner.exporters.agreement import Run, agreement
from tuner.exporters.base import Call, Exporter, ExportRequest
from tuner.exporters.hoisting import hoisted
from tuner.exporters.onnx_activations import why_not_spelled
from tuner.exporters.onnx_codes import inputs_of, without_ends
from tuner.exporters.onnx_file import OnnxModel, to_onnx
from tuner.exporters.onnx_graph import QdqGraph, float_graph, qdq_graph
from tuner.exporters.onnx_kernels import why_not_in_onnx_runtime
from tuner.exporters.onnx_layers import chaos, layer_agreement
from tuner.exporters.onnx_runtime import SETTINGS, OnnxRuntimeSession, optimized_graph
from tuner.exporters.onnx_saturation import make_exact, overflowing, saturates
from tuner.exporters.onnx_weights import why_not_stored
from tuner.exporters.probes import apart
from tuner.exporters.report import ExportReport, LayerAgreement, LeftFloat
from tuner.exporters.saturation import advice, warning
from tuner.exporters.staging import file_of
from tuner.exporters.timing import latencies
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.schemes import OpConfig

SUFFIX = ".onnx"
_MOST_STEPS = 1.0
_OF_SETTINGS = "MatMulNBits"  # what the session options of SETTINGS speak of
_PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")


class OnnxExporter(Exporter):
    """QDQ for any runtime that reads ONNX, TensorRT's explicit quantization among them."""

    target = "onnx"
    suffix = SUFFIX
    reads_sums = True
    checked_by = "onnxruntime"

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why ONNX cannot say what an op's choice does, None if it can."""
        schemes = [config.input_scheme(i) for i in op.activations]
        schemes += [config.output]
        found = [why_not_spelled(scheme) for scheme in schemes if scheme is not None]
        found += [why_not_stored(config.weight)] if config.weight is not None else []
        return next((why for why in found if why is not None), None)

    def check(self, traced: Traced) -> None:
        """Raise ExportError where a model cannot be written as ONNX, or ONNX Runtime not run it."""
        check_float(traced, OnnxRuntimeSession)

    def export(self, request: ExportRequest) -> ExportReport:
        """Write the file, check it layer by layer and as a whole, and time it beside FP32.

        Where integer kernels would overflow on this CPU, it is checked without them.
        """
        found = spelled(request)
        count = overflowing(found.model, found.graph)
        unfused = partial(OnnxRuntimeSession, optimized=False) if count and _saturates() else None
        report = written(found, request, self.target, OnnxRuntimeSession, check=unfused)
        if not count:
            return report
        told = f"Checked without integer kernels: for {count} weights {advice('onnxruntime')}"
        note = warning(count) if unfused is None else told
        return replace(report, notes=(*report.notes, note))


class OnnxRuntimeExporter(OnnxExporter):
    """QDQ as ONNX Runtime is fastest with, and a look at what it computes with integers."""

    target = "onnxruntime"
    rounds_biases = ("Conv",)
    is_exact_at_a_cost = True

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why ONNX Runtime has no low-precision kernel for a choice, None if it has."""
        return why_not_in_onnx_runtime(op, config)

    @property
    def saturates(self) -> bool:
        """Whether its kernels for signed weights overflow on this CPU."""
        return _saturates()

    @property
    def runtime(self) -> str:
        """ONNX Runtime and its version."""
        return f"onnxruntime-{onnxruntime.__version__}"

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        """Return a call that runs a traced model on its example, with codes where it is told so."""
        prepared = hoisted(traced)
        graph = qdq_graph(prepared, quick=True)
        model = to_onnx(graph.module, prepared)
        if self.saturates:
            make_exact(model, graph)
        if on_codes:
            model = without_ends(model)
        session = model.load(OnnxRuntimeSession)
        inputs = inputs_of(model, traced.example.with_batch(batch).tensors)
        return partial(session.run, inputs)

    def export(self, request: ExportRequest) -> ExportReport:
        """Do what the onnx target does, and tell what ONNX Runtime computes in float."""
        found = spelled(request, quick=True)
        if self.saturates:
            count = len(make_exact(found.model, found.graph))
        else:
            count = overflowing(found.model, found.graph)
        report = written(found, request, self.target, OnnxRuntimeSession)
        optimized = optimized_graph(report.files[0])
        left = _in_float(optimized, request, found.graph)
        notes = report.notes
        if any(node.op_type == _OF_SETTINGS for node in optimized.node):
            told = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
            notes = (*notes, f"Checked and timed with session options {told}: take them, too")
        if count:
            slower = f"Up to {count} weights have slower kernels, as {advice(self.target)}"
            notes = (*notes, slower if self.saturates else warning(count))
        return replace(report, left_float=merged(report.left_float, left), notes=notes)


@cache
def _saturates() -> bool:
    return saturates(OnnxRuntimeSession)


@dataclass(frozen=True, eq=False)
class Spelled:
    """A quantized model as ONNX, not written yet, and its FP32 counterpart."""

    traced: Traced
    graph: QdqGraph
    model: OnnxModel
    reference: OnnxModel


class Session(Protocol):
    """A model that a runtime has loaded."""

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]: ...


def spelled(request: ExportRequest, clips_values: bool = False, quick: bool = False) -> Spelled:
    """Return a model as QDQ; for `clips_values` and `quick` see `qdq_graph`."""
    traced = hoisted(request.traced)
    graph = qdq_graph(traced, clips_values, quick)
    reference = to_onnx(float_graph(traced), traced)
    return Spelled(traced, graph, to_onnx(graph.module, traced), reference)


def written(
    found: Spelled,
    request: ExportRequest,
    target: str,
    load: Callable[[Path | bytes], Session],
    baselines: Mapping[str, Run] | None = None,
    check: Callable[[Path | bytes], Session] | None = None,
) -> ExportReport:
    """Write the file that a runtime loads, once it agrees layer by layer; check and time it.

    `baselines` are timed beside it, as FP32 in the same runtime is. `check` loads what is compared
    with the simulation, where that is not what is timed.
    """
    traced = found.traced
    checks = check or load
    layers = layer_agreement(found.model, found.graph.pairs, traced, lambda m: m.load(checks).run)
    _refuse_apart(layers, traced)
    files = found.model.save(file_of(request.path, SUFFIX))
    session = load(files[0])
    checked = session if check is None else check(files[0])
    plain = found.reference.load(load).run
    return ExportReport(
        target=target,
        files=files,
        size_bytes=sum(path.stat().st_size for path in files),
        float_size_bytes=found.reference.size_bytes,
        agreement=agreement(request.traced, checked.run),
        layers=layers,
        latency=latencies(traced, session.run, plain, request.batches, baselines),
        left_float=found.graph.left_float,
        metric=None if request.evaluate is None else request.evaluate(checked.run),
    )


def check_float(
    traced: Traced,
    load: Callable[[Path | bytes], Session],
    spell: Callable[[OnnxModel], OnnxModel] = lambda model: model,
) -> None:
    """Raise ExportError where a runtime does not run the FP32 model as it is, spelled for it."""
    session = spell(to_onnx(float_graph(traced), traced)).load(load)
    tensors = traced.example.tensors
    if (why := apart(traced.simulate(*tensors), session.run(tensors))) is not None:
        raise ExportError(f"the runtime computes this model otherwise than PyTorch: {why}")


def merged(first: Iterable[LeftFloat], second: Iterable[LeftFloat]) -> tuple[LeftFloat, ...]:
    """Return both, an op with its first reason only."""
    found: dict[str, LeftFloat] = {}
    for left in (*first, *second):
        found.setdefault(left.op, left)
    return tuple(found.values())


def _refuse_apart(layers: Iterable[LayerAgreement], traced: Traced) -> None:
    far = [layer for layer in layers if layer.max_steps > _MOST_STEPS]
    allowed = chaos(traced) if far else {}
    for layer in far:
        if layer.max_steps > allowed.get(layer.name, 0.0):
            raise ExportError(
                f"{layer.name} is {layer.max_steps:.0f} quantization steps from the simulation "
                f"({layer.equal:.2%} of its codes are equal): nothing was written. Either the "
                "runtime has no exact kernel for what comes before it: leave that float, or choose "
                "another format. Or, on a CPU without VNNI, products of 8 bits overflow: give the "
                "weights reduce_range=True"
            )


def _in_float(
    optimized: onnx.GraphProto, request: ExportRequest, graph: QdqGraph
) -> Iterator[LeftFloat]:
    """Yield the ops that ONNX Runtime computes in float: weights that it dequantizes."""
    makers = {name: node for node in optimized.node for name in node.output}
    for node in optimized.node:
        if node.op_type not in _PRODUCTS:
            continue
        sources = [makers[name] for name in reversed(node.input[:2]) if name in makers]
        dequantized = [s for s in sources if s.op_type == "DequantizeLinear"]
        if dequantized:
            # a weight's own op comes before those that share an input
            owners = [ops for s in dequantized if (ops := graph.ops_of(s.input[1]))]
            ops = owners[0] if owners else (node.name,)
            yield LeftFloat(", ".join(ops), _why_float(request, ops[0]))


def _why_float(request: ExportRequest, op: str) -> str:
    config = request.plan.get(op)
    if config is not None and op in request.ops:
        why = why_not_in_onnx_runtime(request.ops[op], config)
        if why is not None:
            return why
        if request.ops[op].type.startswith("Conv"):
            return "what it gives goes on in float: integer convolutions are between quantizers"
    return "ONNX Runtime has no integer kernel for it as it stands"
