"""Coordinate descent: round each column anew, given how all others are rounded.

Behdin et al., QuantEase, 2023 (arXiv 2309.01885), section 3.
"""

import torch
from torch import Tensor

from tuner.recovery.gptq import DAMPING, column_order
from tuner.recovery.rounding_grid import MatrixGrid, permuted
from tuner.recovery.rounding_matrix import damped
from tuner.recovery.rounding_problem import RoundingProblem

_BLOCK = 128


def descended(problem: RoundingProblem, start: Tensor, sweeps: int) -> Tensor:
    """Return a solution no worse than `start`, both `[groups, n, out/groups]`, on the damped H.

    With E = H (Ŵ − W)ᵀ, column q becomes `round(ŵ_q − E_q / H_qq)`, the value of the grid that is
    best for it alone: the error falls with each column.
    """
    assert problem.grid is not None
    order = column_order(problem.second)
    back = order.argsort(1)
    hessian = permuted(permuted(damped(problem.second, DAMPING), order).mT, order).contiguous()
    exact, rounded = (permuted(columns, order) for columns in (problem.columns, start))
    grid = problem.grid.permuted(order)
    for _ in range(sweeps):
        _sweep(exact, rounded, hessian, grid)
    return permuted(rounded, back)


def _sweep(exact: Tensor, rounded: Tensor, hessian: Tensor, grid: MatrixGrid) -> None:
    length = exact.shape[1]
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(hessian.dtype).tiny)
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        errors = hessian[:, start:stop] @ (rounded - exact)
        for i in range(start, stop):
            old = rounded[:, i].clone()
            target = old - errors[:, i - start] / diagonal[:, i, None]
            rounded[:, i] = grid.column(i).rounded(target)
            change = (rounded[:, i] - old).unsqueeze(1)
            errors.baddbmm_(hessian[:, start:stop, i, None], change)
