"""Scales of block formats: from the largest magnitude of each block on the last axis."""

import math

import torch
from torch import Tensor

from tuner import formats
from tuner.errors import TunerError
from tuner.kernels import MxScale, block_amax, check_floats, codec_of, is_transformed
from tuner.ranges import QParams
from tuner.schemes import TensorScheme

_TINY = torch.finfo(torch.float32).tiny
_MXINT8_UNIT = 2.0**-6
_E8M0_SMALLEST = 0x400000  # the bits of 2^-127


_MX_SCALES: dict[tuple[str, str], MxScale] = {}


def mx_scale_of(scheme: TensorScheme) -> MxScale | None:
    """Return how an MX scheme's scales follow from the data; None for every other scheme."""
    fmt = formats.get(scheme.format)
    if fmt.block is None or fmt.block.scale != "e8m0":
        return None
    key = scheme.format, scheme.scale_rounding
    known = _MX_SCALES.get(key)
    if known is None:
        known = _MX_SCALES[key] = _mx_scale(fmt, fmt.block, scheme)
    return known


def _mx_scale(fmt: formats.Format, block: formats.Block, scheme: TensorScheme) -> MxScale:
    if fmt.layout is None:  # MXINT8 holds k / 64 with −127 <= k <= 127
        return MxScale(block.size, scheme.scale_rounding, 0, 6, 127 * _MXINT8_UNIT)
    largest = fmt.layout.largest
    emax = math.frexp(largest)[1] - 1
    mantissa = fmt.layout.mantissa_bits
    return MxScale(block.size, scheme.scale_rounding, emax, mantissa, largest)


def block_qparams(x: Tensor, scheme: TensorScheme) -> QParams:
    """Return the scales of a tensor in a block format, `[…, ceil(n / size)]`, in fp32.

    MX: a power of two (OCP Microscaling Formats v1.0, section 6.3), rounded as `scale_rounding`
    says; NaN for a block that holds NaN or inf. NVFP4: E4M3 numbers under a global scale
    `amax / (448 · 6)`. abfp: the largest magnitude in bf16, by the largest code (Basumallik et al.,
    Adaptive Block Floating-Point, 2022, section III). Others: the largest magnitude by the format's
    largest value. Those leave out what is not finite.
    """
    check_floats(x, "quantization")
    fmt = formats.get(scheme.format)
    if fmt.block is None:
        raise TunerError(f"{fmt.name} is no block format")
    x = x.detach()
    mx = mx_scale_of(scheme)
    if mx is not None:
        unit = _MXINT8_UNIT if fmt.kind == "int" else 1.0
        return QParams(_mx_scales(_amax(x, fmt.block.size), mx) * unit)
    amax = _finite_amax(x.float(), fmt.block.size)
    if fmt.block.scale == "e4m3":
        return _two_levels(amax, fmt, fmt.block.smallest_scale)
    if fmt.block.scale == "bf16":
        amax = amax.to(torch.bfloat16).float().clamp(max=torch.finfo(torch.bfloat16).max)
    largest = float(scheme.quant_range[1]) if fmt.kind == "int" else fmt.largest
    scale = amax / largest
    return QParams(torch.where(scale == 0, 1.0, scale))


def _finite_amax(x: Tensor, size: int) -> Tensor:
    """Return the largest finite magnitude of each block."""
    amax = None if is_transformed() else _amax(x, size)
    if amax is None or not bool(amax.isfinite().all()):
        amax = _amax(torch.where(x.isfinite(), x, 0.0), size)
    return amax


def _amax(x: Tensor, size: int) -> Tensor:
    """Return the largest magnitude of each block, `[…, blocks]`, in fp32 (of doubles in fp64)."""
    native = block_amax(x, size)
    if native is not None:
        return native
    x = x if x.dtype == torch.float64 else x.float()
    missing = -x.shape[-1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    blocks = torch.unflatten(x, -1, (-1 if x.shape[-1] else 0, size))
    return torch.maximum(-blocks.amin(-1), blocks.amax(-1)).abs()  # needs no |x| of full size


def _mx_scales(amax: Tensor, mx: MxScale) -> Tensor:
    """Take the exponent from the bits: a logarithm in floats is one too high just below 2^k."""
    finite = amax.isfinite()
    if mx.rounding == "rceil":
        amax = amax / mx.largest
    bits = _bits(amax)
    if mx.rounding == "even":
        bits = bits + (1 << (22 - mx.mantissa))
    exponent = (bits >> 23) - 127
    if mx.rounding in ("ceil", "rceil"):
        # up to 2^-127, which lies in the middle of the subnormal numbers, the smallest scale does
        exponent = exponent + (((bits & 0x7FFFFF) != 0) & (bits > _E8M0_SMALLEST))
    if mx.rounding != "rceil":
        exponent = exponent - mx.emax
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-127, 127))
    return torch.where(finite, scale, math.nan)


def _bits(amax: Tensor) -> Tensor:
    """Return the bits in fp32; of doubles cut off, the last bit standing for all that was lost."""
    if amax.dtype != torch.float64:
        return amax.view(torch.int32)
    near = amax.float()
    below = torch.where(near.double() > amax, torch.nextafter(near, torch.zeros_like(near)), near)
    return below.view(torch.int32) | (below.double() != amax).int()


def _two_levels(amax: Tensor, fmt: formats.Format, smallest: float) -> QParams:
    e4m3 = formats.get("e4m3fn")
    largest = amax.max() if amax.numel() else amax.new_zeros(())
    # not so small that 1 / (above · scale), which values are multiplied with, overflows
    above = (largest / (e4m3.largest * fmt.largest)).clamp(min=_TINY / smallest)
    above = torch.where(largest == 0, 1.0, above)
    ideal = (amax / fmt.largest / above).clamp(smallest, e4m3.largest)
    scale = codec_of(e4m3).round_(ideal, -e4m3.largest, e4m3.largest)
    return QParams(scale, global_scale=above)
