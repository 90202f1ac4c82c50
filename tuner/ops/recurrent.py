"""LSTM and GRU: their weights and the module's input; what circulates inside stays float."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from tuner.ops.base import CallFacts, Family, Operand, Product


class RecurrentFamily(Family):
    """A stack of recurrent layers, computed by one opaque kernel.

    Operand 0 is the input sequence of the first layer. Hidden states, and the inputs of the
    layers above the first, stay float: their multiply-accumulates count bits_w × 32.
    """

    def __init__(self, type_: str, module_type: type[nn.RNNBase]) -> None:
        self.op_type = type_
        self.module_types = (module_type,)

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call the module with its input sequence, packed or not, passed through `operand`."""
        rest = dict(kwargs)
        sequence, *others = args if args else (rest.pop("input"),)
        if isinstance(sequence, PackedSequence):
            sequence = sequence._replace(data=operand(0, sequence.data))
        else:
            sequence = operand(0, sequence)
        return fn(sequence, *others, **rest)

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of all weight matrices, of every layer and direction."""
        return tuple(n for n, _ in module.named_parameters() if n.startswith("weight"))

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count time steps × weight elements: the first layer's input part, then the rest."""
        module, sequence = call.module, call.operands[0]
        steps = sequence.numel() // sequence.shape[-1]
        assert isinstance(module, nn.RNNBase)
        named = zip(module._flat_weights_names, module._flat_weights, strict=True)
        sizes = {n: w.numel() for n, w in named if w is not None and n.startswith("weight")}
        first = sum(size for name, size in sizes.items() if name.startswith("weight_ih_l0"))
        rest = sum(sizes.values()) - first
        return (Product(steps * first, 0, 1), Product(steps * rest, None, 1))
