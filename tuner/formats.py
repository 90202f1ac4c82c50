"""Number formats as plain data, looked up by name."""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from tuner.errors import TunerError, UnknownNameError
from tuner.float_layout import FP32_LARGEST, FloatLayout, Specials

Kind = Literal["int", "float", "codebook", "function"]
ScaleKind = Literal["e8m0", "e4m3", "fp32", "bf16"]
Function = Callable[[Any], Any]
"""Takes a tensor of values in units of the scale, and returns one of the same shape."""


@dataclass(frozen=True)
class Block:
    """Values of a block format: `size` neighbours on the last axis share a scale.

    `scale` is the format of the scale; `smallest_scale` bounds it from below where that is e4m3.
    """

    size: int
    scale: ScaleKind
    smallest_scale: float = 0.0


@dataclass(frozen=True)
class Format:
    """One number format.

    `bits` is the storage width of one value. An integer format holds −2^(bits−1) … 2^(bits−1)−1
    when signed, else 0 … 2^bits−1; a float one what its `layout` says, a codebook its entries, in
    growing order; a function whatever `forward` returns, and `backward` turns gradients. Where
    `scaled`, values are divided by a scale that takes the largest magnitude to `largest`.
    """

    name: str
    kind: Kind
    bits: int
    signed: bool = True
    layout: FloatLayout | None = None
    block: Block | None = None
    codebook: tuple[float, ...] = ()
    forward: Function | None = None
    backward: Function | None = None
    scaled: bool = True
    magnitude: float = 1.0

    @property
    def int_range(self) -> tuple[int, int]:
        """The smallest and largest code of an integer format."""
        if self.kind != "int":
            raise TunerError(f"{self.name} is not an integer format: it has no integer range")
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def largest(self) -> float:
        """The largest magnitude that the format holds, in units of the scale."""
        if self.layout is not None:
            return self.layout.largest
        if self.kind == "int":
            return float(self.int_range[1])
        return max(map(abs, self.codebook)) if self.codebook else self.magnitude

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value, in units of the scale."""
        if self.kind == "int":
            low, high = self.int_range
            return float(low), float(high)
        return (
            (self.codebook[0], self.codebook[-1])
            if self.codebook
            else (-self.largest, self.largest)
        )

    @property
    def has_codes(self) -> bool:
        """Whether a value can be stored as a code of `bits` bits."""
        return self.kind != "function"


_TABLE: dict[str, Format] = {}
_SPELLED: dict[str, Format] = {}
"""Systematic names that were asked for; a plain dict, which torch.compile can look into."""
_FLOAT = re.compile(r"e([1-8])m(\d|10)(?:b(\d+))?(fnuz|fn)?((?:_(?:nosub|overflow|unscaled))*)")
_ABFP = re.compile(r"abfp([2-9]|1[0-6])(?:_n([1-9]\d*))?")
_OCP_WITHOUT_NAN = ("e2m1", "e2m3", "e3m2")


@overload
def register(fmt: Format) -> Format: ...
@overload
def register(
    fmt: str,
    *,
    codebook: Sequence[float] | None = ...,
    forward: Function | None = ...,
    backward: Function | None = ...,
    bits: int | None = ...,
    largest: float | None = ...,
    block_size: int | None = ...,
) -> Format: ...
def register(
    fmt: Format | str,
    *,
    codebook: Sequence[float] | None = None,
    forward: Function | None = None,
    backward: Function | None = None,
    bits: int | None = None,
    largest: float | None = None,
    block_size: int | None = None,
) -> Format:
    """Add a format to the table, so that its name can be used anywhere, in plan files too.

    Args:
        fmt: a Format, or the name of a custom format.
        codebook: the numbers that the format holds; values go to the nearest one, scaled so that
            the largest magnitude fits the largest entry.
        forward: or a function of a tensor that returns a tensor of the same shape.
        backward: turns the gradient of a `forward` format; without it the gradient passes as it is.
        bits: the storage width of one value; by default what the codebook needs, 8 for a function.
        largest: the largest magnitude that `forward` takes: values are scaled to it. Without it
            they are not scaled.
        block_size: values on the last axis that share one fp32 scale, their largest magnitude.

    Raises TunerError for a name that another format has, or for a format that makes no sense.
    """
    if isinstance(fmt, str):
        fmt = _custom(fmt, codebook, forward, backward, bits, largest, block_size)
    known = _TABLE.get(fmt.name) or _parsed(fmt.name)
    if known is not None and known != fmt:
        raise TunerError(f"a format named {fmt.name!r} exists already: choose another name")
    _TABLE[fmt.name] = fmt
    return fmt


def get(name: str) -> Format:
    """Return the format of this name; an unknown name is an error that lists the near ones.

    Beside the names of `names()`: any float `e<X>m<Y>`, with `b<bias>`, `fn` or `fnuz`, then any of
    `_nosub` (no subnormals), `_overflow` (inf or NaN instead of saturation) and `_unscaled`; and
    `abfp<bits>_n<vector length>`.
    """
    found = _TABLE.get(name) or _SPELLED.get(name) or _parsed(name)
    if found is None:
        raise UnknownNameError("format", name, _TABLE)
    if name not in _TABLE:
        _SPELLED[name] = found
    return found


def names() -> tuple[str, ...]:
    """Return the names of all formats, in the order of their registration."""
    return tuple(_TABLE)


def _custom(
    name: str,
    codebook: Sequence[float] | None,
    forward: Function | None,
    backward: Function | None,
    bits: int | None,
    largest: float | None,
    block_size: int | None,
) -> Format:
    if (codebook is None) == (forward is None):
        raise TunerError(f"format {name!r}: give either a codebook or a forward function")
    _check_numbers(name, largest, {"bits": bits, "block_size": block_size})
    block = None if block_size is None else Block(block_size, "fp32")
    if codebook is not None:
        if largest is not None or backward is not None:
            raise TunerError(f"format {name!r}: largest and backward are only for a forward")
        entries = _entries(name, codebook)
        needed = max(2, (len(entries) - 1).bit_length())
        if bits is not None and bits < needed:
            raise TunerError(f"format {name!r}: {len(entries)} entries need {needed} bits")
        return Format(name, "codebook", bits or needed, codebook=entries, block=block)
    if not (callable(forward) and (backward is None or callable(backward))):
        raise TunerError(f"format {name!r}: forward and backward must be callable")
    scaled = largest is not None or block is not None
    return Format(
        name,
        "function",
        bits or 8,
        forward=forward,
        backward=backward,
        block=block,
        scaled=scaled,
        magnitude=largest or 1.0,
    )


def _check_numbers(name: str, largest: float | None, counts: dict[str, int | None]) -> None:
    if largest is not None and not 0 < largest <= FP32_LARGEST:
        raise TunerError(f"format {name!r}: largest must be finite and above 0, got {largest!r}")
    for field, count in counts.items():
        if count is not None and count < 1:
            raise TunerError(f"format {name!r}: {field} must be above 0, got {count!r}")


def _entries(name: str, codebook: Sequence[float]) -> tuple[float, ...]:
    """Return the entries in growing order, as fp32 has them: the kernels compute in fp32."""
    if not all(abs(value) <= FP32_LARGEST for value in codebook):
        raise TunerError(f"format {name!r}: the entries of a codebook must be finite in fp32")
    rounded = (struct.unpack("f", struct.pack("f", value))[0] for value in codebook)
    entries = tuple(sorted({value + 0.0 for value in rounded}))  # −0 + 0 = 0
    if not 2 <= len(entries) <= 2**16:
        raise TunerError(
            f"format {name!r}: a codebook holds 2 to 65536 different numbers in fp32, "
            f"got {len(entries)}"
        )
    return entries


def _parsed(name: str) -> Format | None:
    """Return the format that a systematic name spells out, None if it does not."""
    if match := _ABFP.fullmatch(name):
        bits, length = int(match[1]), int(match[2] or 64)
        return Format(name, "int", bits, block=Block(length, "bf16"))
    if match := _FLOAT.fullmatch(name):
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        bias = None if match[3] is None else int(match[3])
        return _float(name, exponent_bits, mantissa_bits, bias, match[4] or "", match[5] or "")
    return None


def _float(
    name: str, exponent_bits: int, mantissa_bits: int, bias: int | None, variant: str, flags: str
) -> Format:
    bits = 1 + exponent_bits + mantissa_bits
    specials: Specials = "fnuz" if variant == "fnuz" else "fn" if variant == "fn" else "ieee"
    if (specials == "fn" and bits < 8) or name.partition("_")[0] in _OCP_WITHOUT_NAN:
        specials = "finite"  # below eight bits every code is a number, as OCP MX has it
    if bias is None:
        bias = 2 ** (exponent_bits - 1) - (0 if specials == "fnuz" else 1)
    layout = FloatLayout(
        exponent_bits,
        mantissa_bits,
        bias,
        specials,
        subnormals="_nosub" not in flags,
        saturating="_overflow" not in flags,
    )
    return Format(name, "float", bits, layout=layout, scaled="_unscaled" not in flags)


def _element(name: str, element: str, block: Block) -> Format:
    fmt = get(element)
    return Format(name, fmt.kind, fmt.bits, layout=fmt.layout, block=block)


# Dettmers et al., QLoRA, NeurIPS 2023, appendix E: quantiles of N(0, 1), 0 among them
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_MX = Block(32, "e8m0")
_E4M3_NORMAL, _E4M3_SUBNORMAL = 2.0**-6, 2.0**-9

for _bits in range(2, 17):
    register(Format(f"int{_bits}", "int", _bits))
for _bits in range(2, 17):
    register(Format(f"uint{_bits}", "int", _bits, signed=False))
register(Format("int32", "int", 32))  # of biases
for _name in ("e4m3fn", "e4m3", "e4m3fnuz", "e4m3b11fnuz", "e5m2", "e5m2fnuz", "e3m4"):
    register(get(_name))
for _name in ("e2m3", "e3m2", "e2m1"):
    register(get(_name))
register(Format("fp16", "float", 16, layout=FloatLayout(5, 10, 15), scaled=False))
register(Format("bf16", "float", 16, layout=FloatLayout(8, 7, 127), scaled=False))
register(Format("fp32", "float", 32, layout=FloatLayout(8, 23, 127), scaled=False))
register(_element("mxfp8_e4m3", "e4m3fn", _MX))
register(_element("mxfp8_e5m2", "e5m2", _MX))
register(_element("mxfp6_e2m3", "e2m3", _MX))
register(_element("mxfp6_e3m2", "e3m2", _MX))
register(_element("mxfp4", "e2m1", _MX))
register(_element("mxint8", "int8", _MX))
# NVIDIA, 'Introducing NVFP4': E2M1 in blocks of 16, scales in E4M3 under one fp32 scale a tensor
register(_element("nvfp4", "e2m1", Block(16, "e4m3", _E4M3_NORMAL)))
register(_element("nvfp4_subnormal", "e2m1", Block(16, "e4m3", _E4M3_SUBNORMAL)))
register(Format("nf4", "codebook", 4, codebook=_NF4, block=Block(64, "fp32")))
for _bits in range(2, 9):
    register(get(f"abfp{_bits}"))
for _bits in range(2, 9):
    register(get(f"abfp{_bits}_n128"))
