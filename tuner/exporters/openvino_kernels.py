"""Which choices OpenVINO computes with low-precision kernels on CPU: measured, row by row.

Fewer than 8 bits run as 8 bits do, no faster. Weights alone are held in 4 or 8 bits, and become
floats within the product.

Attention is float on purpose. Its kernel for FP32 holds both products and the softmax; with q, k, v
and probabilities in 8 bits only the second product is one of integers (the first operand of a
product must not be negative), and on a Xeon with AMX MiniLM takes 1.07 times as long at batch 1 and
1.13 times at batch 8, a char LM of 4 heads 1.01 and 1.02 times.
"""

from tuner.exporters.kernel_rows import (
    Row,
    codes,
    codes_or_nothing,
    groups_from,
    no_weight,
    nothing,
    rows_of_a_table,
    symmetric_columns,
    unsigned_by_signed,
    why_not_in,
)
from tuner.ops import Op
from tuner.schemes import OpConfig

_GROUPS = groups_from(1, None, powers_of_two=False)

_FLOAT = {
    "scaled_dot_product_attention": "its kernel for attention in FP32 is the faster one: of "
    "quantized attention it computes the first product in float all the same"
}
"""Type of an op → why it is better left in float, though there are kernels for parts of it."""

OPENVINO = (
    Row(("Linear", "matmul"), "FullyConnected", codes, symmetric_columns, codes_or_nothing),
    Row(("Conv1d", "Conv2d", "Conv3d"), "Convolution", codes, symmetric_columns, codes_or_nothing),
    Row(("matmul", "bmm"), "MatMul", unsigned_by_signed, no_weight, codes_or_nothing),
    Row(("Linear", "matmul"), "FullyConnected", nothing, _GROUPS, nothing),
    Row(("Embedding",), "Gather", nothing, rows_of_a_table, nothing),
    Row(("add", "mul"), "Eltwise", codes, no_weight, codes_or_nothing),
    Row(("cat",), "Concatenation", codes, no_weight, codes_or_nothing),
)


def why_not_in_openvino(op: Op, config: OpConfig) -> str | None:
    """Return why OpenVINO has no low-precision kernel for an op's choice, None if it has."""
    if op.type in _FLOAT:
        return f"OpenVINO: {_FLOAT[op.type]}"
    return why_not_in(OPENVINO, "OpenVINO", op, config)


def better_in_float(op: Op) -> str | None:
    """Return why OpenVINO is faster with an op in float than with any choice for it."""
    return _FLOAT.get(op.type)
