"""Spells an ONNX graph the way that OpenVINO fuses it: the same values, fewer passes over memory.

What our graphs and torch.onnx write for every runtime keeps OpenVINO from fusing: an axis that a
product gets and loses stands between it and its bias, a tensor that is only moved about is
quantized again, keys are reshaped to be transposed, and probabilities are searched for NaN that
cannot be there. Without these, dequantization, bias, activation and the next quantization go into
the kernel of a product, and attention becomes one kernel.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tuner.exporters.onnx_file import OnnxModel

_MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "MaxPool")
_EXTREMES = ("ReduceMax", "ReduceMin", "GlobalMaxPool")
_PASSED = ("ReduceMean", "ReduceSum", "Pad")
_PAIR = ("QuantizeLinear", "Clip", "DequantizeLinear")
_IMAGE_ENDS = 8
_TINY = np.float32(1e-30)
_AFFINE = ("Add", "Sub", "Mul", "Div")
_HOSTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization")
"""Ops whose kernels take in what follows them, and quantize right."""


def fusible(model: OnnxModel) -> OnnxModel:
    """Return the model as OpenVINO fuses it; the one that is given changes."""
    graph = model.model.graph
    is_quantized = any(node.op_type == "QuantizeLinear" for node in graph)
    for node in list(graph):
        if is_quantized and (node.op_type in _EXTREMES or _is_merged(node) or _is_passed(node)):
            _part(graph, node)
        if is_quantized and node.op_type == "Concat" and _joins_rows(node):
            _part(graph, node)
        if is_quantized and node.op_type == "Pad":
            _pad_values(graph, node)
        elif node.op_type == "Conv":
            _pad_apart(graph, node)
            if is_quantized:
                _add_bias(graph, node)
        elif node.op_type == "MatMul":
            _drop_axis(node)
            _transpose_keys(graph, node)
        elif node.op_type == "QuantizeLinear":
            _drop_repeated(node)
        elif node.op_type == "DequantizeLinear":
            _drop_zeros(node)
        elif node.op_type == "Where":
            _drop_guard(node)
    RemoveUnusedNodesPass()(model.model)
    for node in list(graph):
        if node.op_type == "Transpose":
            _merge_transposes(node)
    RemoveUnusedNodesPass()(model.model)
    return model


def _is_merged(node: ir.Node) -> bool:
    """Whether constants of each column would be merged into the quantizer that follows."""
    if node.op_type not in _AFFINE:
        return False
    constants = [_constant(node, index) for index in (0, 1)]
    if all(each is None or each.size == 1 for each in constants):
        return False
    readers = [usage.node for usage in node.outputs[0].uses()]
    readers += [usage.node for r in readers if r.op_type == "Clip" for usage in r.outputs[0].uses()]
    if not any(reader.op_type == "QuantizeLinear" for reader in readers):
        return False
    maker = _maker(node, 0 if constants[0] is None else 1)
    if maker is not None and maker.op_type == "Relu":
        maker = _maker(maker, 0)
    return maker is None or maker.op_type not in _HOSTS


def _is_passed(node: ir.Node) -> bool:
    """Whether a number for each column would be moved past a node, to the quantizer behind it."""
    if node.op_type not in _PASSED:
        return False
    maker = _maker(node, 0)
    while maker is not None:
        if maker.op_type in _AFFINE:
            constants = [_constant(maker, index) for index in (0, 1)]
            if any(each is not None and each.size > 1 for each in constants):
                return True
            if all(each is None for each in constants):
                return False
            maker = _maker(maker, 0 if constants[0] is None else 1)
        elif maker.op_type in _MOVING or maker.op_type in _PASSED:
            maker = _maker(maker, 0)
        else:
            return False
    return False


def _joins_rows(node: ir.Node) -> bool:
    """Whether a product reads joined rows: one scale for each has the wrong axis there."""
    joined = node.outputs[0]
    if joined.shape is not None:
        axis = node.attributes["axis"].as_int()
        if axis in (-1, len(joined.shape) - 1):
            return False
    readers = _readers(joined, (*_PAIR, *_MOVING))
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
    bias = _constant(convolution, 2)
    if given is not None and (bias is None or bias.any()):
        return
    if len(result.uses()) + result.is_graph_output() < 2:
        return
    if weight is None or weight.shape is None or not isinstance(weight.shape[0], int):
        return
    tiny = np.full(weight.shape[0], _TINY)
    convolution.resize_inputs(3)
    convolution.replace_input_with(2, _registered(graph, f"{convolution.name}_no_bias", tiny))


def _registered(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
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
    given = _registered(graph, name, np.array([0, 0, *before, 0, 0, *after], np.int64))
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
    if not _is_of_images(pad):
        kept = _kept(values, f"{pad.name}_input")
        graph.insert_before(pad, kept)
        pad.replace_input_with(0, kept.outputs[0])


def _is_of_images(pad: ir.Node) -> bool:
    widths = _listed(pad, 1)
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


def _drop_axis(product: ir.Node) -> None:
    """Multiply x as it is where it gets an axis in front, which the product then loses."""
    widened, narrowed = _maker(product, 0), _sole_user(product.outputs[0])
    if widened is None or widened.op_type != "Unsqueeze" or narrowed is None:
        return
    result = narrowed.outputs[0]
    if narrowed.op_type != "Squeeze" or result.is_graph_output():
        return
    if _listed(widened, 1) == [0] and _listed(narrowed, 1) == [0]:
        product.replace_input_with(0, widened.inputs[0])
        product.outputs[0].shape = result.shape
        result.replace_all_uses_with(product.outputs[0])


def _drop_repeated(quantize: ir.Node) -> None:
    """Drop a quantization of codes that have only been moved: it gives the codes again."""
    moved, clip = quantize.inputs[0], _maker(quantize, 0)
    if clip is not None and clip.op_type == "Clip":
        moved = clip.inputs[0]
    source = None if moved is None else moved.producer()
    while source is not None and source.op_type in _MOVING:
        source = _maker(source, 0)
    first = None if source is None or source.op_type != "DequantizeLinear" else _maker(source, 0)
    if moved is None or first is None or not _are_alike(first, quantize):
        return
    if clip is not None and clip.op_type == "Clip":
        limit = _maker(first, 0)
        if limit is None or not _are_alike(limit, clip):
            return
    for usage in quantize.outputs[0].uses():
        values = usage.node.outputs[0]
        if usage.node.op_type == "DequantizeLinear" and not values.is_graph_output():
            values.replace_all_uses_with(moved)


def _drop_zeros(dequantize: ir.Node) -> None:
    """Leave zero points of a constant out where all are 0: kernels subtract them if they can."""
    codes, zero = dequantize.inputs[0], _constant(dequantize, 2)
    if codes is None or zero is None or zero.astype(np.int32).any():
        return
    source = codes.producer()
    if codes.const_value is not None or (source is not None and source.op_type == "Cast"):
        dequantize.resize_inputs(2)


def _drop_guard(where: ir.Node) -> None:
    """Take probabilities as they are where the mask is finite: then none of them is NaN."""
    guard, softmax, values = _maker(where, 0), _maker(where, 2), where.inputs[2]
    if guard is None or guard.op_type != "IsNaN" or values is None or guard.inputs[0] is not values:
        return
    if softmax is None or softmax.op_type != "Softmax" or where.outputs[0].is_graph_output():
        return
    total = _maker(softmax, 0)
    mask = None if total is None or total.op_type != "Add" else _maker(total, 1)
    if mask is None or mask.op_type != "Where":
        return
    found = [_constant(mask, index) for index in (1, 2)]
    if all(each is not None and np.isfinite(each).all() for each in found):
        where.outputs[0].replace_all_uses_with(values)


def _transpose_keys(graph: ir.Graph, product: ir.Node) -> None:
    """Write (q·c)(k·c)ᵀ, whose keys are transposed as matrices of rank 3, as (q·c²)kᵀ."""
    query, keys = _maker(product, 0), _maker(product, 1)
    if query is None or keys is None or {query.op_type, keys.op_type} != {"Mul"}:
        return
    source, scale = _transposed(keys), _constant(query, 1)
    if source is None or scale is None or scale.size != 1 or query.inputs[1] is not keys.inputs[1]:
        return
    assert source.shape is not None
    axes = list(range(len(source.shape)))
    turned = ir.node("Transpose", [source], {"perm": [*axes[:-2], axes[-1], axes[-2]]})
    constant = _registered(graph, f"{product.name}_scale", scale * scale)
    scaled = ir.node("Mul", [query.inputs[0], constant])
    for index, (node, what) in enumerate(((scaled, "query"), (turned, "keys"))):
        node.name = node.outputs[0].name = f"{product.name}_{what}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(product, node)
        product.replace_input_with(index, node.outputs[0])


def _transposed(scaled: ir.Node) -> ir.Value | None:
    """Return the tensor that a node scales after it was reshaped, transposed, and reshaped."""
    back = _maker(scaled, 0)
    turned = None if back is None or back.op_type != "Reshape" else _maker(back, 0)
    if turned is None or turned.op_type != "Transpose" or _permutation(turned) != [0, 2, 1]:
        return None
    there = _maker(turned, 0)
    if there is None or there.op_type != "Reshape":
        return None
    source = there.inputs[0]
    return None if source is None or source.shape is None else source


def _merge_transposes(second: ir.Node) -> None:
    first = _maker(second, 0)
    if first is not None and first.op_type == "Transpose":
        outer = _permutation(first)
        merged = [outer[axis] for axis in _permutation(second)]
        second.replace_input_with(0, first.inputs[0])
        second.attributes["perm"] = ir.AttrInt64s("perm", merged)


def _permutation(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints())


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.producer()


def _sole_user(value: ir.Value) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _listed(node: ir.Node, index: int) -> list[int] | None:
    found = _constant(node, index)
    return None if found is None else [int(each) for each in found.reshape(-1)]


def _are_alike(first: ir.Node, second: ir.Node) -> bool:
    """Whether two nodes do the same, with the same constants as their second and third inputs."""
    if first.op_type != second.op_type:
        return False
    for index in (1, 2):
        mine, other = _constant(first, index), _constant(second, index)
        if mine is None or other is None or mine.dtype != other.dtype:
            return False
        if not np.array_equal(mine, other):
            return False
    return True
