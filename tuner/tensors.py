"""Finding the tensors inside any object: what models take and return."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DEPTH = 8


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Yield every tensor inside tensors, mappings, sequences, dataclasses and namespaces."""
    for _, tensor in named_tensors_in(value, "", depth):
        yield tensor


def named_tensors_in(
    value: Any, name: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) for every tensor inside a value."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth:
        for key, child in _children(value):
            yield from named_tensors_in(child, f"{name}.{key}" if name else str(key), depth - 1)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        yield from vars(value).items()


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the batch with fn applied to its tensors; containers keep their types."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(fn, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(fn, item) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(fn, item) for key, item in value.items()}
    return value


def head_of(output: Any) -> Tensor:
    """Return the first tensor of what an op returns."""
    head = output if isinstance(output, Tensor) else output[0]
    head = head if isinstance(head, Tensor) else head.data  # a PackedSequence
    assert isinstance(head, Tensor)
    return head
