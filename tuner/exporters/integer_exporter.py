"""The target `integer`: for who simulates or builds hardware that has integers only."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from tuner.errors import ExportError
from tuner.exporters.agreement import agreement
from tuner.exporters.base import Exporter, ExportRequest
from tuner.exporters.integer_graph import Document, GraphWriter
from tuner.exporters.integer_known import why_no_activation, why_no_weight
from tuner.exporters.integer_runner import FORMAT, GRAPH, VERSIONS, WEIGHTS, Runner
from tuner.exporters.integer_values import Integers
from tuner.exporters.report import ExportReport, LayerAgreement, LeftFloat
from tuner.exporters.staging import digest, written
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.plan import Plan
from tuner.qparams import compute_qparams, quantize
from tuner.quantizer import Quantizer
from tuner.schemes import OpConfig

_RECURRENT = ("LSTM", "GRU")
_MOST_STEPS = 1.0


class IntegerExporter(Exporter):
    """Writes a folder of graph.json and weights.safetensors, which `integer_runner` runs.

    Linear, convolutions, transposed ones, products of matrices and look-ups are integer arithmetic;
    what is between them is float where it cannot be folded into multiplier and shift.
    """

    target = "integer"
    rounds_biases = ("Linear", "Conv", "ConvTranspose")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its two files."""
        return GRAPH, WEIGHTS

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why an op's choice is no integer arithmetic, None if it is."""
        if config.is_float:
            return None
        if op.type in _RECURRENT or op.type == "einsum":
            return f"{op.type} is not computed in integers"
        if config.weight is not None and (why := why_no_weight(config.weight)):
            return why
        schemes = [config.input_scheme(i) for i in op.activations]
        for scheme in (*schemes, config.output):
            if scheme is not None and (why := why_no_activation(scheme)):
                return why
        if op.products and any(scheme is None for scheme in schemes):
            return "products need integers on both sides: quantize its inputs too"
        return None

    def check(self, traced: Traced) -> None:
        """Raise ExportError for ops that the runner does not know."""
        GraphWriter(traced, Plan({})).write()

    def export(self, request: ExportRequest) -> ExportReport:
        """Write the folder `request.path`, checked before anything of it is written.

        Raises ExportError where the runner lacks an op or a format, where it does not agree with
        the simulation, or where the folder cannot be written.
        """
        traced = request.traced
        document = GraphWriter(traced, request.plan).write()
        weights = save(document.tensors)
        files = {GRAPH: _graph(traced, document, digest(weights)), WEIGHTS: weights}
        runner = Runner.of(json.loads(files[GRAPH]), load(files[WEIGHTS]))

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            return _run(runner, inputs)

        layers = layer_agreement(traced, runner, document.quantizers)
        check_layers(layers)
        found = agreement(traced, run)
        return ExportReport(
            target=self.target,
            files=written(files, request.path),
            size_bytes=sum(map(len, files.values())),
            float_size_bytes=_float_size(traced) + len(files[GRAPH]),
            agreement=found,
            layers=layers,
            left_float=_left_float(request, document),
            metric=None if request.evaluate is None else request.evaluate(run),
            notes=_notes(document),
        )


def layer_agreement(
    traced: Traced, runner: Runner, names: Sequence[str]
) -> tuple[LayerAgreement, ...]:
    """Return how far each quantized tensor is from the simulation's, all before it being equal.

    `names` are the runner's nodes that quantize, in the order of the traced markers.
    """
    simulation = traced.simulation()
    with torch.no_grad():
        simulation.run(*traced.example.tensors)
    keys = [(node.name, key) for node, key in traced.markers()]
    forced = {
        name: _codes(traced.quantizers[key], simulation.reached[traced_name])
        for name, (traced_name, key) in zip(names, keys, strict=True)
    }
    reached: dict[str, Integers] = {}
    runner.run(*_arrays(traced.example.tensors), forced=forced, reached=reached)
    found = []
    for name, (_, key) in zip(names, keys, strict=True):
        if name in reached and forced[name].codes.size:
            found.append(_difference(key, reached[name], forced[name]))
    return tuple(found)


