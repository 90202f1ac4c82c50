"""The functions of statistics.c on tensors."""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.histogram import BINS
from tuner.kernels.build import library
from tuner.kernels.native import SUFFIX, takes

_PIECE = 1 << 18  # values; tensors are cut by their size alone, so that sums are repeatable
_MOST_PIECES = 16
_MOST_VALUES = 2**32 - 1


class RawSummary(ctypes.Structure):
    """What `statistics.c` says of a tensor, the histogram apart; see TensorSummary."""

    total: float
    total_abs: float
    total_squared: float
    count: int
    zeros: int
    nonfinite: int
    exponent: int
    low: float
    high: float
    _fields_ = (
        *((name, ctypes.c_double) for name in ("total", "total_abs", "total_squared")),
        *((name, ctypes.c_int64) for name in ("count", "zeros", "nonfinite")),
        ("exponent", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("low", "high")),
    )


def native_summary(values: Tensor) -> tuple[RawSummary, NDArray[np.int64]] | None:
    """Return the summary and the histogram's counts of `[n]`; None if only torch can do it."""
    if not takes(values) or not values.is_contiguous() or values.numel() > _MOST_VALUES:
        return None
    pieces = min(max(values.numel() // _PIECE, 1), _MOST_PIECES)
    states = np.zeros(pieces * _state_bytes(), dtype=np.uint8)
    counts = np.zeros(BINS, dtype=np.int64)
    summary = RawSummary()
    _function(values.dtype)(
        values.data_ptr(),
        values.numel(),
        pieces,
        states.ctypes.data,
        ctypes.addressof(summary),
        counts.ctypes.data,
    )
    return summary, counts


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library(), f"summarize_{SUFFIX[dtype]}")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, number, number, pointer, pointer, pointer)  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function


@cache
def _state_bytes() -> int:
    loaded = library()
    assert loaded is not None
    loaded.state_bytes.restype = ctypes.c_int64
    return int(loaded.state_bytes())
