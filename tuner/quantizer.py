"""A fake-quantizer for repeated use in a forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from tuner import formats
from tuner.granularity import PerBlock, PerGroup, PerTensor
from tuner.kernels import Grid, check_floats, codec_of, is_transformed, snap, snap_rows
from tuner.qparams import (
    QParams,
    check_qparams,
    fake_quantize,
    fake_quantize_on,
    grid_of,
    whole_scale,
)
from tuner.schemes import TensorScheme


class Quantizer:
    """Fake-quantize tensors by one scheme: `quantizer(x) == fake_quantize(x, scheme, qparams)`.

    `qparams` is None where scale and zero point are taken from each tensor. A quantizer does not
    change; build another for other parameters.
    """

    def __init__(self, scheme: TensorScheme, qparams: QParams | None = None) -> None:
        fmt = formats.get(scheme.format)
        if qparams is not None:
            check_qparams(scheme, qparams)
        elif not fmt.scaled:
            qparams = QParams(1.0)
        codec_of(fmt)  # made now: torch.compile would compile anew for a table that grows
        self.scheme = scheme
        self.qparams = qparams
        self._grids: dict[tuple[torch.device, torch.dtype], Grid] = {}
        self._dense: dict[torch.dtype, Callable[[Tensor], Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_grids": {}, "_dense": {}}  # they hold addresses in this process

    def __call__(self, x: Tensor) -> Tensor:
        # what follows is arithmetic on plain tensors: no function mode needs to see it
        with torch._C.DisableTorchFunction():
            if not is_transformed() and type(x) is Tensor:  # the shortest way, mostly taken
                dense = self._dense.get(x.dtype)
                has_gradient = x.requires_grad and torch.is_grad_enabled()
                is_plain = x.is_cpu and x.is_contiguous() and not x.is_neg()
                if dense is not None and is_plain and not has_gradient:
                    return dense(x)
            check_floats(x, "quantization")
            # rows with gaps are closed up, as the op itself would do
            has_gaps = not x.is_contiguous() and _has_gaps_between_rows(x)
            if self.qparams is None:
                return fake_quantize(x.contiguous() if has_gaps else x, self.scheme)
            grid = self._grid(x, self.qparams)
            if x.requires_grad and torch.is_grad_enabled():
                return fake_quantize_on(x.contiguous() if has_gaps else x, grid)
            return snap_rows(x, grid) if has_gaps else snap(x, grid)

    @property
    def is_elementwise(self) -> bool:
        """Whether pieces of a tensor come out as they do from the whole."""
        return (
            self.qparams is not None
            and isinstance(self.scheme.reach, PerTensor)
            and formats.get(self.scheme.format).forward is None
        )

    def gives_as(self, other: "Quantizer") -> bool:
        """Whether tensors come out as from another quantizer: of the same scheme and parameters."""
        if self.scheme != other.scheme or self.qparams is None or other.qparams is None:
            return self.scheme == other.scheme and self.qparams is other.qparams
        pairs = zip(vars(self.qparams).values(), vars(other.qparams).values(), strict=True)
        return all(_are_equal(one, another) for one, another in pairs)

    def describe(self) -> str:
        """Return one line for people: 'int8 per-tensor affine, scale 0.0123, zero point 12'."""
        scheme, fmt = self.scheme, formats.get(self.scheme.format)
        text = f"{fmt.name} {_reach(scheme)}" if fmt.scaled else fmt.name
        if fmt.kind == "int" and fmt.block is None:
            text += " symmetric" if scheme.symmetric else " affine"
        if self.qparams is None:
            return f"{text}, dynamic"
        if fmt.scaled:
            text += f", scale {_span(whole_scale(self.qparams))}"
        if self.qparams.zero_point is not None:
            text += f", zero point {_span(self.qparams.zero_point)}"
        return text

    def __repr__(self) -> str:
        return f"Quantizer({self.describe()})"

    def _grid(self, x: Tensor, qparams: QParams) -> Grid:
        if torch.compiler.is_compiling():  # what is made now is a part of the trace
            return grid_of(self.scheme, qparams, x)
        key = x.device, x.dtype
        grid = self._grids.get(key)
        if grid is None:
            grid = self._grids[key] = grid_of(self.scheme, qparams, x)
            if x.is_cpu and (dense := grid.native.dense(x.dtype)) is not None:
                self._dense[x.dtype] = dense
        return grid


def _are_equal(one: Tensor | float | None, other: Tensor | float | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def _has_gaps_between_rows(x: Tensor) -> bool:
    """Whether rows of the last axis are dense, but do not follow one another: a part of a tensor.

    Other tensors keep their order in memory: convolutions compute by it.
    """
    if torch.compiler.is_compiling() or not x.ndim or x.stride(-1) != 1:
        return False
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return reach + 1 != x.numel()


def _reach(scheme: TensorScheme) -> str:
    reach = scheme.reach
    words = reach.kind.replace("_", "-")
    return f"{words} of {reach.size}" if isinstance(reach, PerGroup | PerBlock) else words


def _span(value: Tensor | float) -> str:
    """Format a number, or the smallest and the largest of many."""
    if not isinstance(value, Tensor):
        return f"{value:.4g}"
    if value.numel() == 0:
        return "of nothing"
    low, high = value.min().item(), value.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
