"""Fake-quantization on accelerators in one pass: which tensors, and how they are seen."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor, nn

from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor
from tuner.kernels import native
from tuner.kernels.codecs import Bound, Codec, IntegerCodec
from tuner.kernels.formulas import (
    Formula,
    Rounding,
    in_groups,
    mx_rounding,
    pass_inside,
    rounding_of,
    snap_mx_blocks,
    snap_mx_rows,
    snap_plain_float,
    snap_plain_float_by_inverse,
)
from tuner.kernels.graphs import GRAPHS
from tuner.kernels.layout import Shape, block_parameter, parameter_shape
from tuner.kernels.native import SUFFIX, Bounds, MxScale, is_plain, is_transformed

_TYPES = (Tensor, nn.Parameter)
# fewer values take as long as the launches of their operations: nothing is won by compiling
SMALLEST = 1 << 16
_MOST = (1 << 31) - 1  # graphs count in 32 bits
_ALIGNMENT = 16  # bytes: inductor copies what lies otherwise
_MOST_LAYOUTS = 64  # that a grid keeps, one for each shape


def fusible(x: Tensor) -> bool:
    """Whether graphs can work on a tensor: plain, large, on their device, and not being traced."""
    return (
        not is_transformed()
        and type(x) in _TYPES
        and GRAPHS.can_run_on(x.device.type)
        and x.dtype in SUFFIX
        and SMALLEST <= x.numel() <= _MOST
        and not x.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and x.data_ptr() % _ALIGNMENT == 0
    )


@dataclass(frozen=True)
class _Fold:
    """How a tensor and its parameters are seen, so that they broadcast and no size is 1 by chance.

    The tensor is permuted by `order`, where there is one, and viewed in `shape`, the parameters in
    `shared`. Ragged groups have `group`, the size of one, and two-dimensional views.
    """

    shape: Shape
    shared: Shape
    order: tuple[int, ...] | None = None
    group: int | None = None

    def view(self, x: Tensor) -> Tensor:
        """Return the view of a tensor, in the order of memory."""
        return (x if self.order is None else x.permute(self.order)).view(self.shape)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What graphs differ in."""
        return len(self.shape), tuple(size == 1 for size in self.shared), self.group is not None


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What tensors of one shape and order in memory are computed with, but for themselves."""

    formula: Formula
    kind: tuple[object, ...]
    fold: _Fold
    inputs: tuple[Tensor, ...]

    def run(self, x: Tensor, *others: Tensor) -> Tensor | None:
        """Return the result for a tensor, and others like it; None if nothing can be compiled."""
        out = torch.empty_like(x)
        views = (self.fold.view(other.detach()) for other in others)
        tensors = self.fold.view(x.detach()), self.fold.view(out), *self.inputs, *views
        return out if GRAPHS.run(self.formula, self.kind, tensors) else None


class FusedGrid:
    """A grid as graphs take it; see `tuner.kernels.grid.Grid`."""

    def __init__(self, granularity: Granularity, bounds: Bounds, codec: Codec) -> None:
        self._granularity = granularity
        self._rounding = _rounding(bounds, codec)
        self._bounds: tuple[Bound, ...] = (bounds.scale,)
        if bounds.inverse is not None:
            self._bounds = bounds.scale, bounds.inverse
        elif isinstance(codec, IntegerCodec):
            self._bounds = bounds.scale, bounds.low, bounds.high
        self._layouts: dict[object, _Prepared | None] = {}

    def snap(self, x: Tensor) -> Tensor | None:
        """Return `x` on the grid in its own memory format; None where only torch can do it."""
        prepared = None
        if self._rounding is not None:
            prepared = self._prepared(x, self._rounding, self._bounds)
        return None if prepared is None else prepared.run(x)

    def mask(self, x: Tensor, gradient: Tensor, ends: tuple[Bound, Bound]) -> Tensor | None:
        """Return the gradient where x lies between the ends, else 0; None if only torch can."""
        if not is_plain(gradient) or gradient.dtype != x.dtype:
            return None
        if gradient.stride() != x.stride() or not fusible(gradient):
            gradient = torch.empty_like(x).copy_(gradient)
        prepared = self._prepared(x, Rounding(pass_inside), ends)
        return None if prepared is None else prepared.run(x, gradient)

    def _prepared(
        self, x: Tensor, rounding: Rounding, bounds: tuple[Bound, ...]
    ) -> _Prepared | None:
        key = x.shape, x.stride(), x.device, rounding.formula
        if key not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._prepare(x, rounding, bounds)
        return self._layouts[key]

    def _prepare(
        self, x: Tensor, rounding: Rounding, bounds: tuple[Bound, ...]
    ) -> _Prepared | None:
        is_shared = any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in bounds)
        granularity = self._granularity if is_shared else PerTensor()
        shape = tuple(x.shape)
        for bound in bounds:
            if isinstance(bound, Tensor):
                block_parameter(bound, shape, self._granularity)  # raises if it does not fit
        fold = _fold(shape, x.stride(), granularity)
        if fold is None:
            return None
        expected = parameter_shape(shape, granularity)
        parameters = (_spread(bound, expected, x.device) for bound in bounds)
        inputs = *(p.reshape(fold.shared) for p in parameters), *_constants(rounding, x.device)
        formula, kind = rounding.formula, (rounding.formula, *fold.kind)
        if fold.group is None:
            return _Prepared(formula, kind, fold, inputs)
        group = torch.arange(fold.shape[1], device=x.device) // fold.group
        grouped = partial(in_groups, formula, len(bounds))
        return _Prepared(grouped, kind, fold, (group, *inputs))


def _spread(bound: Bound, shape: Shape, device: torch.device) -> Tensor:
    parameter = torch.as_tensor(bound, dtype=torch.float32, device=device).detach()
    whole = parameter.reshape(()) if parameter.numel() == 1 else parameter
    return whole.expand(shape).contiguous()


def snap_mx(x: Tensor, mx: MxScale, codec: Codec) -> Tensor | None:
    """Return `x` in an MX format, each block on its own scale; None if only torch can do it."""
    if not fusible(x):
        return native.snap_mx(x, mx, codec)
    rounding = mx_rounding(mx, codec)
    length = x.shape[-1]
    is_even = length % mx.size == 0
    if rounding is None or not x.is_contiguous() or (x.numel() == length and not is_even):
        return None
    out = torch.empty_like(x)
    shape = (-1, mx.size if is_even else length)
    tensors = x.detach().view(shape), out.view(shape), *_constants(rounding, x.device)
    formula = snap_mx_blocks if is_even else partial(snap_mx_rows, mx.size)
    kind = "mx", mx.size, is_even or length > mx.size, is_even
    return out if GRAPHS.run(formula, kind, tensors, static_last=is_even) else None


def _rounding(bounds: Bounds, codec: Codec) -> Rounding | None:
    rounding = rounding_of(codec)
    if rounding is None or bounds.inverse is None:
        return rounding
    if rounding.formula is not snap_plain_float:
        return None
    return replace(rounding, formula=snap_plain_float_by_inverse)


@lru_cache(maxsize=1024)
def _constants(rounding: Rounding, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        floats = torch.tensor(rounding.floats, dtype=torch.float32, device=device)
        integers = torch.tensor(rounding.integers, dtype=torch.int32, device=device)
    return tuple(tensor for tensor in (floats, integers) if tensor.numel())


@lru_cache(maxsize=4096)
def _fold(shape: Shape, stride: Shape, granularity: Granularity) -> _Fold | None:
    """Return how tensors of a shape are seen; None where no view is simple enough."""
    order = None
    if not _is_dense(shape, stride):
        order = tuple(sorted(range(len(shape)), key=stride.__getitem__, reverse=True))
        shape = tuple(shape[axis] for axis in order)
        if not _is_dense(shape, tuple(stride[axis] for axis in order)):
            return None
    if isinstance(granularity, PerTensor):
        return _Fold((math.prod(shape),), (), order)
    if isinstance(granularity, PerChannel):
        axis = granularity.axis % len(shape)
        return _by_channels(shape, axis if order is None else order.index(axis), order)
    if order is not None:
        return None
    axis = granularity.axis % len(shape) if isinstance(granularity, PerGroup) else len(shape) - 1
    size = granularity.size if isinstance(granularity, PerGroup | PerBlock) else shape[axis]
    return _by_groups(shape, axis, min(size, shape[axis]))


def _is_dense(shape: Shape, stride: Shape) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _by_channels(shape: Shape, axis: int, order: tuple[int, ...] | None) -> _Fold | None:
    outer, length, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if outer == 1:
        return _Fold((length, inner), (length, 1), order) if inner > 1 else None
    if inner == 1:
        return _Fold((outer, length), (length,), order)
    return _Fold((outer, length, inner), (length, 1), order)


def _by_groups(shape: Shape, axis: int, size: int) -> _Fold | None:
    outer, length, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    groups = -(-length // size)
    if length % size:
        is_simple = inner == 1 and outer > 1
        return _Fold((outer, length), (outer, groups), group=size) if is_simple else None
    rows = outer * groups
    if size == 1:
        return None  # every value has a scale of its own
    if inner == 1:
        return _Fold((rows, size), (rows, 1))
    if rows == 1:
        return _Fold((size, inner), (inner,))
    return _Fold((rows, size, inner), (rows, 1, inner))
