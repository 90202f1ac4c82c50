"""The op that stands in a traced graph where an activation is fake-quantized.

An exporter puts its own spelling in its place: QuantizeLinear and DequantizeLinear,
`quantized_decomposed`, integer arithmetic.
"""

import torch
from torch import Tensor

from tuner.model import InstrumentedModel
from tuner.operands import OUTPUT
from tuner.quantizer import Quantizer

_SEPARATOR = "|"
_library = torch.library.Library("accutune", "DEF")
_library.define("fake_quantized(Tensor x, str key) -> Tensor")


def _unchanged(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


_library.impl("fake_quantized", _unchanged, "Meta")
MARKER = torch.ops.accutune.fake_quantized.default


class Marker:
    """Takes a quantizer's place at a site, and leaves a node with its key in the trace."""

    is_elementwise = False

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, x: Tensor) -> Tensor:
        """Return x, marked."""
        marked: Tensor = MARKER(x, self.key)
        return marked


def key_of(op: str, index: int) -> str:
    """Return the key of an operand: its op's name and its index, OUTPUT for the output."""
    return f"{op}{_SEPARATOR}{index}"


def operand_of(key: str) -> tuple[str, int]:
    """Return op name and operand index of a key."""
    op, _, index = key.rpartition(_SEPARATOR)
    return op, int(index)


def mark(model: InstrumentedModel) -> dict[str, Quantizer]:
    """Put markers in the place of all quantizers of activations; return those by key."""
    found: dict[str, Quantizer] = {}
    for name, site in model.runtime.sites.items():
        operands = {i: q for i, q in enumerate(site.inputs) if q is not None}
        if site.output is not None:
            operands[OUTPUT] = site.output
        keys = {i: key_of(name, i) for i in operands}
        found.update({keys[i]: quantizer for i, quantizer in operands.items()})
        site.inputs = tuple(
            Marker(keys[i]) if i in keys else None  # type: ignore[misc]
            for i in range(len(site.inputs))
        )
        site.output = Marker(keys[OUTPUT]) if OUTPUT in keys else None  # type: ignore[assignment]
    return found
