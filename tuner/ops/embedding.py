"""Embedding tables: weight only, no multiply-accumulate."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tuner.ops.base import CallFacts, Family, Operand, Product, is_float_tensor


class EmbeddingFamily(Family):
    """Rows of W `[num_embeddings, dim]` picked by integer indices.

    `slot` is the position of the table in a functional call: 0 in torch.embedding(W, indices),
    1 in F.embedding(indices, W).
    """

    def __init__(self, type_: str, module_types: tuple[type[nn.Module], ...], slot: int) -> None:
        self.op_type = type_
        self.module_types = module_types
        self._slot = slot

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call fn; a functional call shows its table as operand 1."""
        if self._slot < len(args) and is_float_tensor(args[self._slot]):
            operand(1, args[self._slot])
        elif is_float_tensor(kwargs.get("weight")):
            operand(1, kwargs["weight"])
        return fn(*args, **kwargs)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count nothing: a look-up multiplies nothing."""
        return ()
