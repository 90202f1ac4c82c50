"""How a granularity cuts a tensor into rows that share one scale."""

import torch
from torch import Tensor

from tuner.errors import SchemeError
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor

Shape = tuple[int, ...]

_GROUPED = (PerGroup, PerBlock)
_WITH_AXIS = (PerChannel, PerGroup)


def parameter_shape(shape: Shape, granularity: Granularity) -> Shape:
    """Return the shape of scale and zero point for a tensor of this shape.

    per-tensor `[]`; per-channel `[C]`; per-group the shape with its axis replaced by
    `ceil(n / size)`; per-token the shape with a last axis of 1.
    Raises SchemeError when the tensor has no such axis.
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = _axis(shape, granularity)
    if isinstance(granularity, PerChannel):
        return (shape[axis],)
    size = _group_size(granularity)
    groups = 1 if size is None else -(-shape[axis] // size)
    return (*shape[:axis], groups, *shape[axis + 1 :])


def to_rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Return `[rows, n]`: one row for each scale; a ragged last group is filled up with NaN."""
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    axis = _axis(tuple(x.shape), granularity)
    if isinstance(granularity, PerChannel):
        return _as_matrix(x.movedim(axis, 0) if axis else x, x.shape[axis])
    if axis != x.ndim - 1:
        x = x.movedim(axis, -1)
    size = _group_size(granularity) or x.shape[-1]
    missing = -x.shape[-1] % size if size else 0
    if missing:
        x = torch.nn.functional.pad(x, (0, missing), value=float("nan"))
    return _as_matrix(x, x.numel() // size if size else x.shape[:-1].numel())


def from_rows(parameter: Tensor, shape: Shape, granularity: Granularity) -> Tensor:
    """Give a parameter with one value a row, `[rows]`, the shape of `parameter_shape`."""
    target = parameter_shape(shape, granularity)
    if isinstance(granularity, PerTensor | PerChannel):
        return parameter.reshape(target)
    axis = _axis(shape, granularity)
    if axis == len(shape) - 1:
        return parameter.reshape(target)
    moved = (*target[:axis], *target[axis + 1 :], target[axis])
    return parameter.reshape(moved).movedim(-1, axis)


def block_view(x: Tensor, granularity: Granularity) -> Tensor:
    """Return a view of `x` against which `block_parameter` broadcasts."""
    size = _group_size(granularity)
    if size is None:
        return x
    axis = _axis(tuple(x.shape), granularity)
    return torch.unflatten(x, axis, (-1, size)) if _is_even(x.shape[axis], size) else x


def block_parameter(parameter: Tensor, shape: Shape, granularity: Granularity) -> Tensor:
    """Shape scale or zero point so that it broadcasts against `block_view`.

    Raises SchemeError when it has another shape than `parameter_shape` says.
    """
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    expected = parameter_shape(shape, granularity)
    if tuple(parameter.shape) != expected:
        raise SchemeError(
            f"scale or zero point of shape {list(parameter.shape)} does not fit a tensor of shape "
            f"{list(shape)} with {granularity!r}: expected {list(expected)}, or a number"
        )
    if isinstance(granularity, PerTensor):
        return parameter
    axis = _axis(shape, granularity)
    if isinstance(granularity, PerChannel):
        return parameter.reshape((-1,) + (1,) * (len(shape) - axis - 1))
    size = _group_size(granularity)
    if size is None:
        return parameter
    if _is_even(shape[axis], size):
        return parameter.unsqueeze(axis + 1)
    return parameter.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])


def flat_view(x: Tensor) -> Tensor:
    """Return all values of `x` as `[n]`: a view in memory order if `x` has no gaps, else a copy."""
    if x.is_contiguous():
        return x.view(-1)
    if torch.empty_like(x, device="meta").stride() == x.stride():
        return x.as_strided((x.numel(),), (1,))
    return x.reshape(-1)


def _group_size(granularity: Granularity) -> int | None:
    return granularity.size if isinstance(granularity, _GROUPED) else None


def _is_even(length: int, size: int) -> bool:
    return length > 0 and length % size == 0


def _as_matrix(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, x.numel() // rows if rows else 0)


def _axis(shape: Shape, granularity: Granularity) -> int:
    axis = granularity.axis if isinstance(granularity, _WITH_AXIS) else -1
    if not -len(shape) <= axis < len(shape):
        raise SchemeError(
            f"{granularity!r} does not fit a tensor of shape {list(shape)}: "
            f"axis {axis} does not exist; choose one from {-len(shape)} to {len(shape) - 1}"
            if shape
            else f"{granularity!r} does not fit a 0-d tensor: use PerTensor()"
        )
    return axis % len(shape)
