"""add, mul, cat, and the inputs of normalisation and softmax: quantized where a plan asks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tuner.ops.base import CallFacts, Family, Operand, Product, is_float_tensor
from tuner.ops.slots import InPlaceFamily, SlotFamily


class BinaryFamily(SlotFamily):
    """An elementwise op of two float tensors."""

    by_default = False
    required = 2
    slots = ((0, ("input", "self")), (1, ("other",)))

    def __init__(self, type_: str) -> None:
        self.op_type = type_

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count nothing: an elementwise op accumulates nothing."""
        return ()


class InPlaceAddFamily(InPlaceFamily, BinaryFamily):
    """x += y."""

    out_of_place = torch.add


class InPlaceMulFamily(InPlaceFamily, BinaryFamily):
    """x *= y."""

    out_of_place = torch.mul


class CatFamily(Family):
    """Concatenation: operand i is the i-th tensor of the list."""

    op_type = "cat"
    by_default = False

    def accepts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all tensors are floating-point."""
        tensors = args[0] if args else kwargs.get("tensors", ())
        return all(is_float_tensor(tensor) for tensor in tensors)

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call cat with every tensor passed through `operand`."""
        tensors = args[0] if args else kwargs["tensors"]
        seen = [operand(i, tensor) for i, tensor in enumerate(tensors)]
        rest = {name: value for name, value in kwargs.items() if name != "tensors"}
        return fn(seen, *args[1:], **rest)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count nothing."""
        return ()


class UnaryFamily(SlotFamily):
    """An op of which only the input can be quantized: LayerNorm, softmax."""

    by_default = False

    def __init__(self, type_: str, module_types: tuple[type[nn.Module], ...]) -> None:
        self.op_type = type_
        self.module_types = module_types

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        """Return nothing: scale and shift stay float."""
        return ()

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count nothing: its arithmetic stays float."""
        return ()
