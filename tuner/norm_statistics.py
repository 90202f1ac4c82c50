"""Batch norm statistics on a model: taken anew under a plan that asks for it, and given back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NormStatistics:
    """The running statistics of a model's batch norms.

    `reestimate` takes them anew with the plan that is on; without it (a loaded plan) they are left
    as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reestimate: Callable[[], object] | None = None
        self._model = model
        self._floats: list[tuple[Tensor, Tensor]] = []

    def set(self, anew: bool) -> None:
        """Give the statistics back that the float model has, then take them anew if asked."""
        with torch.no_grad():
            for buffer, value in self._floats:
                buffer.copy_(value)
        self._floats = []
        if anew and self.reestimate is not None:
            self._floats = [(buffer, buffer.clone()) for buffer in self._buffers()]
            self.reestimate()

    def _buffers(self) -> list[Tensor]:
        norms = (module for module in self._model.modules() if isinstance(module, _BatchNorm))
        return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
