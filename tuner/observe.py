"""The one calibration pass: what it keeps of every activation, and the ranges that follow."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.calibrators import calibrated_range
from tuner.errors import CalibrationWarning, DataError
from tuner.model import OUTPUT
from tuner.ranges import QParams, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.sites import Call, Site
from tuner.statistics import TensorStatistics, TensorSummary, summarize

_REMEMBERED = 4
Operands = Mapping[str, tuple[int, ...]]
"""Op name → operand indices (OUTPUT for the output)."""


class Observer:
    """A tap that keeps statistics of the wanted operands of every op.

    A tensor that feeds several ops one after the other (query, key, value) is summarized once.
    """

    def __init__(self, wanted: Operands) -> None:
        self.statistics: dict[tuple[str, int], TensorStatistics] = {}
        self._wanted = wanted
        self._recent: list[tuple[Tensor, int, TensorSummary]] = []

    def run(self, site: Site, call: Call) -> Any:
        """Compute the call and look at its operands and output."""
        site.calls += 1
        wanted = self._wanted.get(site.name, ())

        def look(index: int, x: Tensor) -> Tensor:
            if index in wanted:
                self._update(site.name, index, x)
            return x

        output = call.invoke(look)
        if OUTPUT in wanted:
            self._update(site.name, OUTPUT, output if isinstance(output, Tensor) else output[0])
        return output

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute any other call."""
        return fn(*args, **kwargs)

    def watch_only(self, wanted: Operands) -> None:
        """Look at these operands from now on."""
        self._wanted = wanted

    def end_batch(self) -> None:
        """Forget the tensors of this batch."""
        self._recent.clear()

    def _update(self, op: str, index: int, x: Tensor) -> None:
        statistics = self.statistics.setdefault((op, index), TensorStatistics())
        statistics.merge(self._summary(x))

    def _summary(self, x: Tensor) -> TensorSummary:
        version = -1 if x.is_inference() else x._version
        for seen, seen_version, summary in self._recent:
            if seen is x and seen_version == version >= 0:
                return summary
        summary = summarize(x)
        self._recent = [*self._recent[1 - _REMEMBERED :], (x, version, summary)]
        return summary


class CalibratedRanges:
    """Quantization parameters of activations from the statistics of one calibration pass."""

    def __init__(self, statistics: Mapping[tuple[str, int], TensorStatistics]) -> None:
        self._statistics = dict(statistics)
        self._known: dict[tuple[str, int, TensorScheme], QParams] = {}
        self._by_values: dict[object, QParams] = {}

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return the parameters of an operand under a static per-tensor scheme."""
        key = (op, operand, scheme)
        if key not in self._known:
            if scheme.granularity.kind != "per_tensor":
                raise DataError(
                    f"{op}: a static {scheme.granularity.kind} scheme for an activation needs a "
                    "range per slice, and calibration keeps one per tensor: use PerTensor(), "
                    "PerToken(), or dynamic=True"
                )
            statistics = self._statistics.get((op, operand))
            if statistics is None or not statistics.count:
                raise DataError(
                    f"{op}: calibration saw no finite value of operand {operand}: give "
                    "calibration data that reaches this op"
                )
            self._known[key] = self._searched(statistics, scheme)
        return self._known[key]

    def _searched(self, statistics: TensorStatistics, scheme: TensorScheme) -> QParams:
        """Search a range once for all operands that saw the same values (query, key, value)."""
        seen = statistics.overall
        values = (seen.minimum, seen.maximum, seen.count, seen.total, seen.total_squared)
        key = (values, tuple(statistics.batch_ranges), scheme)
        if key not in self._by_values:
            low, high = calibrated_range(statistics, scheme)
            low_high = torch.tensor(low), torch.tensor(high)
            self._by_values[key] = qparams_from_range(*low_high, scheme)
        return self._by_values[key]

    def adopt(self, entries: Iterable[Sequence[Any]]) -> None:
        """Take parameters that were stored: [operation, operand, scheme, scale, zero point]."""
        for op, operand, scheme, scale, zero_point in entries:
            key = (op, operand, TensorScheme.model_validate_json(json.dumps(scheme)))
            zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
            self._known[key] = QParams(torch.tensor(scale), zero)

    def entries(self, wanted: Iterable[tuple[str, int, TensorScheme]]) -> list[list[Any]]:
        """Return the parameters of these operands in the form that `adopt` takes."""
        found = []
        for op, operand, scheme in wanted:
            qparams = self.qparams(op, operand, scheme)
            zero = None if qparams.zero_point is None else int(qparams.zero_point)
            shown = scheme.model_dump(mode="json")
            found.append([op, operand, shown, float(qparams.scale), zero])
        return found

    def warn_of_nonfinite(self) -> None:
        """Warn once where calibration left out NaN or infinite values."""
        counts = {key: s.nonfinite for key, s in self._statistics.items() if s.nonfinite}
        if counts:
            (op, operand), most = max(counts.items(), key=lambda item: item[1])
            warnings.warn(
                f"calibration left out {sum(counts.values())} non-finite activation values in "
                f"{len({op for op, _ in counts})} ops; most in {op} (operand {operand}: {most}). "
                "Check the calibration data for NaN or overflow",
                CalibrationWarning,
                stacklevel=4,
            )
