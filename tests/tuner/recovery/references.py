"""Rounding by definition, in plain fp64: nothing here is fast, and nothing is shared with it."""

from itertools import product

import torch
from torch import Tensor


def error(rounded: Tensor, weight: Tensor, second: Tensor) -> float:
    """Return tr(ΔW H ΔWᵀ) of weights `[out, n]`."""
    delta = (rounded - weight).double()
    return float(torch.trace(delta @ second.double() @ delta.mT))


def nearest(value: float, grid: list[float]) -> float:
    """Return the number of the grid next to a value."""
    return min(grid, key=lambda number: abs(number - value))


def obq(row: Tensor, second: Tensor, order: list[int], grid: list[float]) -> Tensor:
    """Round one row in a given order, with the updates of Optimal Brain Quantization.

    Frantar et al., GPTQ, section 3.1: `δ = −(w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_:,q`, then q is
    taken out of H⁻¹ by a step of Gaussian elimination (equations 2 and 3).
    """
    w = row.double().clone()
    inverse = torch.linalg.inv(second.double())
    for q in order:
        rounded = nearest(float(w[q]), grid)
        step = (w[q] - rounded) / inverse[q, q]
        w -= step * inverse[:, q]
        w[q] = rounded
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, :] = 0
        inverse[:, q] = 0
        inverse[q, q] = 1
    return w


def best_choice(row: Tensor, second: Tensor, options: list[list[float]]) -> float:
    """Return the least error over all ways to choose one of the options for each value."""
    choices = torch.tensor(list(product(*options)), dtype=torch.float64)
    delta = choices - row.double()
    return float(((delta @ second.double()) * delta).sum(1).min())


def around(value: float, grid: list[float]) -> list[float]:
    """Return the numbers of the grid next below and above a value."""
    below = [number for number in grid if number <= value]
    above = [number for number in grid if number > value]
    return [*below[-1:], *above[:1]]
