"""Convolutions and transposed convolutions, one to three dimensions."""

from torch import Tensor, nn

from tuner.ops.base import CallFacts, Product
from tuner.ops.slots import SlotFamily

_SLOTS = ((0, ("input",)), (1, ("weight",)))


class ConvFamily(SlotFamily):
    """Convolution of x `[N, C_in, …]` with W `[C_out, C_in/groups, …]`."""

    slots = _SLOTS

    def __init__(self, dimensions: int, module_type: type[nn.Module]) -> None:
        self.op_type = f"Conv{dimensions}d"
        self.module_types = (module_type,)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count out elements × C_in/groups × kernel elements."""
        return (Product(call.output.numel() * _kernel_elements(call), 0, 1),)


class ConvTransposeFamily(SlotFamily):
    """Transposed convolution of x `[N, C_in, …]` with W `[C_in, C_out/groups, …]`."""

    slots = _SLOTS
    channel_axis = 1

    def __init__(self, dimensions: int, module_type: type[nn.Module]) -> None:
        self.op_type = f"ConvTranspose{dimensions}d"
        self.module_types = (module_type,)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count in elements × C_out/groups × kernel elements."""
        return (Product(call.operands[0].numel() * _kernel_elements(call), 0, 1),)


def _kernel_elements(call: CallFacts) -> int:
    """Count W[0]: C_in/groups × kernel (C_out/groups × kernel where transposed)."""
    weight = call.operands[1] if call.module is None else call.module.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()
