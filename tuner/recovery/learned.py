"""A quantizer of one tensor whose scale, and offset, are parameters of the model."""

from typing import Any

import torch
from torch import Tensor, nn

from tuner import formats
from tuner.errors import DataError
from tuner.kernels import from_rows, to_rows
from tuner.quantizer import Quantizer
from tuner.ranges import QParams
from tuner.recovery.lsq import LearnedStep, initial_qparams, learned_fake_quantize
from tuner.schemes import TensorScheme
from tuner.slices import along_axis, slice_rows


class LearnedQuantizer(nn.Module):
    """Fake-quantize by a learned scale: `scale`, and `offset` where the zero point is learned, too.

    `shape` is that of the scale. Until `initialize` or `observe` has set it, there is none.
    A weight has scales as its scheme's granularity says, an activation those of its slices.
    """

    ready: Tensor
    zero_point: Tensor | None

    def __init__(
        self, scheme: TensorScheme, shape: tuple[int, ...], of_weight: bool, learns_offset: bool
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.of_weight = of_weight
        self.scale = nn.Parameter(torch.ones(shape))
        is_affine = formats.get(scheme.format).kind == "int" and not scheme.symmetric
        zeros = torch.zeros(shape)
        self.offset = nn.Parameter(zeros) if is_affine and learns_offset else None
        fixed = zeros.int() if is_affine and not learns_offset else None
        self.register_buffer("zero_point", fixed)
        self.register_buffer("ready", torch.tensor(False))
        self._is_ready = False
        self.register_load_state_dict_post_hook(_note_loaded)  # type: ignore[no-untyped-call]

    @property
    def is_ready(self) -> bool:
        """Whether the scale has been set."""
        return self._is_ready

    @torch.no_grad()
    def initialize(self, qparams: QParams) -> None:
        """Start from these parameters; an offset from the zero point, β = −zp · s."""
        scale = torch.as_tensor(qparams.scale).to(self.scale)
        self.scale.copy_(scale.reshape(self.scale.shape))
        if qparams.zero_point is not None:
            zero = torch.as_tensor(qparams.zero_point, device=scale.device)
            zero = zero.reshape(self.scale.shape)
            if self.offset is not None:
                self.offset.copy_(-zero * self.scale)
            elif self.zero_point is not None:
                self.zero_point.copy_(zero)
        self.ready.fill_(True)
        self._is_ready = True

    def observe(self, x: Tensor) -> None:
        """Start from the first tensor that comes: s = 2 · mean|x| / sqrt(Qp)."""
        if not self._is_ready:
            found = initial_qparams(self._rows(x), self.scheme)
            self.initialize(
                QParams(self._shaped(found.scale, x), self._shaped(found.zero_point, x))
            )

    def qparams(self) -> QParams:
        """Return the parameters now, as a scheme of this operand has them."""
        step = LearnedStep(self.scheme, 1.0, self.zero_point)
        return step.qparams(self.scale, self.offset)

    def check_ready(self) -> None:
        """Raise DataError where there is no scale."""
        if not self._is_ready:
            raise DataError(
                "a learned scale has no value yet: run a batch in training mode first, or give "
                "prepare_qat() a calib_dataloader"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor rounded; raises DataError before there is a scale."""
        self.check_ready()
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return Quantizer(*self._spelled(self.qparams(), x))(x)
        scheme, learned = self._spelled(QParams(self.scale, self.offset), x)
        zero_point = self._spelled(QParams(self.scale, self.zero_point), x)[1].zero_point
        assert isinstance(learned.scale, Tensor)
        assert learned.zero_point is None or isinstance(learned.zero_point, Tensor)
        assert zero_point is None or isinstance(zero_point, Tensor)
        step = LearnedStep(scheme, self._count(x), zero_point)
        return learned_fake_quantize(x, learned.scale, learned.zero_point, step)

    def extra_repr(self) -> str:
        """Return scheme and scale for people."""
        if not self._is_ready:
            return f"{self.scheme.format}, no scale yet"
        return Quantizer(self.scheme, self.qparams()).describe()

    def _spelled(self, qparams: QParams, x: Tensor) -> tuple[TensorScheme, QParams]:
        if self.of_weight:
            return self.scheme, qparams
        return along_axis(self.scheme, qparams, tuple(x.shape))

    def _rows(self, x: Tensor) -> Tensor:
        if self.of_weight or not self.scale.ndim:
            return to_rows(x, self.scheme.reach)
        return slice_rows(x, self.scheme.granularity)

    def _shaped(self, rows: Tensor | float | None, x: Tensor) -> Any:
        """Give `[rows]` of a weight the shape of its scale."""
        if not self.of_weight or not isinstance(rows, Tensor):
            return rows
        return from_rows(rows, tuple(x.shape), self.scheme.reach)

    def _count(self, x: Tensor) -> float:
        """Return N: how many values of a weight, or of one sample, share a scale."""
        samples = 1 if self.of_weight or x.ndim < 2 else x.shape[0]
        return x.numel() / samples / max(self.scale.numel(), 1)


def _note_loaded(module: LearnedQuantizer, incompatible: object) -> None:
    module._is_ready = bool(module.ready)
