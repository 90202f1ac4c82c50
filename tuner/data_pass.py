"""The one pass over the calibration data: the op graph, then the ranges of activations."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tuner.batches import Feeder, Forward, batch_size, read_batches
from tuner.errors import DataError, TunerError, brief
from tuner.example import Example, first_call
from tuner.graph import OpGraph
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges, Observer, Watcher
from tuner.operands import Operands, check_operands
from tuner.ops import Op
from tuner.tensors import tensors_in

Wanted = Callable[[Mapping[str, Op]], Operands]
"""Says which operands of these ops need a calibrated range."""


class DataPass:
    """Reads the calibration data once, through an instrumented model.

    `record` reads the first batch only, so that what cannot work fails before anything slow runs;
    `calibrate` reads the rest. `graph` grows where a later batch takes another branch. `kept` are
    the first batches, of at least `keep` samples, `example` is the call that the very first makes
    of the model; `late` those that reached further ops;
    `branches` tells whether batches took different ways through the model.
    """

    def __init__(
        self,
        model: InstrumentedModel,
        loader: Iterable[Any],
        forward: Forward | None = None,
        calib_samples: int | None = None,
        keep: int = 0,
    ) -> None:
        self.feeder = Feeder(model.model, forward)
        self.graph = OpGraph({})
        self.kept: list[Any] = []
        self.example: Example | None = None
        self.late: list[Any] = []
        self.branches = False
        self._model = model
        self._batches = enumerate(read_batches(loader, calib_samples))
        self._keep = keep

    def record(self) -> OpGraph:
        """Record the op graph on the first batch; raises DataError where the model never ran."""
        index, batch = next(self._batches)
        self.kept = [batch]
        with first_call(self._model.model) as calls:
            self.graph = self._recorded(index, batch)
        has_tensors = bool(calls) and next(tensors_in(calls[0]), None) is not None
        self.example = Example.of_call(self._model.model, *calls[0]) if has_tensors else None
        if not self.graph.ops and not self.graph.nodes:
            raise DataError(
                "the model was never called on the first batch: forward(model, batch) must call it"
            )
        return self.graph

    def calibrate(
        self,
        wanted: Wanted,
        advance: Callable[[], object] = lambda: None,
        watchers: Iterable[Watcher] = (),
    ) -> CalibratedRanges:
        """Return the ranges of what is wanted of each op; `advance` is called after each batch.

        `watchers` see every operand of every call.

        Raises SchemeError, before the data are read on, for a range that cannot be had.
        """
        observer = Observer(self._checked(wanted), watchers)
        for index, batch in self._all_batches():
            if self._observe(observer, index, batch):
                self._extend(observer, index, batch, wanted)
            advance()
        self.branches = len(observer.paths) > 1
        self.graph = replace(self.graph, unreached=self._unreached())
        ranges = CalibratedRanges(observer)
        ranges.warn_of_nonfinite()
        return ranges

    def _recorded(self, index: int, batch: Any) -> OpGraph:
        return self._model.record(lambda: self._feed(index, batch), batch_size(batch))

    def _feed(self, index: int, batch: Any) -> Any:
        """Call the model on a batch; what it raises becomes a DataError that shows the batch."""
        try:
            return self.feeder(self._model.model, batch)
        except TunerError:
            raise
        except Exception as error:  # the user's model may raise anything
            raise DataError(
                f"the model refused calibration batch {index} ({_describe(batch)}): "
                f"{brief(error)}. If batches must be passed otherwise, give "
                "forward=lambda model, batch: …"
            ) from error

    def _all_batches(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(list(self.kept))
        for index, batch in self._batches:
            if sum(map(batch_size, self.kept)) < self._keep:
                self.kept.append(batch)
            yield index, batch

    def _observe(self, observer: Observer, index: int, batch: Any) -> bool:
        """Calibrate on a batch; return whether it reached ops that were not recorded yet."""
        with torch.no_grad(), self._model.watching(observer):
            self._feed(index, batch)
            reached = set(self._model.runtime.sites)
        observer.end_batch()
        return bool(reached - set(self.graph.ops))

    def _extend(self, observer: Observer, index: int, batch: Any, wanted: Wanted) -> None:
        """Record a batch that took another branch, and calibrate the ops that it adds."""
        self.late.append(batch)
        known = self.graph.ops
        graph = self._recorded(index, batch)
        added = {name: op for name, op in graph.ops.items() if name not in known}
        self.graph = replace(self.graph, ops={**known, **added})
        operands = self._checked(wanted)
        observer.watch_only({name: kept for name, kept in operands.items() if name in added})
        self._observe(observer, index, batch)
        observer.watch_only(operands)

    def _checked(self, wanted: Wanted) -> Operands:
        operands = wanted(self.graph.ops)
        check_operands(self.graph.ops, operands)
        return operands

    def _unreached(self) -> tuple[str, ...]:
        names = set(self.graph.ops)
        called = names | {name.rpartition("/")[0] for name in names}
        return tuple(path for path in self._model.candidates if path not in called)


def _describe(batch: Any) -> str:
    shapes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(batch)]
    return f"a {type(batch).__name__} of {', '.join(shapes[:4]) or 'no tensors'}"
