"""Quantizers of a trainable model without parameters: ranges that follow the values."""

import torch
from torch import Tensor, nn

from tuner import formats
from tuner.calibrators.base import finite_ranges
from tuner.errors import DataError
from tuner.qparams import fake_quantize, fake_quantize_on, grid_of
from tuner.quantizer import Quantizer
from tuner.ranges import QParams, qparams_from_range, symmetric_zero_point
from tuner.schemes import TensorScheme
from tuner.slices import along_axis, slice_rows


class OwnQuantizer(nn.Module):
    """Fake-quantize each tensor by scales that it gives itself: weights, dynamic activations."""

    is_ready = True

    def __init__(self, scheme: TensorScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def observe(self, x: Tensor) -> None:
        """Keep nothing."""

    def check_ready(self) -> None:
        """Do nothing: no range is needed."""

    def qparams(self) -> QParams | None:
        """Return None: the tensor itself gives the parameters."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor rounded, the gradient passed straight through inside the range."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return fake_quantize(x, self.scheme)
        return Quantizer(self.scheme)(x)


class RangeQuantizer(nn.Module):
    """Fake-quantize by the exponential moving average of the batches' ranges.

    `low ← decay · low + (1 − decay) · min(x)`, `high` likewise, each `[]` or `[slices]`; the first
    batch initialises them (Jacob et al., CVPR 2018, section 3.1). NaN and ±inf are left out.
    """

    low: Tensor
    high: Tensor
    ready: Tensor

    def __init__(self, scheme: TensorScheme, shape: tuple[int, ...], decay: float) -> None:
        super().__init__()
        self.scheme = scheme
        self.decay = decay
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.zeros(shape))
        self.register_buffer("ready", torch.tensor(False))
        self._is_ready = False
        self.register_load_state_dict_post_hook(_note_loaded)  # type: ignore[no-untyped-call]

    @property
    def is_ready(self) -> bool:
        """Whether a range is known."""
        return self._is_ready

    @torch.no_grad()
    def initialize(self, qparams: QParams) -> None:
        """Start from the range that these parameters stand for."""
        low, high = range_of(qparams, self.scheme)
        self._set(low.reshape(self.low.shape), high.reshape(self.high.shape))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the average towards the range of a batch."""
        rows = slice_rows(x, self.scheme.granularity) if self.low.ndim else x.reshape(1, -1)
        low, high = (end.to(self.low).reshape(self.low.shape) for end in finite_ranges(rows))
        known = low <= high  # else nothing was finite
        if not self._is_ready:
            zeros = torch.zeros_like(low)
            self._set(torch.where(known, low, zeros), torch.where(known, high, zeros))
            return
        for average, end in ((self.low, low), (self.high, high)):
            moved = self.decay * average + (1 - self.decay) * end
            average.copy_(torch.where(known, moved, average))

    def qparams(self) -> QParams:
        """Return the parameters now, as a scheme of this operand has them."""
        return qparams_from_range(self.low, self.high, self.scheme)

    def check_ready(self) -> None:
        """Raise DataError where there is no range."""
        if not self._is_ready:
            raise DataError(
                "an activation has no range yet: run a batch in training mode first, or give "
                "prepare_qat() a calib_dataloader"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor rounded; raises DataError before there is a range."""
        self.check_ready()
        with torch.no_grad():
            scheme, qparams = along_axis(self.scheme, self.qparams(), tuple(x.shape))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return fake_quantize_on(x, grid_of(scheme, qparams, x))
        return Quantizer(scheme, qparams)(x)

    def extra_repr(self) -> str:
        """Return scheme and scale for people."""
        if not self._is_ready:
            return f"{self.scheme.format}, no range yet"
        return Quantizer(self.scheme, self.qparams()).describe()

    def _set(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)
        self.ready.fill_(True)
        self._is_ready = True


def range_of(qparams: QParams, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest value that parameters stand for: what gives these again."""
    scale = torch.as_tensor(qparams.scale).double()
    fmt = formats.get(scheme.format)
    if fmt.kind != "int":
        return -scale * fmt.largest, scale * fmt.largest
    low, high = scheme.quant_range
    if scheme.symmetric:
        zero = symmetric_zero_point(scheme)
        sides = high - zero, zero - low
        span = scale * (min(sides) or max(sides))
        return -span, span
    zeros = torch.as_tensor(0 if qparams.zero_point is None else qparams.zero_point)
    return (low - zeros) * scale, (high - zeros) * scale


def _note_loaded(module: RangeQuantizer, incompatible: object) -> None:
    module._is_ready = bool(module.ready)
