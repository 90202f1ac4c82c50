"""Spells an ONNX graph the way that OpenVINO fuses it: the same values, fewer passes over memory.

What our graphs and torch.onnx write for every runtime keeps OpenVINO from fusing: an axis that a
product gets and loses stands between it and its bias, a tensor that is only moved about is
quantized again, keys are reshaped to be transposed, and probabilities are searched for NaN that
cannot be there. Without these, dequantization, bias, activation and the next quantization go into
the kernel of a product, and attention becomes one kernel.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tuner.exporters.onnx_file import OnnxModel
from tuner.exporters.openvino_values import (
    MOVING,
    constant_of,
    keep_values,
    listed,
    maker_of,
    registered,
)


def fusible(model: OnnxModel) -> OnnxModel:
    """Return the model as OpenVINO fuses it; the one that is given changes."""
    graph = model.model.graph
    is_quantized = any(node.op_type == "QuantizeLinear" for node in graph)
    for node in list(graph):
        keep_values(graph, node, is_quantized)
        if node.op_type == "MatMul":
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


def _drop_axis(product: ir.Node) -> None:
    """Multiply x as it is where it gets an axis in front, which the product then loses."""
    widened, narrowed = maker_of(product, 0), _sole_user(product.outputs[0])
    if widened is None or widened.op_type != "Unsqueeze" or narrowed is None:
        return
    result = narrowed.outputs[0]
    if narrowed.op_type != "Squeeze" or result.is_graph_output():
        return
    if listed(widened, 1) == [0] and listed(narrowed, 1) == [0]:
        product.replace_input_with(0, widened.inputs[0])
        product.outputs[0].shape = result.shape
        result.replace_all_uses_with(product.outputs[0])


def _drop_repeated(quantize: ir.Node) -> None:
    """Drop a quantization of codes that have only been moved: it gives the codes again."""
    moved, clip = quantize.inputs[0], maker_of(quantize, 0)
    if clip is not None and clip.op_type == "Clip":
        moved = clip.inputs[0]
    source = None if moved is None else moved.producer()
    while source is not None and source.op_type in MOVING:
        source = maker_of(source, 0)
    first = None if source is None or source.op_type != "DequantizeLinear" else maker_of(source, 0)
    if moved is None or first is None or not _are_alike(first, quantize):
        return
    if clip is not None and clip.op_type == "Clip":
        limit = maker_of(first, 0)
        if limit is None or not _are_alike(limit, clip):
            return
    for usage in quantize.outputs[0].uses():
        values = usage.node.outputs[0]
        if usage.node.op_type == "DequantizeLinear" and not values.is_graph_output():
            values.replace_all_uses_with(moved)


def _drop_zeros(dequantize: ir.Node) -> None:
    """Leave zero points of a constant out where all are 0: kernels subtract them if they can."""
    codes, zero = dequantize.inputs[0], constant_of(dequantize, 2)
    if codes is None or zero is None or zero.astype(np.int32).any():
        return
    source = codes.producer()
    if codes.const_value is not None or (source is not None and source.op_type == "Cast"):
        dequantize.resize_inputs(2)


def _drop_guard(where: ir.Node) -> None:
    """Take probabilities as they are where the mask is finite: then none of them is NaN."""
    guard, softmax, values = maker_of(where, 0), maker_of(where, 2), where.inputs[2]
    if guard is None or guard.op_type != "IsNaN" or values is None or guard.inputs[0] is not values:
        return
    if softmax is None or softmax.op_type != "Softmax" or where.outputs[0].is_graph_output():
        return
    total = maker_of(softmax, 0)
    mask = None if total is None or total.op_type != "Add" else maker_of(total, 1)
    if mask is None or mask.op_type != "Where":
        return
    found = [constant_of(mask, index) for index in (1, 2)]
    if all(each is not None and np.isfinite(each).all() for each in found):
        where.outputs[0].replace_all_uses_with(values)


def _transpose_keys(graph: ir.Graph, product: ir.Node) -> None:
    """Write (q·c)(k·c)ᵀ, whose keys are transposed as matrices of rank 3, as (q·c²)kᵀ."""
    query, keys = maker_of(product, 0), maker_of(product, 1)
    if query is None or keys is None or {query.op_type, keys.op_type} != {"Mul"}:
        return
    source, scale = _transposed(keys), constant_of(query, 1)
    if source is None or scale is None or scale.size != 1 or query.inputs[1] is not keys.inputs[1]:
        return
    assert source.shape is not None
    axes = list(range(len(source.shape)))
    turned = ir.node("Transpose", [source], {"perm": [*axes[:-2], axes[-1], axes[-2]]})
    constant = registered(graph, f"{product.name}_scale", scale * scale)
    scaled = ir.node("Mul", [query.inputs[0], constant])
    for index, (node, what) in enumerate(((scaled, "query"), (turned, "keys"))):
        node.name = node.outputs[0].name = f"{product.name}_{what}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(product, node)
        product.replace_input_with(index, node.outputs[0])


def _transposed(scaled: ir.Node) -> ir.Value | None:
    """Return the tensor that a node scales after it was reshaped, transposed, and reshaped."""
    back = maker_of(scaled, 0)
    turned = None if back is None or back.op_type != "Reshape" else maker_of(back, 0)
    if turned is None or turned.op_type != "Transpose" or _permutation(turned) != [0, 2, 1]:
        return None
    there = maker_of(turned, 0)
    if there is None or there.op_type != "Reshape":
        return None
    source = there.inputs[0]
    return None if source is None or source.shape is None else source


def _merge_transposes(second: ir.Node) -> None:
    first = maker_of(second, 0)
    if first is not None and first.op_type == "Transpose":
        outer = _permutation(first)
        merged = [outer[axis] for axis in _permutation(second)]
        second.replace_input_with(0, first.inputs[0])
        second.attributes["perm"] = ir.AttrInt64s("perm", merged)


def _permutation(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints())


def _sole_user(value: ir.Value) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _are_alike(first: ir.Node, second: ir.Node) -> bool:
    """Whether two nodes do the same, with the same constants as their second and third inputs."""
    if first.op_type != second.op_type:
        return False
    for index in (1, 2):
        mine, other = constant_of(first, index), constant_of(second, index)
        if mine is None or other is None or mine.dtype != other.dtype:
            return False
        if not np.array_equal(mine, other):
            return False
    return True
