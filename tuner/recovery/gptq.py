"""GPTQ: round a weight column by column, and make up for each error in the columns to come.

Frantar et al., ICLR 2023 (arXiv 2210.17323), section 3.
"""

import torch
from torch import Tensor

from tuner.ranges import QParams
from tuner.recovery.rounding_grid import MatrixGrid, permuted
from tuner.recovery.rounding_matrix import damped
from tuner.recovery.rounding_problem import RoundingProblem
from tuner.schemes import TensorScheme

DAMPING = 0.01
_BLOCK = 128
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
    damping: float = DAMPING,
    block: int = _BLOCK,
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
    problem = RoundingProblem.of(weight, second, scheme, axis, qparams)
    return problem.solved(solve_by_gptq(problem, act_order, damping, block))


def solve_by_gptq(
    problem: RoundingProblem,
    act_order: bool = True,
    damping: float = DAMPING,
    block: int = _BLOCK,
) -> Tensor | None:
    """Return a solution `[groups, n, out/groups]`, or None where there is none but the nearest."""
    if problem.grid is None or not problem.is_usable:
        return None
    order = column_order(problem.second, act_order)
    upper = _upper_factor(problem.second, damping, order)
    if upper is None:
        return None
    columns = permuted(problem.columns, order).contiguous()
    rounded = _compensated(columns, problem.grid.permuted(order), upper.to(columns), block)
    return permuted(rounded, order.argsort(1))


def column_order(second: Tensor, act_order: bool = True) -> Tensor:
    """Return the order of the columns `[groups, n]`: the largest E[x²] first, or as they are."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=second.device).expand_as(diagonal)


def _upper_factor(second: Tensor, damping: float, order: Tensor) -> Tensor | None:
    """Return U with UᵀU = H⁻¹, of the damped moments in this order; None where they are singular.

    H = R Rᵀ with R upper triangular gives U = R⁻¹ without H⁻¹; R is a Cholesky factor of H with
    rows and columns turned round. In fp64, because the condition number of H may be 1e6.
    """
    hessian = permuted(permuted(second.double(), order).mT, order)
    dead = (hessian.diagonal(dim1=1, dim2=2) <= 0).double()  # a 1 leaves such a column to itself
    for times in _MORE_DAMPING:
        more = damped(hessian, damping * times) + torch.diag_embed(dead)
        lower, info = torch.linalg.cholesky_ex(more.flip(1, 2))
        if not bool(info.any()):
            eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(
                lower, eye.expand_as(lower), upper=False
            )
            return inverse.flip(1, 2)
    return None


def _compensated(columns: Tensor, grid: MatrixGrid, upper: Tensor, block: int) -> Tensor:
    """Round Wᵀ `[groups, n, out/groups]` column by column: algorithm 1 of the paper. Spoils Wᵀ."""
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