def _difference(key: str, ours: Integers, theirs: Integers) -> LayerAgreement:
    steps = np.abs(ours.levels * ours.scale / theirs.scale - theirs.levels)
    return LayerAgreement(key, round(float(steps.max()), 3), float((steps < 0.5).mean()))


def _codes(quantizer: Quantizer, x: Tensor) -> Integers:
    """Return what a quantizer makes of a tensor, as the runner has it."""
    scheme = quantizer.scheme
    with torch.no_grad():
        qparams = quantizer.qparams or compute_qparams(x, scheme)
        codes = quantize(x.nan_to_num(), scheme, qparams)
    parts = (qparams.scale, 0 if qparams.zero_point is None else qparams.zero_point)
    scale, zero_point = (_shaped(torch.as_tensor(part), quantizer, x.ndim) for part in parts)
    return Integers(codes.numpy(), scale.numpy(), zero_point.numpy())


def _shaped(part: Tensor, quantizer: Quantizer, axes: int) -> Tensor:
    granularity = quantizer.scheme.granularity
    if part.ndim != 1 or granularity.kind != "per_channel":
        return part
    axis = granularity.axis % axes
    return part.reshape([-1 if i == axis else 1 for i in range(axes)])


def check_layers(layers: Sequence[LayerAgreement]) -> None:
    """Raise ExportError where a quantized tensor is more than one step off."""
    bad = [layer for layer in layers if layer.max_steps > _MOST_STEPS]
    if bad:
        worst = max(bad, key=lambda layer: layer.max_steps)
        raise ExportError(
            f"target integer: {len(bad)} of {len(layers)} quantized tensors are more than one step "
            f"from the simulation, {worst.name} by {worst.max_steps:.3g}: nothing was written. "
            "Leave that op float, or give it fewer bits; where a layer before it has a bias, "
            "OpConfig(bias=…) of the format int32 rounds that in the plan, too"
        )


def _run(runner: Runner, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.from_numpy(np.array(x)) for x in runner.run(*_arrays(inputs))]


def _arrays(inputs: Sequence[Tensor]) -> list[Any]:
    return [tensor.detach().cpu().numpy() for tensor in inputs]


def _graph(traced: Traced, document: Document, weights: str) -> bytes:
    example = traced.example
    inputs = []
    for name, tensor in zip(example.names, example.tensors, strict=True):
        axes = traced.dynamic.get(name, {})
        shape = [axes.get(axis, length) for axis, length in enumerate(tensor.shape)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        inputs.append({"name": name, "dtype": dtype, "shape": shape})
    outputs = zip(traced.outputs, document.outputs, strict=True)
    graph = {
        "format": FORMAT,
        "version": VERSIONS[any("left_shift" in node for node in document.nodes)],
        "weights_sha256": weights,
        "inputs": inputs,
        "outputs": [{"name": name, "node": node} for name, node in outputs],
        "layers": document.layers,
        "nodes": document.nodes,
    }
    return json.dumps(graph, allow_nan=False).encode()


def _float_size(traced: Traced) -> int:
    """Return the size of the graph's parameters and constants in fp32, tied ones once."""
    tensors = [*traced.module.parameters(), *traced.module.buffers()]
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in tensors}
    return 4 * sum(sizes.values())


def _left_float(request: ExportRequest, document: Document) -> tuple[LeftFloat, ...]:
    left = []
    for name, op in request.ops.items():
        config = request.plan.get(name, OpConfig.float())
        if name in document.done or not (op.weights or op.products):
            continue
        why = "the plan leaves it float" if config.is_float else document.left.get(name)
        left.append(LeftFloat(name, why or "the runner computes it in floats"))
    return tuple(left)


def _notes(document: Document) -> tuple[str, ...]:
    notes = ["No latency: the numpy runner is a reference, no fast runtime."]
    if document.layers:
        widest = max(document.layers, key=lambda each: each["accumulator_bits"])
        notes.append(
            f"Accumulators need up to {widest['accumulator_bits']} bits ({widest['op']}); each "
            "node states its own in graph.json."
        )
    fused = sum(node["op"] == "integer.requantize" for node in document.nodes)
    notes.append(
        f"{fused} of {len(document.quantizers)} quantized tensors come from integers by multiplier "
        "and shift, the others from floats."
    )
    return tuple(notes)
