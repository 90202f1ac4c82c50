"""AdaRound: learn for each weight whether it is rounded up or down.

Nagel et al., ICML 2020 (arXiv 2004.10568), section 3.
"""

import math

import torch
from torch import Tensor

from tuner.ranges import QParams
from tuner.recovery.gptq import DAMPING, solve_by_gptq
from tuner.recovery.rounding_descent import descended
from tuner.recovery.rounding_matrix import damped, output_errors
from tuner.recovery.rounding_problem import RoundingProblem
from tuner.schemes import TensorScheme

_STRETCH = (-0.1, 1.1)
"""γ and ζ of the rectified sigmoid: h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1), equation 23."""
_BETA = (20.0, 2.0)


@torch.no_grad()
def adaround(
    weight: Tensor,
    second: Tensor,
    scheme: TensorScheme,
    *,
    axis: int = 0,
    steps: int = 500,
    learning_rate: float = 0.05,
    regularization: float = 10.0,
    sweeps: int = 3,
    qparams: QParams | None = None,
) -> tuple[Tensor, QParams]:
    """Return a weight rounded to its own grid so that the op's output changes least.

    Args:
        weight: the weight in its own shape, whose output channels are on `axis`, as in WeightRef.
        second: E[x xᵀ] `[groups, in·k, in·k]`, up to a factor.
        scheme: the scales are those that it gives the weight as it is, so the result is a fixed
            point of `fake_quantize(…, scheme, qparams)`.
        steps: of Adam; 0 for coordinate descent alone.
        learning_rate: of Adam, on V.
        regularization: λ, the error of each row being in units of what it starts with.
        sweeps: of coordinate descent, before and after.
        qparams: what `compute_qparams(weight, scheme)` returned, if it is known.

    The problem is that of equation 21, its data summed up in H:
    min tr(ΔW H ΔWᵀ) + λ Σ (1 − |2h(V) − 1|^β) with Ŵ = W₁ + h(V) (W₂ − W₁). It starts from GPTQ,
    improved by coordinate descent, because that has a lower error than rounding to nearest: W₁ is
    the value found there, W₂ the next one towards W (where W₁ is next to W these are the paper's
    two). The result is rounded, and improved again.

    Rows that come out worse than the start, or rounded to nearest, in tr(ΔW H ΔWᵀ) are put back. A
    weight that GPTQ would round to nearest is so here. Deterministic. Raises SchemeError where the
    moments do not fit the weight.
    """
    problem = RoundingProblem.of(weight, second, scheme, axis, qparams)
    found = solve_by_gptq(problem)
    if found is None:
        return problem.solved(None)
    start = problem.better(problem.nearest, found)
    start = problem.better(start, descended(problem, start, sweeps))
    if steps:
        learned = _learned(problem, start, steps, learning_rate, regularization)
        start = problem.better(start, descended(problem, learned, sweeps))
    return problem.solved(start)


def _learned(
    problem: RoundingProblem, start: Tensor, steps: int, learning_rate: float, weight: float
) -> Tensor:
    """Return a solution by gradient descent, each value at its start or at the next one beside."""
    assert problem.grid is not None
    beside = problem.grid.beside(start, problem.columns > start)
    first, exact = (columns.mT.contiguous() for columns in (start, problem.columns))
    gap = beside.mT - first
    share = torch.where(gap == 0, 0.0, (exact - first) / gap).clamp_(0.0, 1.0)
    hessian, offset = damped(problem.second, DAMPING), first - exact
    error = output_errors(offset, hessian).unsqueeze(-1)
    unit = torch.where(error > 0, exact.shape[-1] / error, 0.0)
    v = _inverse(share / 2)  # on the side of the start
    adam = torch.optim.Adam([v], lr=learning_rate)
    for step in range(steps):
        h, slope = _rectified(v)
        gradient = ((offset + h * gap) @ hessian) * (2 * unit) * gap
        gradient += weight * _regularizer_slope(h, _annealed(step / steps))
        v.grad = gradient.mul_(slope)
        adam.step()
    return torch.where(_rectified(v)[0] >= 0.5, beside.mT, first).mT.contiguous()


def _rectified(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return h(V) and its derivative."""
    low, high = _STRETCH
    sigmoid = torch.sigmoid(v)
    stretched = sigmoid * (high - low) + low
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), sigmoid * (1 - sigmoid) * (high - low) * inside


def _inverse(h: Tensor) -> Tensor:
    """Return V with h(V) = h."""
    low, high = _STRETCH
    return torch.logit((h - low) / (high - low))


def _annealed(progress: float) -> float:
    """Return β: from its first value to its last along half a cosine."""
    first, last = _BETA
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def _regularizer_slope(h: Tensor, beta: float) -> Tensor:
    """Return the derivative of 1 − |2h − 1|^β by h."""
    centered = 2 * h - 1
    return -2 * beta * centered.abs().pow(beta - 1) * centered.sign()
