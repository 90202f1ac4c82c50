"""A weight as one matrix a group, and the error of the op's output that a change of it makes."""

import torch
from torch import Tensor

from tuner.errors import SchemeError


def as_matrix(weight: Tensor, groups: int = 1, axis: int = 0) -> Tensor:
    """Return a weight as `[groups, out/groups, in·k]`: what each group multiplies rows of x with.

    `axis` is the weight's axis of output channels: 0 for linear `[out, in]` and convolutions
    `[out, in/groups, …]`, 1 for transposed convolutions `[in, out/groups, …]` and for a right
    factor `[in, out]`. Raises SchemeError for another axis, or groups that do not divide.
    """
    axis = _checked(tuple(weight.shape), groups, axis)
    if axis == 0:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(2)


def as_weight(matrix: Tensor, shape: tuple[int, ...], axis: int = 0) -> Tensor:
    """Return what `as_matrix` made a matrix of: a tensor of the weight's shape."""
    groups = matrix.shape[0]
    if _checked(shape, groups, axis) == 0:
        return matrix.reshape(shape)
    grouped = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
    return grouped.transpose(1, 2).reshape(shape)


def output_errors(delta: Tensor, second: Tensor) -> Tensor:
    """Return `δ H δᵀ` of each row of ΔW `[groups, out/groups, n]`, H `[groups, n, n]`.

    With H = E[x xᵀ] that is the mean square error of each output; the sum over all rows is
    tr(ΔW H ΔWᵀ). The result is `[groups, out/groups]`.
    """
    return ((delta @ second.to(delta)) * delta).sum(-1)


def damped(second: Tensor, damping: float) -> Tensor:
    """Return H with a fraction of the mean of its diagonal, dead inputs left out, added to it.

    It keeps weights whose inputs are hardly seen near what they are.
    """
    diagonal = second.diagonal(dim1=1, dim2=2)
    alive = (diagonal > 0).sum(1, keepdim=True).clamp(min=1)
    return second + torch.diag_embed(
        (damping * diagonal.sum(1, keepdim=True) / alive).expand_as(diagonal)
    )


def checked_second(weight: Tensor, second: Tensor, axis: int) -> Tensor:
    """Return the second moments, detached; raises SchemeError where they do not fit the weight."""
    groups = second.shape[0] if second.ndim == 3 else 0
    if groups:
        width = as_matrix(weight, groups, axis).shape[-1]
        if tuple(second.shape) == (groups, width, width):
            return second.detach()
    raise SchemeError(
        f"second moments of shape {list(second.shape)} do not fit a weight of shape "
        f"{list(weight.shape)} with output channels on axis {axis}: give [groups, in·k, in·k]"
    )


def row_choice(first: Tensor, other: Tensor, exact: Tensor, second: Tensor) -> Tensor:
    """Return, row by row, the one of two roundings of `exact` that has the lower output error.

    All are `[groups, out/groups, n]`. Rows do not depend on each other, so the choice is exact. In
    a tie `first` is taken.
    """
    mine, theirs = (output_errors(rounded - exact, second) for rounded in (first, other))
    return torch.where((theirs < mine).unsqueeze(-1), other, first)


def _checked(shape: tuple[int, ...], groups: int, axis: int) -> int:
    if len(shape) < 2 or axis % len(shape) > 1 or not -len(shape) <= axis < len(shape):
        raise SchemeError(
            f"a weight of shape {list(shape)} with output channels on axis {axis} is no matrix: "
            "give a weight of two or more axes, and axis 0 or 1"
        )
    if groups < 1 or shape[0] % groups:
        raise SchemeError(
            f"{groups} groups do not divide the {shape[0]} channels of a weight of shape "
            f"{list(shape)}"
        )
    return axis % len(shape)
