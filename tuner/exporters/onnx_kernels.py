"""Which choices ONNX Runtime computes with low-precision kernels on CPU: measured, row by row.

Fewer than 8 bits run as 8 bits do, no faster. A convolution is one of integers where what it gives
is quantized next.
"""

from tuner.exporters.kernel_rows import (
    Row,
    codes,
    codes_or_nothing,
    columns,
    groups_from,
    no_weight,
    nothing,
    rows_of_a_table,
    why_not_in,
)
from tuner.ops import Op
from tuner.schemes import OpConfig

_GROUPS = groups_from(16, 256, powers_of_two=True)

_ATTENTION = "matmul", "bmm", "scaled_dot_product_attention"

ONNX_RUNTIME = (
    Row(("Linear", "matmul"), "MatMulIntegerToFloat", codes, columns, codes_or_nothing),
    Row(("Conv1d", "Conv2d", "Conv3d"), "QLinearConv", codes, columns, codes_or_nothing),
    Row(_ATTENTION, "MatMulIntegerToFloat", codes, no_weight, codes_or_nothing),
    Row(("Linear", "matmul"), "MatMulNBits", nothing, _GROUPS, nothing),
    Row(("Embedding",), "Gather", nothing, rows_of_a_table, nothing),
    Row(("add",), "QLinearAdd", codes, no_weight, codes_or_nothing),
    Row(("mul",), "QLinearMul", codes, no_weight, codes_or_nothing),
    Row(("cat",), "QLinearConcat", codes, no_weight, codes_or_nothing),
)


def why_not_in_onnx_runtime(op: Op, config: OpConfig) -> str | None:
    """Return why ONNX Runtime has no low-precision kernel for an op's choice, None if it has."""
    return why_not_in(ONNX_RUNTIME, "ONNX Runtime", op, config)
