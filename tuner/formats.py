"""Number formats as plain data, looked up by name."""

from dataclasses import dataclass
from typing import Literal

from tuner.errors import TunerError, UnknownNameError


@dataclass(frozen=True)
class Format:
    """One number format.

    `bits` is the storage width of one value. An integer format holds
    −2^(bits−1) … 2^(bits−1)−1 when signed, else 0 … 2^bits−1.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    signed: bool = True

    @property
    def int_range(self) -> tuple[int, int]:
        """The smallest and largest code of an integer format."""
        if self.kind != "int":
            raise TunerError(f"{self.name} is not an integer format: it has no integer range")
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


_TABLE: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Add a format to the table; a name that is taken by another format is refused."""
    if _TABLE.get(fmt.name, fmt) != fmt:
        raise TunerError(f"a format named {fmt.name!r} exists already: choose another name")
    _TABLE[fmt.name] = fmt
    return fmt


def get(name: str) -> Format:
    """Return the format of this name; an unknown name is an error that lists the near ones."""
    if name not in _TABLE:
        raise UnknownNameError("format", name, _TABLE)
    return _TABLE[name]


def names() -> tuple[str, ...]:
    """Return the names of all formats, in the order of their registration."""
    return tuple(_TABLE)


for _bits in range(2, 17):
    register(Format(f"int{_bits}", "int", _bits))
for _bits in range(2, 17):
    register(Format(f"uint{_bits}", "int", _bits, signed=False))
