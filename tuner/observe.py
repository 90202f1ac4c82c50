"""The one calibration pass: what it keeps of every activation, and the ranges that follow."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.calibrators import calibrated_range
from tuner.errors import CalibrationWarning, DataError
from tuner.granularity import Granularity, PerTensor
from tuner.operands import OUTPUT, Operands, operand_name
from tuner.ranges import QParams, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.sites import Call, Site
from tuner.slices import SlicedStatistics
from tuner.statistics import TensorStatistics, TensorSummary, summarize
from tuner.tensors import head_of

_REMEMBERED = 4

Slices = dict[tuple[str, int, Granularity], SlicedStatistics]
"""Statistics of the slices of operands that have other scales than one for all."""

_Methods = dict[Granularity, set[str]]


Watcher = Callable[[str, Call, int, Tensor], None]
"""Looks at every operand of every call: op, call, operand index, tensor."""


class Observer:
    """A tap that keeps statistics of the wanted operands of every op.

    What is kept of an operand follows from its schemes: statistics of the whole where one is per
    tensor, of the slices where one has scales along an axis. A tensor that feeds several ops one
    after the other (query, key, value) is summarized once. `paths` tells which batches called the
    same functions in the same order: one number for each way through the model. `watchers` see
    every operand of every call.
    """

    def __init__(self, wanted: Operands, watchers: Iterable[Watcher] = ()) -> None:
        self.statistics: dict[tuple[str, int], TensorStatistics] = {}
        self.slices: Slices = {}
        self.paths: set[int] = set()
        self._wanted = _methods_of(wanted)
        self._watchers = tuple(watchers)
        self._path = 0
        self._recent: list[tuple[Tensor, int, TensorSummary]] = []

    def run(self, site: Site, call: Call) -> Any:
        """Compute the call and look at its operands and output."""
        site.calls += 1
        self._path = hash((self._path, site.name))
        wanted = self._wanted.get(site.name, {})

        def look(index: int, x: Tensor) -> Tensor:
            for watcher in self._watchers:
                watcher(site.name, call, index, x)
            if index in wanted:
                self._update(site.name, index, x, wanted[index])
            return x

        output = call.invoke(look)
        if OUTPUT in wanted:
            self._update(site.name, OUTPUT, head_of(output), wanted[OUTPUT])
        return output

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute any other call."""
        self._path = hash((self._path, scope, getattr(fn, "__name__", "")))
        return fn(*args, **kwargs)

    def watch_only(self, wanted: Operands) -> None:
        """Look at these operands from now on."""
        self._wanted = _methods_of(wanted)

    def end_batch(self) -> None:
        """Forget the tensors of this batch."""
        self._recent.clear()
        self.paths.add(self._path)
        self._path = 0

    def _update(self, op: str, index: int, x: Tensor, wanted: _Methods) -> None:
        for granularity, methods in wanted.items():
            if isinstance(granularity, PerTensor):
                statistics = self.statistics.setdefault((op, index), TensorStatistics())
                statistics.merge(self._summary(x))
                continue
            key = op, index, granularity
            if key not in self.slices:
                where = operand_name(op, index)
                self.slices[key] = SlicedStatistics(where, granularity, methods)
            self.slices[key].update(x)

    def _summary(self, x: Tensor) -> TensorSummary:
        version = -1 if x.is_inference() else x._version
        for seen, seen_version, summary in self._recent:
            if seen is x and seen_version == version >= 0:
                return summary
        summary = summarize(x)
        self._recent = [*self._recent[1 - _REMEMBERED :], (x, version, summary)]
        return summary


def _methods_of(wanted: Operands) -> dict[str, dict[int, _Methods]]:
    """Return op → operand → granularity → the calibration methods that will be asked for."""
    found: dict[str, dict[int, _Methods]] = {}
    for op, statics in wanted.items():
        for index, scheme in statics:
            methods = found.setdefault(op, {}).setdefault(index, {})
            methods.setdefault(scheme.granularity, set()).add(scheme.calibration)
    return found


class CalibratedRanges:
    """Quantization parameters of activations from the statistics of one calibration pass."""

    def __init__(self, observer: Observer) -> None:
        self._statistics = dict(observer.statistics)
        self._slices = dict(observer.slices)
        self._known: dict[tuple[str, int, TensorScheme], QParams] = {}
        self._by_values: dict[object, QParams] = {}

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return the parameters of an operand under a static scheme: `[]`, or `[slices]`."""
        key = (op, operand, scheme)
        if key not in self._known:
            of_slices = self._slices.get((op, operand, scheme.granularity))
            whole = isinstance(scheme.granularity, PerTensor)
            statistics = self._statistics.get((op, operand)) if whole else of_slices
            if statistics is None or not statistics.count:
                raise DataError(
                    f"{op}: calibration saw no finite value of operand {operand}: give "
                    "calibration data that reaches this op"
                )
            if isinstance(statistics, SlicedStatistics):
                self._known[key] = statistics.qparams(scheme)
            else:
                self._known[key] = self._searched(statistics, scheme)
        return self._known[key]

    def replace(self, op: str, operand: int, statistics: TensorStatistics) -> None:
        """Take other statistics of an operand, per tensor: it was scaled."""
        self._statistics[op, operand] = statistics

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
        """Take parameters that were stored: [operation, operand, scheme, scale, zero point].

        Scale and zero point are numbers, or lists with one for each slice.
        """
        for op, operand, scheme, scale, zero_point in entries:
            key = (op, operand, TensorScheme.model_validate_json(json.dumps(scheme)))
            zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
            self._known[key] = QParams(torch.tensor(scale), zero)

    def entries(self, wanted: Iterable[tuple[str, int, TensorScheme]]) -> list[list[Any]]:
        """Return the parameters of these operands in the form that `adopt` takes."""
        found = []
        for op, operand, scheme in wanted:
            qparams = self.qparams(op, operand, scheme)
            scale, zero = (_as_stored(value) for value in (qparams.scale, qparams.zero_point))
            found.append([op, operand, scheme.model_dump(mode="json"), scale, zero])
        return found

    def warn_of_nonfinite(self) -> None:
        """Warn once where calibration left out NaN or infinite values."""
        counts: Counter[tuple[str, int]] = Counter()
        for (op, operand), whole in self._statistics.items():
            counts[op, operand] = whole.nonfinite
        for (op, operand, _), slices in self._slices.items():
            counts[op, operand] = slices.nonfinite  # of the same values as the whole
        counts = +counts
        if counts:
            ((op, operand), most), *_ = counts.most_common(1)
            warnings.warn(
                f"calibration left out {sum(counts.values())} non-finite activation values in "
                f"{len({op for op, _ in counts})} ops; most in {op} (operand {operand}: {most}). "
                "Check the calibration data for NaN or overflow",
                CalibrationWarning,
                stacklevel=4,
            )


def _as_stored(value: Tensor | float | None) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
