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


class Variant:
    """A way to make of any module class one of another body, that can be copied and pickled."""

    def __init__(self, name: str, body: dict[str, Any]) -> None:
        self._name = name
        self._body = body
        self._made: dict[type[nn.Module], type[nn.Module]] = {}
        _VARIANTS[name] = self

    def of(self, base: type[nn.Module]) -> type[nn.Module]:
        """Return the subclass of `base`, made once."""
        if base not in self._made:

            def reduce_ex(module: Any, protocol: Any) -> Any:
                reduced: Any = base.__reduce_ex__(module, 2)
                return (_remade, (self._name, base), *reduced[2:])

            self._made[base] = subclassed(base, {**self._body, "__reduce_ex__": reduce_ex})
        return self._made[base]


_VARIANTS: dict[str, Variant] = {}


def _remade(name: str, base: type[nn.Module]) -> nn.Module:
    """Make an empty module of a variant: what copy and pickle begin with."""
    made = _VARIANTS[name].of(base)
    return made.__new__(made)
