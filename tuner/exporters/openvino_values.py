"""Spells an ONNX graph so that OpenVINO computes what it says.

Where quantizers stand around some ops OpenVINO has wrong values, or none: it moves scales past what
they do not pass, merges them into the wrong quantizer, or reads padding that nobody wrote.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "MaxPool")
"""Ops that move values about, and change none."""

_EXTREMES = ("ReduceMax", "ReduceMin", "GlobalMaxPool")
_PASSED = ("ReduceMean", "ReduceSum", "Pad")
_PAIR = ("QuantizeLinear", "Clip", "DequantizeLinear")
_AFFINE = ("Add", "Sub", "Mul", "Div")
_HOSTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization")
"""Ops whose kernels take in what follows them, and quantize right."""

_IMAGE_ENDS = 8
_TINY = np.float32(1e-30)


def keep_values(graph: ir.Graph, node: ir.Node, is_quantized: bool) -> None:
    """Put around a node of a graph what keeps its values as they are."""
    if node.op_type == "Conv":
        _pad_apart(graph, node)
    if not is_quantized:
        return
    if node.op_type in _EXTREMES or _is_merged(node) or _is_passed(node) or _joins_rows(node):
        _part(graph, node)
    if node.op_type == "Pad":
        _pad_values(graph, node)
    elif node.op_type == "Conv":
        _add_bias(graph, node)


def _is_merged(node: ir.Node) -> bool:
    """Whether constants of each column would be merged into the quantizer that follows."""
    if node.op_type not in _AFFINE:
        return False
    constants = [constant_of(node, index) for index in (0, 1)]
    if all(each is None or each.size == 1 for each in constants):
        return False
    readers = [usage.node for usage in node.outputs[0].uses()]
    readers += [usage.node for r in readers if r.op_type == "Clip" for usage in r.outputs[0].uses()]
    if not any(reader.op_type == "QuantizeLinear" for reader in readers):
        return False
    maker = maker_of(node, 0 if constants[0] is None else 1)
    if maker is not None and maker.op_type == "Relu":
        maker = maker_of(maker, 0)
    return maker is None or maker.op_type not in _HOSTS


def _is_passed(node: ir.Node) -> bool:
    """Whether a number for each column would be moved past a node, to the quantizer behind it."""
    if node.op_type not in _PASSED:
        return False
    maker = maker_of(node, 0)
    while maker is not None:
        if maker.op_type in _AFFINE:
            constants = [constant_of(maker, index) for index in (0, 1)]
            if any(each is not None and each.size > 1 for each in constants):
                return True
            if all(each is None for each in constants):
                return False
            maker = maker_of(maker, 0 if constants[0] is None else 1)
        elif maker.op_type in MOVING or maker.op_type in _PASSED:
            maker = maker_of(maker, 0)
        else:
            return False
    return False


def _joins_rows(node: ir.Node) -> bool:
    """Whether a product reads joined rows: one scale for each has the wrong axis there."""
    if node.op_type != "Concat":
        return False
    joined = node.outputs[0]
    if joined.shape is not None:
        axis = node.attributes["axis"].as_int()
        if axis in (-1, len(joined.shape) - 1):
            return False
    readers = _readers(joined, (*_PAIR, *MOVING))
    return any(reader.op_type in ("MatMul", "Gemm") for reader in readers)


def _part(graph: ir.Graph, node: ir.Node) -> None:
    """Keep the quantizer that follows out of a kernel which has wrong values with it."""
    found = node.outputs[0]
    kept = _kept(found, str(node.name))
    graph.insert_after(node, kept)
    for usage in found.uses():
        if usage.node is not kept:
            usage.node.replace_input_with(usage.idx, kept.outputs[0])


def _kept(value: ir.Value, name: str) -> ir.Node:
    """Return a node that gives the same values, and that nothing is fused through."""
    kept = ir.node("Max", [value, value])
    kept.name = kept.outputs[0].name = f"{name}_kept"
    kept.outputs[0].type, kept.outputs[0].shape = value.type, value.shape
    return kept


def _add_bias(graph: ir.Graph, convolution: ir.Node) -> None:
    """Give a convolution that is read twice a bias: without, OpenVINO counts its scales twice.

    It is too small to change a sum, but not 0, which would be dropped.
    """
    weight, result = convolution.inputs[1], convolution.outputs[0]
    given = convolution.inputs[2] if len(convolution.inputs) > 2 else None
    bias = constant_of(convolution, 2)
    if given is not None and (bias is None or bias.any()):
        return
    if len(result.uses()) + result.is_graph_output() < 2:
        return
    if weight is None or weight.shape is None or not isinstance(weight.shape[0], int):
        return
    tiny = np.full(weight.shape[0], _TINY)
    convolution.resize_inputs(3)
    convolution.replace_input_with(2, registered(graph, f"{convolution.name}_no_bias", tiny))


def _pad_apart(graph: ir.Graph, convolution: ir.Node) -> None:
    """Pad in front of a convolution that sees nothing but padding somewhere, and in float.

    What integer kernels subtract there for the zero point of the input is not defined; and strides
    of a kernel of one value are taken before its padding.
    """
    values, pads = convolution.inputs[0], convolution.attributes.get("pads")
    weight = convolution.inputs[1]
    if pads is None or values is None or weight is None or weight.shape is None:
        return
    widths = list(pads.as_ints())
    lengths = [int(length) for length in weight.shape[2:] if isinstance(length, int)]
    if 2 * len(lengths) != len(widths):
        return
    spread = convolution.attributes.get("dilations")
    dilations = [1] * len(lengths) if spread is None else list(spread.as_ints())
    reach = [(length - 1) * d + 1 for length, d in zip(lengths, dilations, strict=True)]
    if all(width < r for width, r in zip(widths, reach * 2, strict=True)):
        return
    before, after = widths[: len(reach)], widths[len(reach) :]
    name = f"{convolution.name}_pads"
    given = registered(graph, name, np.array([0, 0, *before, 0, 0, *after], np.int64))
    padded = ir.node("Pad", [values, given])
    padded.name = padded.outputs[0].name = f"{convolution.name}_padded"
    padded.outputs[0].type = values.type
    kept = _kept(padded.outputs[0], str(padded.name))
    for node in (padded, kept):
        graph.insert_before(convolution, node)
    _pad_values(graph, padded)
    convolution.replace_input_with(0, kept.outputs[0])
    convolution.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(widths))


def _pad_values(graph: ir.Graph, pad: ir.Node) -> None:
    """Pad dequantized values: as codes they would be padded with 0, or pads be misunderstood.

    Padding of images that a convolution takes in is right.
    """
    values, mode = pad.inputs[0], pad.attributes.get("mode")
    if values is None or (mode is not None and mode.as_string() != "constant"):
        return
    if values.dtype in (None, ir.DataType.FLOAT) and not _is_of_images(pad):
        kept = _kept(values, f"{pad.name}_input")
        graph.insert_before(pad, kept)
        pad.replace_input_with(0, kept.outputs[0])


def _is_of_images(pad: ir.Node) -> bool:
    widths = listed(pad, 1)
    if widths is None or len(widths) != _IMAGE_ENDS or min(widths) < 0:
        return False
    if any(widths[axis] for axis in (0, 1, 4, 5)):
        return False
    return {reader.op_type for reader in _readers(pad.outputs[0], _PAIR)} == {"Conv"}


def _readers(value: ir.Value, past: Sequence[str]) -> Iterator[ir.Node]:
    """Yield what reads a value, past nodes of some kinds."""
    for usage in value.uses():
        if usage.node.op_type in past:
            yield from _readers(usage.node.outputs[0], past)
        else:
            yield usage.node


def registered(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    """Return a new constant of a graph."""
    tensor = ir.tensor(numbers, name=name)
    constant = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(numbers.shape),
        const_value=tensor,
    )
    graph.register_initializer(constant)
    return constant


def maker_of(node: ir.Node, index: int) -> ir.Node | None:
    """Return the node that makes an input, None for one of the graph or a constant."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.producer()


def constant_of(node: ir.Node, index: int) -> np.ndarray | None:
    """Return an input that is a constant, None for others."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def listed(node: ir.Node, index: int) -> list[int] | None:
    """Return a constant of whole numbers, flat."""
    found = constant_of(node, index)
    return None if found is None else [int(each) for each in found.reshape(-1)]
