"""Weights rounded by what they multiply: the moments that calibration keeps, and what uses them."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from tuner import formats
from tuner.errors import SpaceError
from tuner.ops import Op, WeightRef
from tuner.ranges import QParams
from tuner.recovery.adaround import adaround
from tuner.recovery.bias_correction import bias_correction
from tuner.recovery.gptq import gptq
from tuner.recovery.moments import InputMoments, moments_for
from tuner.repairs import ADAROUND, GPTQ, QUANTEASE
from tuner.schemes import TensorScheme
from tuner.sites import Call

_METHODS: Mapping[str, Callable[..., tuple[Tensor, QParams]]] = {
    GPTQ: gptq,
    QUANTEASE: partial(adaround, steps=0),
    ADAROUND: adaround,
}


class Rounder:
    """Rounds weights by the second moments of the inputs of their ops.

    `watch` must see the calibration data first. A weight that several ops use is left out: each of
    them would round it otherwise.
    """

    def __init__(self, ops: Iterable[Op], wanted: Iterable[str]) -> None:
        ops, names = list(ops), set(wanted)
        uses: dict[object, int] = {}
        for op in ops:
            for ref in op.weights:
                uses[ref.key] = uses.get(ref.key, 0) + 1
        own = (op for op in ops if len(op.weights) == 1 and uses[op.weights[0].key] == 1)
        self._refs = {op.name: op.weights[0] for op in own if op.name in names}
        self._moments: dict[str, InputMoments | None] = {}
        self._factors: dict[str, Tensor] = {}
        self._shifts: dict[str, Tensor] = {}

    def watch(self, op: str, call: Call, index: int, x: Tensor) -> None:
        """Add the operand of a call, where the op is wanted and this operand meets its weight."""
        ref = self._refs.get(op)
        if ref is None or index != (1 if ref.operand == 0 else 0):
            return
        if op not in self._moments:
            self._moments[op] = moments_for(call, ref, x)
        if (moments := self._moments[op]) is not None:
            moments.update(call, x)

    def rescale(self, op: str, factors: Tensor, shifts: Tensor | None = None) -> None:
        """Tell that the input x of an op is (x − shifts) / factors from now on, both `[in]`."""
        self._factors[op] = factors
        if shifts is not None:
            self._shifts[op] = shifts

    def can_round(self, op: str) -> bool:
        """Return whether there is enough to go by."""
        moments = self._moments.get(op)
        return moments is not None and moments.count > 0

    def refuse_vain(self, asked: Iterable[str]) -> None:
        """Raise SpaceError where the weight of an op cannot be rounded as a rule asks."""
        for name in asked:
            if not self.can_round(name):
                raise SpaceError(
                    f"{name}: its weight cannot be rounded by what it multiplies: that takes a "
                    "Linear, a convolution or a product with one matrix, with a weight of its own, "
                    "at most 8192 inputs, and data that reach it. Leave the recovery out"
                )

    def rounded(self, ref: WeightRef, weight: Tensor, scheme: TensorScheme, method: str) -> Tensor:
        """Return a weight on the grid of its scheme, rounded by a method of `repairs.ROUNDINGS`."""
        op = next(name for name, known in self._refs.items() if known.key == ref.key)
        second = self._second(op).to(weight.device)
        value, _ = _METHODS[method](weight, second, scheme, axis=ref.axis)
        return torch.empty_like(weight).copy_(value)  # in its memory format

    def correction(self, op: Op, weight: Tensor, rounded: Tensor) -> Tensor:
        """Return what an op's bias must make up for, `[out]`, where its weight is rounded."""
        moments = self._moments[op.name]
        assert moments is not None
        mean = moments.mean
        assert mean is not None
        mean = (mean - self._shift(op.name, mean)) * self._inverse(op.name, mean)
        return bias_correction(weight, rounded, mean.to(weight.device), op.weights[0].axis)

    def _second(self, op: str) -> Tensor:
        """Return E[(x − c)(x − c)ᵀ] = E[x xᵀ] − c E[x]ᵀ − (E[x] − c) cᵀ of the scaled x − c."""
        moments = self._moments[op]
        assert moments is not None
        second, mean = moments.second, moments.mean
        assert second is not None
        assert mean is not None
        if op in self._shifts:
            mean = mean.to(second)
            shift = self._shift(op, mean)
            second = second - shift[:, :, None] * mean[:, None, :]
            second -= (mean - shift)[:, :, None] * shift[:, None, :]
        inverse = self._inverse(op, second[:, 0])
        return second * inverse[:, :, None] * inverse[:, None, :]

    def _inverse(self, op: str, like: Tensor) -> Tensor:
        """Return by what the columns `[groups, in·k]` are multiplied: they were divided by it."""
        factors = self._factors.get(op)
        return torch.ones_like(like) if factors is None else _in_columns(1 / factors, like)

    def _shift(self, op: str, like: Tensor) -> Tensor:
        """Return what was taken from the columns `[groups, in·k]`."""
        shifts = self._shifts.get(op)
        return torch.zeros_like(like) if shifts is None else _in_columns(shifts, like)


def _in_columns(values: Tensor, like: Tensor) -> Tensor:
    """Return values `[in]` for the columns `[groups, in·k]`."""
    groups, width = like.shape
    grouped = values.view(groups, -1)
    return grouped.repeat_interleave(width // grouped.shape[1], 1).to(like)


def can_have(scheme: TensorScheme) -> bool:
    """Return whether rounding otherwise than to nearest can help: formats with few values."""
    return formats.get(scheme.format).has_codes and scheme.bits < 8
