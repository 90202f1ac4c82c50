"""Static scales along one axis of an activation: which slice has which, and what is seen of it.

A scale of PerChannel(axis) belongs to one index of the axis, one of PerGroup(size, axis) or
PerBlock(size) to a run of indices. All other axes share it: a scale that belonged to one sample
and one position of a batch would say nothing of the next batch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from tuner.errors import DataError, SchemeError
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor
from tuner.kernels import parameter_shape, to_rows
from tuner.ranges import QParams, qparams_from_range
from tuner.row_statistics import RowStatistics
from tuner.schemes import TensorScheme

Shape = tuple[int, ...]


def axis_length(shape: Shape, granularity: Granularity) -> int:
    """Return the size of the axis that has scales; raises SchemeError where it is lacking."""
    parameter_shape(shape, granularity)
    return shape[_axis(granularity)]


def slice_count(shape: Shape, granularity: Granularity) -> int:
    """Return how many static scales an activation of this shape has.

    Raises SchemeError where it lacks the axis.
    """
    if isinstance(granularity, PerTensor):
        return 1
    return -(-axis_length(shape, granularity) // _run(granularity))


def slice_rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Return `[slices, n]`: one row for each scale; a ragged last group is filled up with NaN."""
    count, run = slice_count(tuple(x.shape), granularity), _run(granularity)
    rows = to_rows(x, PerChannel(_axis(granularity)))
    missing = count * run - rows.shape[0]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing), value=float("nan"))
    return rows.reshape(count, run * rows.shape[1])


def along_axis(
    scheme: TensorScheme, qparams: QParams, shape: Shape
) -> tuple[TensorScheme, QParams]:
    """Spell static scales of groups, `[groups]`, as one for each index of the axis.

    What is not grouped is returned as it is. `shape` is that of the activation.
    """
    granularity = scheme.granularity
    if not isinstance(granularity, PerGroup | PerBlock):
        return scheme, qparams
    scale, zero_point = qparams.scale, qparams.zero_point
    if not isinstance(scale, Tensor) or not scale.ndim:
        return scheme, qparams
    axis, size = _axis(granularity), granularity.size
    if isinstance(zero_point, Tensor):
        zero_point = zero_point.repeat_interleave(size)[: shape[axis]]
    spread = QParams(scale.repeat_interleave(size)[: shape[axis]], zero_point)
    return scheme.model_copy(update={"granularity": PerChannel(axis)}), spread


class SlicedStatistics:
    """Running statistics of an activation's slices; `where` names the activation in errors."""

    def __init__(self, where: str, granularity: Granularity, methods: Iterable[str]) -> None:
        self._where = where
        self._granularity = granularity
        self._rows = RowStatistics(methods)
        self._first: Shape | None = None
        self._values = 0

    @property
    def count(self) -> int:
        """The number of finite values."""
        return self._rows.count

    @property
    def nonfinite(self) -> int:
        """The number of values that were left out: NaN and ±inf."""
        return self._values - self.count

    def update(self, x: Tensor) -> None:
        """Add one batch; raises DataError where it is longer or shorter along the axis."""
        shape = tuple(x.shape)
        try:
            rows = slice_rows(x.detach(), self._granularity)
        except SchemeError as error:
            raise SchemeError(f"{self._where}: {error}") from error
        self._first = self._first or shape
        self._check(shape, self._first)
        self._values += x.numel()
        self._rows.update(rows)

    def qparams(self, scheme: TensorScheme) -> QParams:
        """Return scale and zero point of each slice, `[slices]`."""
        low, high = (end.float() for end in self._rows.ranges(scheme))
        return qparams_from_range(low, high, scheme)

    def _check(self, shape: Shape, first: Shape) -> None:
        axis = _axis(self._granularity)
        if shape[axis] == first[axis]:
            return
        raise DataError(
            f"{self._where}: {self._granularity!r} has scales along axis {axis}, whose size must "
            f"not change: it was {first[axis]} at first (shape {list(first)}) and is "
            f"{shape[axis]} in a later call (shape {list(shape)}). {_advice(axis % len(shape))}"
        )


def _advice(axis: int) -> str:
    if axis == 0:
        return (
            "Axis 0 is mostly that of the samples, and their number differs between batches: "
            "choose the axis of the channels, such as PerChannel(1) or PerChannel(-1)"
        )
    return (
        "Give batches of one size along it, or another scheme to this op with a Rule: another "
        "axis, PerTensor(), PerToken() or dynamic=True"
    )


def _axis(granularity: Granularity) -> int:
    return granularity.axis if isinstance(granularity, PerChannel | PerGroup) else -1


def _run(granularity: Granularity) -> int:
    return granularity.size if isinstance(granularity, PerGroup | PerBlock) else 1
