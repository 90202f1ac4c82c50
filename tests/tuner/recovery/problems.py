"""Calls of real ops, and rounding problems with correlated inputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tuner.model import InstrumentedModel
from tuner.ops import Op
from tuner.sites import Call, Site


@dataclass(frozen=True, eq=False)
class SeenCall:
    """One call of an op, its operands and its output."""

    call: Call
    operands: dict[int, Tensor]
    output: Any


@dataclass(eq=False)
class Watch:
    """A tap that keeps all calls of all ops."""

    calls: dict[str, list[SeenCall]] = field(default_factory=dict)

    def run(self, site: Site, call: Call) -> Any:
        operands: dict[int, Tensor] = {}

        def look(index: int, x: Tensor) -> Tensor:
            operands[index] = x
            return x

        output = call.invoke(look)
        self.calls.setdefault(site.name, []).append(SeenCall(call, operands, output))
        return output

    def other(self, scope: str, fn: Any, args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)


def watched(model: nn.Module, *inputs: Any) -> tuple[dict[str, Op], dict[str, list[SeenCall]]]:
    """Return the ops of a model, and their calls on these inputs, one run each."""
    instrumented = InstrumentedModel(model)
    ops = instrumented.record(lambda: model(inputs[0]), 1).ops
    watch = Watch()
    with torch.no_grad(), instrumented.watching(watch):
        for x in inputs:
            model(x)
    return dict(ops), watch.calls


def correlated(seed: int, groups: int, width: int, rows: int = 0) -> Tensor:
    """Return second moments `[groups, width, width]` of inputs whose channels depend on each other.

    Channels have different scales; with fewer rows than channels the moments are singular.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows or 8 * width
    x = torch.randn(groups, rows, width, generator=generator)
    mix = torch.randn(groups, width, width, generator=generator)
    x = x @ mix + torch.randn(groups, 1, width, generator=generator)
    return x.mT @ x / rows


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
