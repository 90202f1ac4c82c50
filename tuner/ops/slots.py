"""Families whose operands sit at fixed argument positions: most of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.ops.base import Family, Operand, is_float_tensor, tensor_slot

Slot = tuple[int, tuple[str, ...]]


class SlotFamily(Family):
    """A family whose operand i is the argument at `slots[i]`: (position, keyword names)."""

    slots: tuple[Slot, ...] = ((0, ("input",)),)
    required = 1

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call fn with the tensors in its slots passed through `operand`."""
        if len(args) == 1 and not kwargs and self.slots[0][0] == 0:  # as modules are called
            (x,) = args
            return fn(operand(0, x) if is_float_tensor(x) else x)
        positional, named = list(args), dict(kwargs)
        for index, (position, names) in enumerate(self.slots):
            value = tensor_slot(args, kwargs, position, *names)
            if not is_float_tensor(value):
                continue
            if position < len(args):
                positional[position] = operand(index, value)
            else:
                named[next(name for name in names if name in named)] = operand(index, value)
        return fn(*positional, **named)

    def accepts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether every required operand is a floating-point tensor."""
        return all(
            is_float_tensor(tensor_slot(args, kwargs, slot[0], *slot[1]))
            for slot in self.slots[: self.required]
        )


class InPlaceFamily(SlotFamily):
    """An in-place binary op: computed out of place, then written to its first operand."""

    out_of_place: Callable[..., Tensor]

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Compute with the operands passed through `operand`, and write to the first one.

        Where a backward pass follows, that needs the operand as it was before: it is copied.
        """
        target = args[0]
        before = target.clone() if target.requires_grad and torch.is_grad_enabled() else target
        function, operands = type(self).out_of_place, (before, *args[1:])
        return target.copy_(super().invoke(operand, function, operands, kwargs))
