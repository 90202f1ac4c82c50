"""nn.Linear and F.linear."""

from torch import nn

from tuner.ops.base import CallFacts, Product
from tuner.ops.slots import SlotFamily


class LinearFamily(SlotFamily):
    """y = x Wᵀ + b, x `[…, in]`, W `[out, in]`."""

    op_type = "Linear"
    module_types = (nn.Linear,)
    slots = ((0, ("input",)), (1, ("weight",)))

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count out elements × in features."""
        return (Product(call.output.numel() * call.operands[0].shape[-1], 0, 1),)
