"""Built-in metrics of outputs against targets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.errors import DataError


@dataclass(frozen=True)
class Metric:
    """A number of all outputs [N, …] and targets [N, …] together."""

    compute: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    of_classes: bool

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the metric; raises DataError where shapes or types do not fit."""
        if self.of_classes and targets.is_floating_point():
            raise DataError(f"targets are {targets.dtype}: give class numbers, integers [N]")
        if self.of_classes and outputs.shape[:-1] != targets.shape:
            raise DataError(_misfit(outputs, targets, "targets without the last axis of outputs"))
        if not self.of_classes and outputs.shape != targets.shape:
            raise DataError(_misfit(outputs, targets, "targets of the outputs' shape"))
        return float(self.compute(outputs.double(), targets))


def _misfit(outputs: Tensor, targets: Tensor, wanted: str) -> str:
    shapes = f"outputs {list(outputs.shape)}, targets {list(targets.shape)}"
    return f"{shapes}: the metric needs {wanted}"


def _top(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    def share(outputs: Tensor, targets: Tensor) -> Tensor:
        best = outputs.topk(min(k, outputs.shape[-1]), -1).indices
        return (best == targets.unsqueeze(-1)).any(-1).double().mean()

    return share


def _perplexity(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.exp(F.cross_entropy(outputs.flatten(0, -2), targets.flatten()))


METRICS = {
    "accuracy": Metric(_top(1), higher_is_better=True, of_classes=True),
    "top5": Metric(_top(5), higher_is_better=True, of_classes=True),
    "perplexity": Metric(_perplexity, higher_is_better=False, of_classes=True),
    "mse": Metric(lambda y, t: F.mse_loss(y, t.double()), False, of_classes=False),
    "mae": Metric(lambda y, t: F.l1_loss(y, t.double()), False, of_classes=False),
}
