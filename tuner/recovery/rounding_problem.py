"""The layer-wise rounding problem: a weight, what it multiplies, and the grid that it must fit."""

import logging
from dataclasses import dataclass

from torch import Tensor

from tuner.kernels import compute_dtype
from tuner.qparams import compute_qparams, fake_quantize
from tuner.ranges import QParams
from tuner.recovery.rounding_grid import MatrixGrid, matrix_grid
from tuner.recovery.rounding_matrix import as_matrix, as_weight, checked_second, row_choice
from tuner.schemes import TensorScheme

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoundingProblem:
    """Find Ŵ on the grid of W with a small tr((Ŵ − W) H (Ŵ − W)ᵀ), the error of the op's output.

    `columns` is Wᵀ and `nearest` W rounded to nearest, both `[groups, n, out/groups]` in the dtype
    that is computed in; `second` is H `[groups, n, n]` in the same.
    """

    weight: Tensor
    axis: int
    scheme: TensorScheme
    qparams: QParams
    columns: Tensor
    nearest: Tensor
    second: Tensor
    grid: MatrixGrid | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        second: Tensor,
        scheme: TensorScheme,
        axis: int,
        qparams: QParams | None,
    ) -> "RoundingProblem":
        """Return the problem; raises SchemeError where the moments do not fit the weight."""
        weight = weight.detach()
        dtype = compute_dtype(weight.dtype)
        second = checked_second(weight, second, axis).to(weight.device, dtype)
        qparams = compute_qparams(weight, scheme) if qparams is None else qparams
        nearest = fake_quantize(weight, scheme, qparams)
        grid = matrix_grid(weight, scheme, qparams, len(second), axis)
        columns, rounded = (
            as_matrix(w, len(second), axis).to(dtype).mT.contiguous() for w in (weight, nearest)
        )
        return cls(weight, axis, scheme, qparams, columns, rounded, second, grid)

    @property
    def is_usable(self) -> bool:
        """Whether there is more to do than to round to nearest, in fp32 too."""
        finite = self.second.isfinite().all() & self.weight.isfinite().all()
        return self.grid is not None and bool(finite & (self.second != 0).any())

    def better(self, first: Tensor, other: Tensor) -> Tensor:
        """Return, row by row of W, the one of two solutions that has the lower error."""
        return row_choice(first.mT, other.mT, self.columns.mT, self.second).mT

    def solved(self, solution: Tensor | None) -> tuple[Tensor, QParams]:
        """Return the weight of a solution; rows that are worse than to nearest, and None, are so.

        Half precision has to store what fits the grid, which to round once more makes sure of.
        """
        if solution is None:
            _log.debug("%s weight %s is rounded to nearest", self.scheme.format, self.shape)
            return fake_quantize(self.weight, self.scheme, self.qparams), self.qparams
        chosen = as_weight(self.better(self.nearest, solution).mT, self.shape, self.axis)
        stored = chosen.to(self.weight.dtype)
        return fake_quantize(stored, self.scheme, self.qparams), self.qparams

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.weight.shape)
