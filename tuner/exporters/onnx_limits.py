"""Finds limits before a quantizer that its own codes have as well: a ReLU6 before 4 bits.

ONNX Runtime leaves such limits out where the quantizer has all codes of uint8, and else computes
what comes before them in float.
"""

from typing import Any

import torch
from torch import fx

from tuner.exporters.onnx_activations import Spelling

_ATEN = torch.ops.aten
_LIMITS: dict[Any, tuple[float | None, float | None]] = {
    _ATEN.relu6.default: (0.0, 6.0),
    _ATEN.hardtanh.default: (-1.0, 1.0),
    _ATEN.clamp.default: (None, None),
}
"""Op → its limits where it is not given any."""

_SURELY = 0.25
"""Of a step: so far beyond the last code a limit may lie within it, and round to that code."""


def unlimited(source: fx.Node, spelling: Spelling) -> fx.Node:
    """Return the tensor before limits that change no code of what is quantized, else the source."""
    values = spelling.values
    if values is None or source.target not in _LIMITS or source.kwargs:
        return source
    x, *given = source.args
    limits: Any = (*given, *_LIMITS[source.target][len(given) :])
    low, high = limits
    slack = _SURELY * spelling.scale.item()
    changes = (low is not None and low > values[0] + slack) or (
        high is not None and high < values[1] - slack
    )
    assert isinstance(x, fx.Node)
    return source if changes else x
