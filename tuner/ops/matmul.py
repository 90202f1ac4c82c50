"""Matrix products of two tensors: matmul, @, bmm, einsum."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from tuner.ops.base import CallFacts, Family, Operand, Product, is_float_tensor
from tuner.ops.slots import Slot, SlotFamily

_OTHER = ("other", "mat2", "tensor2", "vec2")


class MatmulFamily(SlotFamily):
    """Product of a `[…, n, k]` and b `[…, k, m]`; a parameter as b is the op's weight."""

    channel_axis = -1
    required = 2
    slots: tuple[Slot, ...] = ((0, ("input", "self", "tensor1")), (1, _OTHER))

    def __init__(self, type_: str) -> None:
        self.op_type = type_

    def weight_axis(self, index: int, args: tuple[Any, ...]) -> int | None:
        """Return the columns of b, or the rows of a where a is the parameter."""
        return -1 if index == 1 else -2

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count out elements × k."""
        return (Product(call.output.numel() * call.operands[0].shape[-1], 0, 1),)


class ReversedMatmulFamily(MatmulFamily):
    """`Tensor.__rmatmul__(b, a)`, which is a @ b."""

    slots: tuple[Slot, ...] = ((1, _OTHER), (0, ("input", "self")))


class AddmmFamily(MatmulFamily):
    """addmm(c, a, b) = c + a @ b, and baddbmm; c stays float, as a bias does."""

    slots = ((1, ("mat1", "batch1")), (2, ("mat2", "batch2")))


class EinsumFamily(Family):
    """einsum of two operands; the MACs are the product of all distinct index sizes."""

    op_type = "einsum"

    def accepts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether this is einsum(equation, a, b), also as einsum(equation, [a, b])."""
        return isinstance(args[0], str) and len(_einsum_operands(args)) == 2

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call einsum with both operands passed through `operand`."""
        tensors = [operand(i, t) for i, t in enumerate(_einsum_operands(args))]
        return fn(args[0], *tensors)

    def weight_axis(self, index: int, args: tuple[Any, ...]) -> int | None:
        """Return an axis of this operand that the other one does not share."""
        terms = args[0].replace(" ", "").split("->")[0].split(",")
        mine, other = terms[index], terms[1 - index]
        if "." in mine:
            return None
        return next((axis for axis, letter in enumerate(mine) if letter not in other), None)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count the product of the sizes of all distinct indices."""
        return (Product(_einsum_macs(call.args[0], call.operands), 0, 1),)


def _einsum_operands(args: tuple[Any, ...]) -> list[Tensor]:
    rest = args[1:]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = tuple(rest[0])
    return [tensor for tensor in rest if is_float_tensor(tensor)]


def _einsum_macs(equation: str, operands: Mapping[int, Tensor]) -> int:
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, index in zip(terms, sorted(operands), strict=True):
        shape = operands[index].shape
        before, dots, after = term.partition("...")
        if not dots:
            named = list(zip(before, shape, strict=True))
        else:
            named = list(zip(before, shape, strict=False))
            named += list(zip(after, shape[len(shape) - len(after) :], strict=True))
            middle = shape[len(before) : len(shape) - len(after)]
            sizes["..."] = max(sizes.get("...", 1), prod(middle))
        for letter, size in named:
            sizes[letter] = max(sizes.get(letter, 1), size)
    return prod(sizes.values())
