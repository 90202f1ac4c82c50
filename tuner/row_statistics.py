"""Statistics of many rows, each of which gets a range of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tuner.calibrators import RowRanges, calibrated_range
from tuner.calibrators.base import finite_ranges
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics, TensorSummary

_NEED_ONLY_ENDS = {"minmax", "ema"}


class RowStatistics:
    """Running statistics of the rows of `[rows, n]` over all batches; NaN and ±inf are left out.

    `methods` are the calibration methods that `ranges` will be asked for. minmax and EMA need the
    ends of each row, of all batches or of each; the others need a histogram of each row (32 KiB).
    """

    def __init__(self, methods: Iterable[str]) -> None:
        self._methods = frozenset(methods)
        self._summarized: list[TensorStatistics] = []
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._ends: list[Tensor] = []

    @property
    def count(self) -> int:
        """The number of finite values in all rows."""
        return sum(row.count for row in self._summarized) + int(self._counts.sum())

    def update(self, rows: Tensor) -> None:
        """Add one batch; all batches have the same number of rows."""
        if self._methods <= _NEED_ONLY_ENDS:
            self._add_ends(rows)
            return
        self._summarized = self._summarized or [TensorStatistics() for _ in rows]
        for statistics, row in zip(self._summarized, rows, strict=True):
            statistics.update(row)

    def ranges(self, scheme: TensorScheme) -> RowRanges:
        """Return the lowest and the highest value of each row's range, each `[rows]` in fp64."""
        rows = self._summarized or self._from_ends()
        ranges = [calibrated_range(statistics, scheme) for statistics in rows]
        low, high = torch.tensor(ranges, dtype=torch.float64).reshape(-1, 2).unbind(-1)
        return low, high

    def _add_ends(self, rows: Tensor) -> None:
        counts = torch.isfinite(rows).sum(-1).cpu()
        self._counts = self._counts + counts if self._ends else counts
        ends = torch.stack(finite_ranges(rows)).double().cpu()
        if self._ends and "ema" not in self._methods:
            low, high = self._ends.pop()
            ends = torch.stack((torch.minimum(low, ends[0]), torch.maximum(high, ends[1])))
        self._ends.append(ends)

    def _from_ends(self) -> list[TensorStatistics]:
        lows, highs = torch.stack(self._ends, -1).tolist()  # each [rows, batches]
        found = []
        for low, high, count in zip(lows, highs, self._counts.tolist(), strict=True):
            seen = [(a, b) for a, b in zip(low, high, strict=True) if a <= b]
            found.append(TensorStatistics(TensorSummary(min(low), max(high), count), seen))
        return found
