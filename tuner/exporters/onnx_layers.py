"""Compares each quantized tensor of an ONNX model with the simulation, alone.

Every QuantizeLinear becomes an output, and what followed it reads the simulated codes instead: an
input. So a runtime's kernels compute between two quantized tensors as they do in the whole model,
and no difference grows from layer to layer.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tuner.exporters.agreement import AS_FAR, disturbed_outputs, output_steps
from tuner.exporters.onnx_activations import is_pair
from tuner.exporters.onnx_file import OnnxModel
from tuner.exporters.onnx_graph import Pair
from tuner.exporters.onnx_ops import TENSOR
from tuner.exporters.report import LayerAgreement
from tuner.exporters.tracing import Traced

Runner = Callable[[OnnxModel], Callable[[Sequence[Tensor]], Sequence[Tensor]]]
"""Loads a model and returns what runs it."""


@torch.no_grad()
def layer_agreement(
    model: OnnxModel, pairs: Sequence[Pair], traced: Traced, load: Runner
) -> tuple[LayerAgreement, ...]:
    """Return how far every integer tensor is from the simulation, in order of execution.

    The model's outputs come last: a step of theirs is 1/127 of their largest magnitude.
    """
    forced, kept = _forced(model.model, pairs)
    simulation = traced.simulation()
    outputs = simulation.run(*traced.example.tensors)
    codes = [_codes(simulation.reached[pair.marker], pair) for pair in kept]
    run = load(OnnxModel(forced))
    found = run([*traced.example.tensors, *codes])
    count = len(traced.outputs)
    inner = zip(kept, codes, found[count:], strict=True)
    return (
        *(_compared(pair, expected, actual) for pair, expected, actual in inner),
        *output_steps(traced, outputs, found[:count]),
    )


@torch.no_grad()
def chaos(traced: Traced) -> dict[str, float]:
    """Return how many steps outputs may be off that rounding within a part reaches.

    Floats of few bits, and codes whose scales come with the inputs, are no place to cut a model:
    what they make of the last bit of a sum grows up to the outputs.
    """
    if all(is_pair(quantizer.scheme) for quantizer in traced.quantizers.values()):
        return {}
    expected = traced.simulate(*traced.example.tensors)
    allowed = dict.fromkeys(traced.outputs, 0.0)
    for moved in disturbed_outputs(traced):
        for layer in output_steps(traced, expected, moved):
            allowed[layer.name] = max(allowed[layer.name], AS_FAR * layer.max_steps)
    return allowed


def _forced(model: ir.Model, pairs: Sequence[Pair]) -> tuple[ir.Model, list[Pair]]:
    """Return the model cut at every QuantizeLinear of integers, and their pairs in order."""
    model = ir.from_proto(ir.to_proto(model))
    nodes = {node.metadata_props.get(TENSOR): node for node in model.graph}
    kept = []
    for pair in pairs:
        # equal ones may have become one
        node = nodes.get(pair.name)
        if node is None:
            continue
        made = node.outputs[0]
        given = ir.Value(name=f"{pair.name}_given", type=made.type, shape=made.shape)
        made.replace_all_uses_with(given)
        model.graph.inputs.append(given)
        model.graph.outputs.append(made)
        kept.append(pair)
    return model, kept


def _codes(x: Tensor, pair: Pair) -> Tensor:
    """Return the codes of a tensor as QuantizeLinear gives them."""
    spelling = pair.spelling
    info = torch.iinfo(spelling.zero_point.dtype)
    low, high = (info.min, info.max) if spelling.codes is None else spelling.codes
    codes = torch.round(x.float() / spelling.scale) + int(spelling.zero_point)
    return codes.clamp(low, high).to(spelling.zero_point.dtype)


def _compared(pair: Pair, expected: Tensor, found: Tensor) -> LayerAgreement:
    low, high = pair.spelling.codes or (-(2**31), 2**31 - 1)
    steps = (found.to(torch.int32).clamp(low, high) - expected.to(torch.int32)).abs()
    if not steps.numel():
        return LayerAgreement(pair.name, 0.0, 1.0)
    return LayerAgreement(pair.name, float(steps.max()), (steps == 0).double().mean().item())
