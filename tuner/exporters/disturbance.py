"""Disturbs quantized tensors as other float kernels do, to see what rounding makes of it.

What reads none is disturbed, too: the sums of layers that stay float, or whose weights alone are
quantized.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.model import InstrumentedModel
from tuner.quantizer import Quantizer

NOISE = 1e-6
"""Of each value: what other kernels for the same sums are apart."""


class Disturbance:
    """Disturbs tensors by normally distributed shares of their values, the same for a seed."""

    def __init__(self, noise: float = NOISE, seed: int = 0) -> None:
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x · (1 + noise · n), n drawn for each value; integers as they are."""
        if not x.is_floating_point():
            return x
        drawn = torch.randn(x.shape, generator=self._generator, dtype=x.dtype)
        return x * (1 + self._noise * drawn.to(x.device))


class _Disturbed:
    """Takes a quantizer's place at a site, and disturbs what it gets."""

    def __init__(self, quantizer: Quantizer, disturb: Disturbance) -> None:
        self._quantizer = quantizer
        self._disturb = disturb

    @property
    def is_elementwise(self) -> bool:
        """Whether pieces of a tensor may be quantized one by one."""
        return self._quantizer.is_elementwise

    def __call__(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # else the arithmetic would be ops of the model
            return self._quantizer(self._disturb(x))


def disturbed(model: InstrumentedModel, seed: int) -> InstrumentedModel:
    """Return a copy of a model with the plan that is on it, disturbed.

    Quantized activations are, and what modules give that compute with others. Quantized weights are
    constants, and stay as they are.
    """
    twin, disturb = model.copy(), Disturbance(seed=seed)

    def around(quantizer: Quantizer | None) -> Quantizer | None:
        return None if quantizer is None else _Disturbed(quantizer, disturb)  # type: ignore[return-value]

    def hook(module: nn.Module, inputs: Any, found: Any) -> Tensor | None:
        if not isinstance(found, Tensor):
            return None
        with torch._C.DisableTorchFunction():
            return disturb(found)

    sites = twin.runtime.sites
    for name, op in twin.ops.items():
        reads_floats = name not in sites or not any(sites[name].inputs)
        if reads_floats and op.activations and "/" not in name:  # else no module
            twin.model.get_submodule(name).register_forward_hook(hook)
    for site in sites.values():
        site.inputs = tuple(around(quantizer) for quantizer in site.inputs)
        site.output = around(site.output)
    return twin
