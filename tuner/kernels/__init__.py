"""The fast paths behind `tuner.qparams`."""

from tuner.kernels.grid import (
    Grid,
    check_floats,
    clamp_steps,
    clamped_steps,
    compute_dtype,
    inside,
    snap,
)
from tuner.kernels.layout import (
    block_parameter,
    block_view,
    flat_view,
    from_rows,
    parameter_shape,
    to_rows,
)

__all__ = [
    "Grid",
    "block_parameter",
    "block_view",
    "check_floats",
    "clamp_steps",
    "clamped_steps",
    "compute_dtype",
    "flat_view",
    "from_rows",
    "inside",
    "parameter_shape",
    "snap",
    "to_rows",
]
