"""How an ONNX model is stored: 4-bit codes packed, halves as halves, no notes."""

from collections.abc import Iterator

import ml_dtypes
import onnx_ir as ir

from tuner.exporters.onnx_ops import STORED, TENSOR
from tuner.exporters.onnx_weights import FOUR_BITS_READ_AS_EIGHT, HALVES

_HALF_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def store_small(model: ir.Model) -> None:
    """Write constants as small as they are meant to be, in place, and drop notes of the tracer.

    They are changed last: torch.onnx knows no 4-bit integers, and computes what it can before.
    """
    _pack_four_bits(model.graph)
    _halve(model.graph)
    _leave_out_notes(model)


def _leave_out_notes(model: ir.Model) -> None:
    """Drop what the tracer notes of its own."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ends = *model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()
    for value in (*ends, *(made for node in model.graph for made in node.outputs)):
        value.metadata_props.clear()
    for node in model.graph:
        for key in [key for key in node.metadata_props if key != TENSOR]:
            del node.metadata_props[key]


def _pack_four_bits(graph: ir.Graph) -> None:
    """Give each DequantizeLinear of 4-bit codes INT4; what else reads the codes, INT8 of them."""
    packed: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        stored = node.metadata_props.get(STORED)
        if not stored:
            continue
        codes, _, zero_point = node.inputs
        assert codes is not None
        assert zero_point is not None
        small = _packed(graph, codes, packed)
        if stored == FOUR_BITS_READ_AS_EIGHT:
            node.replace_input_with(0, _cast(graph, node, small, ir.DataType.INT8))
        else:
            node.replace_input_with(0, small)
            node.replace_input_with(2, _packed(graph, zero_point, packed))
    for value, small in packed.items():
        for node in list(value.consumers()):
            if node.metadata_props.get(STORED) is None and node.op_type != "DequantizeLinear":
                _replace_input(node, value, _cast(graph, node, small, ir.DataType.INT8))
        _drop_unread(graph, value)


def _packed(graph: ir.Graph, value: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in known:
        assert value.const_value is not None
        codes = value.const_value.numpy().astype(ml_dtypes.int4)
        tensor = ir.Tensor(codes, dtype=ir.DataType.INT4, name=f"{value.name}4")
        known[value] = _initializer(graph, tensor, value.shape)
    return known[value]


def _halve(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        for fmt, ending in HALVES.items():
            if str(value.name).endswith(ending) and value.dtype == ir.DataType.FLOAT:
                assert value.const_value is not None
                dtype = _HALF_TYPES[fmt]
                array = value.const_value.numpy().astype(dtype.numpy())
                tensor = ir.Tensor(array, dtype=dtype, name=f"{value.name}_codes")
                small = _initializer(graph, tensor, value.shape)
                for node in list(value.consumers()):
                    _replace_input(node, value, _cast(graph, node, small, ir.DataType.FLOAT))
                _drop_unread(graph, value)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol, shape: ir.Shape | None) -> ir.Value:
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _cast(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": dtype.value})
    made = node.outputs[0]
    made.type, made.shape = ir.TensorType(dtype), value.shape
    made.name = f"{value.name}_{before.name}"
    graph.insert_before(before, node)
    return made


def _replace_input(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index in _places(node, old):
        node.replace_input_with(index, new)


def _places(node: ir.Node, value: ir.Value) -> Iterator[int]:
    return (index for index, given in enumerate(node.inputs) if given is value)


def _drop_unread(graph: ir.Graph, value: ir.Value) -> None:
    if not value.uses() and not value.is_graph_output():
        del graph.initializers[str(value.name)]
