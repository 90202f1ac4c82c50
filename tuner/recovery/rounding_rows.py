"""What a weight multiplies at one output position: rows of an op's input, patches of a conv's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.ops import Family, WeightRef
from tuner.ops.base import tensor_slot
from tuner.ops.conv import ConvFamily, ConvTransposeFamily
from tuner.ops.linear import LinearFamily
from tuner.ops.matmul import MatmulFamily
from tuner.sites import Call

Rows = Callable[[Tensor, int], Tensor]
"""Takes an op's input, and how many rows to return at most; returns `[groups, rows, in·k]`."""

_GOLDEN = (5**0.5 - 1) / 2


def rows_of(call: Call, weight: WeightRef) -> Rows | None:
    """Return what reads the rows of a call's other operand; None where the op has no such rows.

    Output `[groups, rows, out/groups]` = rows × `as_matrix(weight)ᵀ`. Left out are recurrent
    layers, embeddings, einsum, attention, and products with more than one matrix.
    """
    if isinstance(call.family, LinearFamily):
        return _last_axis
    if isinstance(call.family, ConvFamily):
        return _window(call).rows
    if isinstance(call.family, ConvTransposeFamily):
        return _transposed_window(call).rows
    if isinstance(call.family, MatmulFamily) and _is_matrix(call, weight):
        return _last_axis if weight.operand == 1 else _columns
    return None


def supports(family: Family) -> bool:
    """Return whether an op of this family may have rows."""
    return isinstance(family, LinearFamily | ConvFamily | ConvTransposeFamily | MatmulFamily)


def spread(total: int, limit: int) -> Tensor | slice:
    """Return which of `total` rows to take: all, or `limit` of them, evenly spread.

    Steps of about total / φ that share no factor with it: no index comes twice, and no period of
    the data (the columns of an image) is hit again and again, as an even step would.
    """
    if total <= limit:
        return slice(None)
    step = max(1, round(total * _GOLDEN))
    while gcd(step, total) != 1:
        step += 1
    return torch.arange(limit) * step % total


def _is_matrix(call: Call, weight: WeightRef) -> bool:
    assert isinstance(call.family, MatmulFamily)
    if weight.operand is None:
        return False
    position, names = call.family.slots[weight.operand]
    operand = tensor_slot(call.args, call.kwargs, position, *names)
    return isinstance(operand, Tensor) and operand.dim() == 2


def _last_axis(x: Tensor, limit: int) -> Tensor:
    """Read x `[…, in]`."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[_on(spread(len(rows), limit), x)].unsqueeze(0)


def _columns(x: Tensor, limit: int) -> Tensor:
    """Read x `[…, in, columns]`, the right factor."""
    return _last_axis(x if x.dim() == 1 else x.transpose(-1, -2), limit)


def _on(index: Tensor | slice, x: Tensor) -> Tensor | slice:
    return index.to(x.device) if isinstance(index, Tensor) else index


@dataclass(frozen=True)
class Window:
    """What a convolution sees of its input `[N, C, …]` at one output position.

    `padding` is as F.pad takes it: the last axis first, before and behind. `upsampling` puts
    zeros between the values, as a transposed convolution does; its kernel lies the other way
    round, and so do the patches.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1
    mode: str = "constant"
    upsampling: tuple[int, ...] | None = None

    def rows(self, x: Tensor, limit: int) -> Tensor:
        """Return patches `[groups, rows, C/groups · k]` of at most `limit` output positions."""
        x = x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)
        if self.upsampling is not None:
            x = _upsampled(x, self.upsampling)
        x = F.pad(x, self.padding, mode=self.mode)
        patches = self._patches(x)
        positions = patches.shape[1 : 2 + len(self.kernel)]
        picked = spread(prod(positions), limit)
        if isinstance(picked, slice):
            picked = torch.arange(prod(positions))
        index: Any = torch.unravel_index(picked.to(x.device), positions)
        rows = patches[(slice(None), *index)]
        if self.upsampling is not None:
            rows = rows.flip(tuple(range(3, rows.dim())))
        return rows.flatten(2)

    def _patches(self, x: Tensor) -> Tensor:
        """Return a view `[groups, N, *out, C/groups, *kernel]` of the padded input."""
        x = x.contiguous()
        batch, channels, *spatial = x.shape
        strides = x.stride()
        per_group = channels // self.groups
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        out = [
            max((size - r - 1) // s + 1, 0)
            for size, r, s in zip(spatial, reach, self.stride, strict=True)
        ]
        steps = [s * step for s, step in zip(self.stride, strides[2:], strict=True)]
        taps = [d * step for d, step in zip(self.dilation, strides[2:], strict=True)]
        shape = (self.groups, batch, *out, per_group, *self.kernel)
        return x.as_strided(shape, (per_group * strides[1], strides[0], *steps, strides[1], *taps))


def _upsampled(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Put `factor − 1` zeros between the values of each spatial axis."""
    sizes = [(n - 1) * f + 1 for n, f in zip(x.shape[2:], factors, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    every: Any = [slice(None, None, factor) for factor in factors]
    out[(..., *every)] = x
    return out


def _window(call: Call) -> Window:
    module = call.module
    if module is not None:
        assert isinstance(module, nn.modules.conv._ConvNd)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        return Window(kernel, stride, dilation, padding, module.groups, mode)
    kernel = _functional_kernel(call)
    names = ("stride", "padding", "dilation", "groups")
    stride, given, dilation, groups = _settings(call.args, call.kwargs, names, (1, 0, 1, 1))
    stride, dilation = (_tuple(value, len(kernel)) for value in (stride, dilation))
    return Window(kernel, stride, dilation, _padding(given, kernel, dilation), groups)


def _transposed_window(call: Call) -> Window:
    module = call.module
    if module is not None:
        assert isinstance(module, nn.modules.conv._ConvTransposeNd)
        kernel, groups = module.kernel_size, module.groups
        lists: Any = module.stride, module.padding, module.output_padding, module.dilation
    else:
        kernel = _functional_kernel(call)
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        *lists, groups, dilation = _settings(call.args, call.kwargs, names, (1, 0, 0, 1, 1))
        lists = [_tuple(value, len(kernel)) for value in (*lists, dilation)]
    stride, padding, more, dilation = lists
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    ends = [n for b, m in zip(before[::-1], more[::-1], strict=True) for n in (b, b + m)]
    ones = (1,) * len(kernel)
    return Window(kernel, ones, dilation, tuple(ends), groups, upsampling=stride)


def _functional_kernel(call: Call) -> tuple[int, ...]:
    weight = tensor_slot(call.args, call.kwargs, 1, "weight")
    assert isinstance(weight, Tensor)
    return tuple(weight.shape[2:])


def _settings(
    args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str], defaults: Sequence[int]
) -> list[Any]:
    """Return what follows input, weight and bias in a functional call."""
    found = (tensor_slot(tuple(args), kwargs, 3 + i, name) for i, name in enumerate(names))
    return [d if v is None else v for v, d in zip(found, defaults, strict=True)]


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * length if len(values) == 1 else values


def _padding(given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding of a functional call as F.pad takes it; 'same' puts the odd one behind."""
    if given == "valid":
        given = 0
    if given == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(n for t in reversed(total) for n in (t // 2, t - t // 2))
    return tuple(n for p in reversed(_tuple(given, len(kernel))) for n in (p, p))
