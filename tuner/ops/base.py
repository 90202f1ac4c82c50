"""What an op is, and what an op family must say of its ops."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Operand = Callable[[int, Tensor], Tensor]
"""Receives (operand index, tensor) and returns the tensor to compute with."""

Splits = Callable[[int], bool]
"""Tells of an operand index whether its tensor may be passed in pieces."""


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one pair of operands, per sample.

    An index that is not among the op's activations is its weight; None is what no scheme reaches.
    """

    macs: int
    left: int | None
    right: int | None


@dataclass(frozen=True)
class WeightRef:
    """A parameter of the model, or a run of its first axis, used as an op's weight.

    `axis` is the parameter's axis of output channels; `rows` is (start, stop) or None for all.
    `operand` is the operand index where a functional call takes the weight, transposed or not.
    """

    path: str
    axis: int
    rows: tuple[int, int] | None = None
    operand: int | None = None
    transposed: bool = False

    @property
    def key(self) -> tuple[str, tuple[int, int] | None]:
        """What identifies the storage: two references with equal keys are tied."""
        return self.path, self.rows

    def of(self, parameter: Tensor) -> Tensor:
        """Return the part of the parameter that is the weight."""
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Op:
    """One place in the model that can be quantized.

    `activations` are the operand indices that are no parameters: OpConfig.inputs is indexed by
    operand. `by_default` says whether presets include the op. Shapes include the batch.
    """

    name: str
    type: str
    weights: tuple[WeightRef, ...]
    activations: tuple[int, ...]
    products: tuple[Product, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    parameters: int
    by_default: bool

    @property
    def operand_count(self) -> int:
        """One more than the largest index of an activation: how long OpConfig.inputs may be."""
        return max(self.activations, default=-1) + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return sum(product.macs for product in self.products)


@dataclass(frozen=True)
class CallFacts:
    """What was seen of one call: its operands by index, its module if it is one, its output."""

    operands: Mapping[int, Tensor]
    module: nn.Module | None
    args: tuple[Any, ...]
    output: Any


class Family(ABC):
    """One kind of op: how it is called, and what it multiplies.

    `invoke` computes the call with every operand passed through `operand`;
    `products` counts multiply-accumulates of one call over the whole batch.
    """

    op_type: str
    by_default = True
    channel_axis = 0
    module_types: tuple[type[nn.Module], ...] = ()

    @abstractmethod
    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call fn with its operands passed through `operand`."""

    def compute(
        self,
        operand: Operand,
        splits: Splits,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Compute what `invoke` does, to the bit, where nobody looks at whole operands."""
        return self.invoke(operand, fn, args, kwargs)

    @abstractmethod
    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Return the multiply-accumulates of this call, over the whole batch."""

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the module's parameters that are quantized as weights."""
        return ("weight",)

    def weight_axis(self, index: int, args: tuple[Any, ...]) -> int | None:
        """Return the axis of output channels where operand `index` is a parameter.

        None where this operand cannot serve as a weight.
        """
        return self.channel_axis if index == 1 else None

    def accepts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether this call can be quantized (else it passes through)."""
        return True


def tensor_slot(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, *names: str
) -> Any:
    """Return the argument at a position or under one of its keyword names, else None."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def is_float_tensor(value: Any) -> bool:
    """Return whether value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
