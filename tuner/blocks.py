"""Scales of block formats: from the largest magnitude of each block on the last axis."""

import math

import torch
from torch import Tensor

from tuner import formats
from tuner.errors import TunerError
from tuner.kernels import MxScale, check_floats, codec_of
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
    blocks = _blocks(x.detach(), fmt.block.size)
    mx = mx_scale_of(scheme)
    if mx is not None:
        unit = _MXINT8_UNIT if fmt.kind == "int" else 1.0
        return QParams(_mx_scales(blocks.amax(-1), mx) * unit)
    blocks = blocks.float()
    amax = torch.where(blocks.isfinite(), blocks, 0.0).amax(-1)
    if fmt.block.scale == "e4m3":
        return _two_levels(amax, fmt, fmt.block.smallest_scale)
    if fmt.block.scale == "bf16":
        amax = amax.to(torch.bfloat16).float().clamp(max=torch.finfo(torch.bfloat16).max)
    largest = float(scheme.quant_range[1]) if fmt.kind == "int" else fmt.largest
    scale = amax / largest
    return QParams(torch.where(scale == 0, 1.0, scale))


def _blocks(x: Tensor, size: int) -> Tensor:
    """Return the magnitudes, `[…, blocks, size]`; the last block is filled up with 0."""
    magnitudes = x.abs() if x.dtype == torch.float64 else x.float().abs()
    missing = -x.shape[-1] % size
    if missing:
        magnitudes = torch.nn.functional.pad(magnitudes, (0, missing))
    return torch.unflatten(magnitudes, -1, (-1 if magnitudes.shape[-1] else 0, size))


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
