"""Subclasses made at run time, that pass for the class that they are made of."""

from typing import Any, cast

from torch import nn


def subclassed(base: type[nn.Module], body: dict[str, Any], *mixins: type) -> type[nn.Module]:
    """Return a subclass of `base`, of its name and metaclass, with mixins before it."""
    metaclass = cast(Any, type(base))
    named = {"__module__": base.__module__, "__doc__": base.__doc__, **body}
    made = metaclass(base.__name__, (*mixins, base), named)
    made.__qualname__ = base.__qualname__
    return cast(type[nn.Module], made)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    cast(Any, module).__class__ = cls
