"""GPTQ: round a weight column by column, and make up for each error in the columns to come.

Frantar et al., ICLR 2023 (arXiv 2210.17323), section 3.
"""

import logging

import torch
from torch import Tensor

from tuner.kernels import compute_dtype
from tuner.qparams import compute_qparams, fake_quantize
from tuner.ranges import QParams
from tuner.recovery.rounding_grid import MatrixGrid, matrix_grid, permuted
from tuner.recovery.rounding_matrix import as_matrix, as_weight, checked_second, row_choice
from tuner.schemes import TensorScheme

_log = logging.getLogger(__name__)

_MORE_DAMPING = (1.0, 10.0, 100.0, 1000.0)
"""Times the damping: what is tried where the Hessian stays singular."""


@torch.no_grad()
def gptq(
    weight: Tensor,
    second: Tensor,
    scheme: TensorScheme,
    *,
    axis: int = 0,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    qparams: QParams | None = None,
) -> tuple[Tensor, QParams]:
    """Return a weight rounded to its own grid so that the op's output changes little.

    Args:
        weight: the weight in its own shape, whose output channels are on `axis`, as in WeightRef.
        second: E[x xᵀ] `[groups, in·k, in·k]`, up to a factor.
        scheme: the scales are those that it gives the weight as it is (static groups), so the
            result is a fixed point of `fake_quantize(…, scheme, qparams)`.
        act_order: round the columns with the largest E[x²] first.
        damping: a fraction of the mean of the Hessian's diagonal, added to the diagonal.
        block: columns whose errors are made up for at once in all columns that follow.
        qparams: what `compute_qparams(weight, scheme)` returned, if it is known.

    Rows that come out worse than rounded to nearest, in tr(ΔW H ΔWᵀ), are rounded to nearest; so is
    all of a weight that is not finite, has a format that is a function, or second moments that are
    of no use. Inputs that are always 0 are rounded to nearest. Raises SchemeError where the moments
    do not fit the weight.
    """
    weight, second = weight.detach(), checked_second(weight, second, axis)
    qparams = compute_qparams(weight, scheme) if qparams is None else qparams
    nearest = fake_quantize(weight, scheme, qparams)
    grid = matrix_grid(weight, scheme, qparams, len(second), axis)
    factor = None if grid is None else _Factor.of(second, damping, act_order)
    if grid is None or factor is None or not bool(weight.isfinite().all()):
        _log.debug("%s weight %s is rounded to nearest", scheme.format, list(weight.shape))
        return nearest, qparams
    dtype = compute_dtype(weight.dtype)
    exact, fallback = (as_matrix(w, len(second), axis).to(dtype) for w in (weight, nearest))
    columns = permuted(exact.mT, factor.order).contiguous()
    rounded = _compensated(columns, grid.permuted(factor.order), factor.upper.to(dtype), block)
    back = permuted(rounded, factor.order.argsort(1)).mT
    chosen = as_weight(row_choice(fallback, back, exact, second), tuple(weight.shape), axis)
    return fake_quantize(chosen.to(weight.dtype), scheme, qparams), qparams


class _Factor:
    """The order of the columns, and U with UᵀU = H⁻¹ of the columns in that order."""

    def __init__(self, order: Tensor, upper: Tensor) -> None:
        self.order = order
        self.upper = upper

    @classmethod
    def of(cls, second: Tensor, damping: float, act_order: bool) -> "_Factor | None":
        """Return the factor of the damped second moments; None where they are of no use.

        H = R Rᵀ with R upper triangular gives U = R⁻¹ without H⁻¹; R is a Cholesky factor of H with
        rows and columns turned round. In fp64, because the condition number of H may be 1e6.
        """
        hessian = second.double()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        alive = diagonal > 0
        if not bool(hessian.isfinite().all()) or not bool(alive.any()):
            return None
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        if not act_order:
            order = torch.arange(order.shape[1], device=order.device).expand_as(order)
        hessian = permuted(permuted(hessian, order).mT, order)
        mean = diagonal.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
        dead = (~alive).gather(1, order).double()  # a 1 there leaves such a column to itself
        for times in _MORE_DAMPING:
            more = mean * damping * times + dead
            turned = (hessian + torch.diag_embed(more)).flip(1, 2)
            lower, info = torch.linalg.cholesky_ex(turned)
            if not bool(info.any()):
                eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
                upper = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
                return cls(order, upper.flip(1, 2))
        return None


def _compensated(columns: Tensor, grid: MatrixGrid, upper: Tensor, block: int) -> Tensor:
    """Round Wᵀ `[groups, n, out/groups]` column by column; algorithm 1 of the paper."""
    rounded = torch.empty_like(columns)
    length = columns.shape[1]
    for start in range(0, length, block):
        stop = min(start + block, length)
        errors = torch.empty_like(columns[:, start:stop])
        for i in range(start, stop):
            rounded[:, i] = grid.column(i).rounded(columns[:, i])
            error = (columns[:, i] - rounded[:, i]) / upper[:, i, i, None]
            errors[:, i - start] = error
            columns[:, i:stop].baddbmm_(upper[:, i, i:stop, None], error[:, None], alpha=-1)
        columns[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return rounded
