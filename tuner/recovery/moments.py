"""First and second moments of what an op's weight multiplies."""

import torch
from torch import Tensor

from tuner.ops import WeightRef
from tuner.recovery.rounding_rows import rows_of
from tuner.sites import Call

MAX_ROWS = 16_384
MAX_WIDTH = 8_192
_EXPECTED_CALLS = 8


class InputMoments:
    """Running moments of the rows x that a weight `as_matrix` multiplies, over all calls.

    At most `max_rows` rows are taken. Each call may take an even share of what is left for the
    calls still expected, and what it does not need is left to those that follow: after
    `expected_calls` calls one takes all that is left. Rows that hold NaN or inf are left out and
    counted. The sum of the second moments is kept in fp32: each addend is a sum over many rows, so
    there are few, and their rounding is far below the damping of whoever inverts it; in fp64 the
    widest op would take 512 MiB. `mean` and `mean_abs`, which are small, are summed in fp64.
    """

    def __init__(
        self,
        weight: WeightRef,
        max_rows: int = MAX_ROWS,
        expected_calls: int = _EXPECTED_CALLS,
    ) -> None:
        self.operand = 1 if weight.operand == 0 else 0
        self.count = 0
        self.nonfinite_rows = 0
        self._weight = weight
        self._left = max_rows
        self._calls_left = expected_calls
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, call: Call, x: Tensor) -> None:
        """Add a call; `x` is its operand number `operand`. A call without rows adds nothing."""
        share = -(-self._left // max(self._calls_left, 1))
        self._calls_left -= 1
        read = rows_of(call, self._weight) if share else None
        if read is None or not x.numel():
            return
        rows = read(x.detach(), share)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        finite = rows.isfinite().all(-1).all(0)
        self._left -= rows.shape[1]
        self.nonfinite_rows += int((~finite).sum())
        self._add(rows if bool(finite.all()) else rows[:, finite])

    @property
    def mean(self) -> Tensor | None:
        """E[x] `[groups, in·k]` in fp64, None before any row."""
        return None if self._sums is None else self._sums[0] / max(self.count, 1)

    @property
    def mean_abs(self) -> Tensor | None:
        """E[|x|] `[groups, in·k]` in fp64, None before any row."""
        return None if self._sums is None else self._sums[1] / max(self.count, 1)

    @property
    def second(self) -> Tensor | None:
        """E[x xᵀ] `[groups, in·k, in·k]`, None before any row."""
        return None if self._sums is None else self._sums[2] / max(self.count, 1)

    def _add(self, rows: Tensor) -> None:
        self.count += rows.shape[1]
        total, total_abs = rows.sum(1).double(), rows.abs().sum(1).double()
        if self._sums is None:
            self._sums = total, total_abs, rows.mT @ rows
            return
        self._sums[0].add_(total)
        self._sums[1].add_(total_abs)
        self._sums[2].baddbmm_(rows.mT, rows)


def moments_for(
    call: Call,
    weight: WeightRef,
    x: Tensor,
    max_rows: int = MAX_ROWS,
    expected_calls: int = _EXPECTED_CALLS,
) -> InputMoments | None:
    """Return empty moments for an op's input, or None where it has none.

    `call` is any call of the op, `weight` its one weight, `x` its other operand. None for the kinds
    of op that `rows_of` leaves out, and where in·k is above 8192: the second moments take 4 (in·k)²
    bytes.
    """
    read = rows_of(call, weight)
    if read is None or read(x.detach(), 1).shape[-1] > MAX_WIDTH:
        return None
    return InputMoments(weight, max_rows, expected_calls)
