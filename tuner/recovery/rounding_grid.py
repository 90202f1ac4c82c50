"""The values that every element of a weight matrix may take, by column."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner import formats
from tuner.kernels import block_parameter, block_view, clamp_steps, codec_of
from tuner.kernels.codecs import Bound
from tuner.qparams import grid_of
from tuner.ranges import QParams
from tuner.recovery.rounding_matrix import as_matrix
from tuner.schemes import TensorScheme

_TABLE_BITS = 16  # formats of more bits have too many values for a table


@dataclass(frozen=True, eq=False)
class MatrixGrid:
    """Scale and bounds of each element of W, as `[groups, n, out/groups]`, or numbers for all.

    `rounded(Wᵀ)` is what `fake_quantize` makes of the weight, to the bit, also column by column.
    """

    fmt: formats.Format
    scale: Bound
    low: Bound
    high: Bound
    inverse: Bound | None = None

    def column(self, index: int) -> "MatrixGrid":
        """Return the grid of one column of W, for values `[groups, out/groups]`."""
        return self._mapped(lambda value: value[:, index])

    def permuted(self, order: Tensor) -> "MatrixGrid":
        """Return the grid of the columns in another order, `[groups, n]`."""
        return self._mapped(lambda value: permuted(value, order))

    def rounded(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid."""
        return codec_of(self.fmt).round_(self._steps(x), self.low, self.high).mul_(self.scale)

    def beside(self, values: Tensor, upward: Tensor) -> Tensor:
        """Return the next value of the grid above values that lie on it, where `upward`, or below.

        At the ends of the grid it is the value itself; so it is in formats of over 16 bits.
        """
        steps = self._steps(values)
        if self.fmt.kind == "int":
            steps.round_().add_(torch.where(upward, 1.0, -1.0))
            return clamp_steps(steps, self.low, self.high).mul_(self.scale)
        if self.fmt.bits > _TABLE_BITS:
            return values.clone()
        table = _values(self.fmt).to(steps)
        index = torch.bucketize(steps, (table[1:] + table[:-1]) / 2)
        index = (index + torch.where(upward, 1, -1)).clamp_(0, len(table) - 1)
        return table[index].mul_(self.scale)

    def _steps(self, x: Tensor) -> Tensor:
        return torch.div(x, self.scale) if self.inverse is None else x * self.inverse

    def _mapped(self, fn: Callable[[Tensor], Tensor]) -> "MatrixGrid":
        bounds = (self.scale, self.low, self.high, self.inverse)
        mapped: Any = (fn(b) if isinstance(b, Tensor) and b.ndim else b for b in bounds)
        return MatrixGrid(self.fmt, *mapped)


def matrix_grid(
    weight: Tensor, scheme: TensorScheme, qparams: QParams, groups: int, axis: int
) -> MatrixGrid | None:
    """Return the grid of a weight's matrix; None where columns cannot be rounded alone.

    That is so for a format that is a function, which may look at the whole tensor. `groups` and
    `axis` are those of `as_matrix`.
    """
    fmt = formats.get(scheme.format)
    if not fmt.has_codes:
        return None
    grid = grid_of(scheme, qparams, weight)

    def by_element(bound: Bound) -> Bound:
        if not isinstance(bound, Tensor):
            return bound
        if bound.numel() == 1:
            return bound.reshape(())
        fitted = block_parameter(bound, tuple(weight.shape), grid.granularity)
        whole = fitted.expand_as(block_view(weight, grid.granularity)).reshape(weight.shape)
        return as_matrix(whole, groups, axis).transpose(1, 2).contiguous()

    scale, low, high = (by_element(bound) for bound in (grid.scale, grid.low, grid.high))
    inverse = None if grid.inverse is None else by_element(grid.inverse)
    return MatrixGrid(fmt, scale, low, high, inverse)


def permuted(columns: Tensor, order: Tensor) -> Tensor:
    """Return `[groups, n, …]` with the columns of each group in the order `[groups, n]`."""
    return columns.gather(1, order.unsqueeze(-1).expand(-1, -1, columns.shape[-1]))


def _values(fmt: formats.Format) -> Tensor:
    """Return the finite values of a float or codebook format, in growing order."""
    count = len(fmt.codebook) or 2**fmt.bits
    values = codec_of(fmt).decode(torch.arange(count))
    finite: Tensor = values[values.isfinite()].unique()
    return finite
