"""Codes of 2 to 32 bits as a dense stream of bits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.errors import DataError

_GROUP = 8  # eight codes of b bits fill b bytes exactly
_CODE = np.uint16, np.uint32  # up to 16 bits, above
_WORD = np.uint32, np.uint64  # a code shifted by up to 7 bits


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """Return the smallest of int8, uint8, int16, int32 and int64 that holds codes of this width."""
    _check_bits(bits)
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    if bits < 16 or (signed and bits == 16):
        return torch.int16
    return torch.int32 if bits < 32 or signed else torch.int64


def packed_size_bytes(numel: int, bits: int) -> int:
    """Return the number of bytes that `numel` codes take, the last one filled up with zeros."""
    _check_bits(bits)
    return -(-numel * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the codes as a uint8 tensor `[packed_size_bytes]`.

    Code `i` (row-major) takes the bits `i · bits … (i + 1) · bits − 1` of the stream, least
    significant first; bit `k` of the stream is bit `k mod 8` of byte `k // 8`. Negative codes are
    two's complement in `bits` bits. Raises DataError for codes that do not fit.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise DataError(f"codes must be integers, got {codes.dtype}: use quantize() first")
    values = codes.detach().cpu().contiguous().view(-1).numpy()
    if not values.size:
        return torch.empty(0, dtype=torch.uint8)
    low, high = int(values.min()), int(values.max())
    fits = low >= -(2 ** (bits - 1)) and high < (2 ** (bits - 1) if low < 0 else 2**bits)
    if not fits:
        raise DataError(f"codes from {low} to {high} do not fit {bits} bits")
    packed = _pack(values.astype(_CODE[bits > 16]), bits)  # wraps around: two's complement
    return torch.from_numpy(packed[: packed_size_bytes(values.size, bits)])


def unpack_codes(packed: Tensor, bits: int, signed: bool, shape: Sequence[int]) -> Tensor:
    """Return the codes that `pack_codes` packed, in `code_dtype(bits, signed)` and this shape.

    Raises DataError when `packed` has another type or length than the shape asks for.
    """
    numel = math.prod(shape)
    size = packed_size_bytes(numel, bits)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise DataError(
            f"packed codes must be uint8 of shape [{size}] for {numel} codes of {bits} bits, "
            f"got {packed.dtype} of shape {list(packed.shape)}"
        )
    values = _unpack(packed.cpu().numpy(), bits, numel)
    if signed:
        sign = values.dtype.type(1 << (bits - 1))
        values = ((values ^ sign) - sign).view(f"i{values.itemsize}")
    codes = torch.from_numpy(values.astype(_numpy_dtype(code_dtype(bits, signed))))
    return codes.reshape(tuple(shape))


def _pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return values.astype(np.uint8)
    if bits == 16:
        return values.astype("<u2").view(np.uint8)
    word = _WORD[bits > 16]
    values = values & values.dtype.type((1 << bits) - 1)
    columns = _columns(values, _GROUP).astype(word)
    stream = np.zeros((bits, columns.shape[1]), dtype=np.uint8)
    for i, column in enumerate(columns):
        byte, shift = divmod(i * bits, 8)
        shifted = column << word(shift)
        for k in range(-(-(shift + bits) // 8)):
            stream[byte + k] |= (shifted >> word(8 * k)).astype(np.uint8)
    return np.ascontiguousarray(stream.T).reshape(-1)


def _unpack(packed: NDArray[np.uint8], bits: int, numel: int) -> NDArray[Any]:
    code, word = _CODE[bits > 16], _WORD[bits > 16]
    if bits == 8:
        return packed.astype(np.uint16)
    if bits == 16:
        return packed.view("<u2").astype(np.uint16)
    stream = _columns(packed, bits).astype(word)
    columns = np.empty((_GROUP, stream.shape[1]), dtype=code)
    for i in range(_GROUP):
        byte, shift = divmod(i * bits, 8)
        bits_here = stream[byte] >> word(shift)
        for k in range(1, -(-(shift + bits) // 8)):
            bits_here |= stream[byte + k] << word(8 * k - shift)
        columns[i] = bits_here & word((1 << bits) - 1)
    return np.ascontiguousarray(columns.T).reshape(-1)[:numel]


def _columns(values: NDArray[np.generic], count: int) -> NDArray[np.generic]:
    """Return `[count, groups]`: the values dealt out to `count` rows, filled up with zeros."""
    missing = -values.size % count
    if missing:
        values = np.concatenate((values, np.zeros(missing, dtype=values.dtype)))
    return np.ascontiguousarray(values.reshape(-1, count).T)


def _numpy_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 32:
        raise DataError(f"codes of {bits} bits cannot be packed: choose 2 to 32")
