"""The fast paths behind `tuner.qparams`."""

from tuner.kernels.codecs import Codec, clamp_steps, codec_of
from tuner.kernels.fused import snap_mx
from tuner.kernels.grid import (
    Grid,
    check_floats,
    clamped_steps,
    compute_dtype,
    masked_gradient,
    snap,
    snap_rows,
)
from tuner.kernels.layout import (
    block_parameter,
    block_view,
    flat_view,
    from_rows,
    parameter_shape,
    to_rows,
)
from tuner.kernels.native import MxScale, block_amax, is_functional, is_transformed
from tuner.kernels.summaries import native_summary

__all__ = [
    "Codec",
    "Grid",
    "MxScale",
    "block_amax",
    "block_parameter",
    "block_view",
    "check_floats",
    "clamp_steps",
    "clamped_steps",
    "codec_of",
    "compute_dtype",
    "flat_view",
    "from_rows",
    "is_functional",
    "is_transformed",
    "masked_gradient",
    "native_summary",
    "parameter_shape",
    "snap",
    "snap_mx",
    "snap_rows",
    "to_rows",
]
