"""Which choices OpenVINO computes with low-precision kernels on CPU: measured, row by row.

Fewer than 8 bits run as 8 bits do, no faster. Weights alone are held in 4 or 8 bits, and become
floats within the product.
"""

from tuner.exporters.kernel_rows import (
    Row,
    codes,
    codes_or_nothing,
    groups_from,
    no_weight,
    nothing,
    rows_of_a_table,
    symmetric_codes,
    symmetric_columns,
    why_not_in,
)
from tuner.ops import Op
from tuner.schemes import OpConfig

_GROUPS = groups_from(1, None, powers_of_two=False)

_ATTENTION = "matmul", "bmm", "scaled_dot_product_attention"

OPENVINO = (
    Row(("Linear", "matmul"), "FullyConnected", codes, symmetric_columns, codes_or_nothing),
    Row(("Conv1d", "Conv2d", "Conv3d"), "Convolution", codes, symmetric_columns, codes_or_nothing),
    Row(_ATTENTION, "MatMul", symmetric_codes, no_weight, codes_or_nothing),
    Row(("Linear", "matmul"), "FullyConnected", nothing, _GROUPS, nothing),
    Row(("Embedding",), "Gather", nothing, rows_of_a_table, nothing),
    Row(("add", "mul"), "Eltwise", codes, no_weight, codes_or_nothing),
    Row(("cat",), "Concatenation", codes, no_weight, codes_or_nothing),
)


def why_not_in_openvino(op: Op, config: OpConfig) -> str | None:
    """Return why OpenVINO has no low-precision kernel for an op's choice, None if it has."""
    return why_not_in(OPENVINO, "OpenVINO", op, config)
