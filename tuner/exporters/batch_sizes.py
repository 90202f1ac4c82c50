"""At which batch sizes a traced model can be timed."""

import math
import os
from collections.abc import Iterable

from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.timing import takes_batch
from tuner.exporters.tracing import Traced


def checked_sizes(batches: object, example: Example) -> tuple[int, ...]:
    """Return batch sizes as a tuple.

    Raises ExportError for what is none, and for those at which the inputs alone fill the memory.
    """
    sizes = tuple(batches) if isinstance(batches, Iterable) else (None,)
    if not all(isinstance(size, int) and size is not True and size > 0 for size in sizes):
        raise ExportError(f"batches is {batches!r}: give a tuple of batch sizes from 1, or ()")
    sample = sum(tensor.nbytes for tensor in example.tensors) / example.batch
    for size in sizes:
        if size * sample > _memory_bytes():
            raise ExportError(
                f"inputs of a batch of {size} take {size * sample / 2**30:,.0f} GiB, more than "
                "this machine has: give smaller batch sizes"
            )
    return sizes


def _memory_bytes() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # no POSIX system
        return math.inf


def check_batch(traced: Traced, size: int) -> None:
    """Raise ExportError where a traced model cannot be run at a batch size."""
    if not takes_batch(traced, size):
        own = traced.example.batch
        raise ExportError(
            f"the model computes with the batch of {own} as a constant: it cannot be timed at "
            f"{size}. Time it at {own}, give calibration batches of {size}, or mend the model"
        )
