"""Before the first trial: record, fold, calibrate once, predict damage, build the space."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tuner.batches import Feeder, batch_size, read_batches
from tuner.config import TuningConfig
from tuner.costs import CostModel, Costs
from tuner.errors import DataError, TunerError
from tuner.graph import OpGraph
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges, Observer
from tuner.presets import Candidate
from tuner.progress import Progress
from tuner.recovery.folding import FoldedPair, find_pairs, fold, folded_names
from tuner.schemes import OpConfig, TensorScheme
from tuner.search_space import (
    FLOAT,
    TuningSpace,
    best_calibrations,
    build_space,
    candidates_of,
    components_wanted,
)
from tuner.sensitivity import SAMPLES, WEIGHT, SensitivityAnalysis, components_of
from tuner.tensors import tensors_in

Candidates = dict[str, list[Candidate]]
Options = dict[str, dict[str, dict[str, Any]]]
"""Op → label → {"config", "damage"}."""

Payload = dict[str, Any]
"""What a resumed study must not compute anew: {"options": Options, "ranges": of activations}."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model that is ready for plans, the space of plans, and what they cost."""

    model: InstrumentedModel
    graph: OpGraph
    folded: tuple[FoldedPair, ...]
    costs: CostModel
    space: TuningSpace
    damages: Mapping[str, Mapping[OpConfig, float]]
    payload: Payload


class Preparation:
    """Prepares a copied model for tuning, reading the calibration data once.

    `record` reads the first batch only, so that what cannot work fails before anything slow runs;
    `finish` reads the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: Callable[[Any, Any], Any] | None,
        config: TuningConfig,
    ) -> None:
        self.model = InstrumentedModel(model)
        self.float_costs = Costs(0.0, 0.0)
        self._config = config
        self._feeder = Feeder(model, forward)
        self._batches = enumerate(read_batches(loader, config.calib_samples))
        self._kept: list[tuple[int, Any]] = []
        self._late: list[Any] = []
        self._candidates: Candidates = {}
        self._graph = OpGraph({})

    def record(self) -> OpGraph:
        """Record the op graph on the first batch and look up every op's candidates."""
        first = next(self._batches)
        self._kept = [first]
        self._graph = self._recorded(first)
        if not self._graph.ops and not self._graph.nodes:
            raise DataError(
                "the model was never called on the first batch: forward(model, batch) must call it"
            )
        self._candidates = self._candidates_of(self._graph)
        self.float_costs = CostModel(self.model.model, self._graph).costs({})
        return self._graph

    def finish(self, progress: Progress, payload: Payload | None = None) -> Prepared:
        """Fold, calibrate and predict damage; a stored payload takes the place of prediction."""
        pairs = tuple(find_pairs(self.model.model, self._graph))
        self.model.weights.replace_originals(fold(self.model.model, pairs))
        ranges = self._calibrate(progress)
        self._graph = replace(self._graph, unreached=self._unreached())
        self.model.install(self._graph.ops, ranges)
        if payload:
            ranges.adopt(payload["ranges"])
        else:
            stored = self._predict(progress)
            payload = {"options": stored, "ranges": ranges.entries(self._statics(stored))}
        options = payload["options"]
        candidates = _candidates_from(options)
        damages = {
            op: {c.config: options[op][c.label]["damage"] for c in found}
            for op, found in candidates.items()
        }
        needless = folded_names(self.model.model, pairs)
        costs = CostModel(self.model.model, self._graph, needless)
        ops = self._graph.ops
        space = build_space(ops, candidates, damages, costs, self._config.objective)
        return Prepared(self.model, self._graph, pairs, costs, space, damages, payload)

    def signature(self) -> str:
        """Describe the options of every op, whatever their damage: what a resumed study shares."""
        table = {
            name: [[c.label, c.config.model_dump(mode="json")] for c in candidates]
            for name, candidates in self._candidates.items()
        }
        return json.dumps(table, sort_keys=True)

    def _candidates_of(self, graph: OpGraph) -> Candidates:
        shapes = {name: tuple(p.shape) for name, p in self.model.model.named_parameters()}
        return candidates_of(graph.ops, self._config.search_space, shapes)

    def _recorded(self, numbered: tuple[int, Any]) -> OpGraph:
        index, batch = numbered
        return self.model.record(lambda: self._feed(index, batch), batch_size(batch))

    def _feed(self, index: int, batch: Any) -> Any:
        """Call the model on a batch; what it raises becomes a DataError that shows the batch."""
        try:
            return self._feeder(self.model.model, batch)
        except TunerError:
            raise
        except Exception as error:  # the user's model may raise anything
            raise DataError(
                f"the model refused calibration batch {index} ({_describe(batch)}): "
                f"{type(error).__name__}: {error}. If batches must be passed otherwise, give "
                "forward=lambda model, batch: …"
            ) from error

    def _calibrate(self, progress: Progress) -> CalibratedRanges:
        progress.phase("calibrating", None)
        observer = Observer(self._operands(self._candidates))
        for index, batch in self._all_batches():
            late = self._observe(observer, index, batch)
            if late:
                self._extend(observer, index, batch)
            progress.advance()
        ranges = CalibratedRanges(observer.statistics)
        ranges.warn_of_nonfinite()
        return ranges

    def _all_batches(self) -> Iterator[tuple[int, Any]]:
        yield from list(self._kept)
        for index, batch in self._batches:
            if sum(batch_size(kept) for _, kept in self._kept) < SAMPLES:
                self._kept.append((index, batch))
            yield index, batch

    def _observe(self, observer: Observer, index: int, batch: Any) -> bool:
        """Calibrate on a batch; return whether it reached ops that were not recorded yet."""
        with torch.no_grad(), self.model.watching(observer):
            self._feed(index, batch)
            reached = set(self.model.runtime.sites)
        observer.end_batch()
        return bool(reached - set(self._graph.ops))

    def _extend(self, observer: Observer, index: int, batch: Any) -> None:
        """Record a batch that took another branch, and calibrate the ops that it adds."""
        self._late.append(batch)
        graph = self._recorded((index, batch))
        added = {name: op for name, op in graph.ops.items() if name not in self._graph.ops}
        self._graph = replace(self._graph, ops={**self._graph.ops, **added})
        candidates = self._candidates_of(self._graph)
        new = {name: options for name, options in candidates.items() if name in added}
        self._candidates.update(new)
        observer.watch_only(self._operands(new))
        self._observe(observer, index, batch)
        observer.watch_only(self._operands(self._candidates))

    def _operands(self, candidates: Candidates) -> dict[str, tuple[int, ...]]:
        """Return the operands of every op that need a calibrated range."""
        wanted = {}
        for name, components in components_wanted(self._graph.ops, candidates).items():
            static = (i for i, scheme in components if i != WEIGHT and scheme.needs_range)
            wanted[name] = tuple(dict.fromkeys(static))
        return wanted

    def _statics(self, options: Options) -> list[tuple[str, int, TensorScheme]]:
        """Return every static activation scheme that the options use."""
        found: dict[tuple[str, int, TensorScheme], None] = {}
        for name, candidates in _candidates_from(options).items():
            for candidate in candidates:
                for index, scheme in components_of(self._graph.ops[name], candidate.config):
                    if index != WEIGHT and scheme.needs_range:
                        found[name, index, scheme] = None
        return list(found)

    def _unreached(self) -> tuple[str, ...]:
        names = set(self._graph.ops)
        called = names | {name.rpartition("/")[0] for name in names}
        return tuple(path for path in self.model.candidates if path not in called)

    def _predict(self, progress: Progress) -> Options:
        components = components_wanted(self._graph.ops, self._candidates)
        progress.phase("predicting damage", None)
        analysis = SensitivityAnalysis(self.model, self._feeder, components, self._config.seed)
        kept = [batch for _, batch in self._kept]
        found = analysis.run(kept, self._late, progress.advance)
        payload: Options = {}
        for name, options in self._candidates.items():
            op = self._graph.ops[name]
            if name in found:
                options = best_calibrations(op, options, found[name])
            payload[name] = {
                option.label: {
                    "config": option.config.model_dump(mode="json"),
                    "damage": found[name].damage(op, option.config) if name in found else 0.0,
                }
                for option in options
            }
        return payload


def _candidates_from(payload: Options) -> Candidates:
    return {
        op: [
            FLOAT
            if label == FLOAT.label
            else Candidate(label, OpConfig.model_validate_json(json.dumps(entry["config"])))
            for label, entry in options.items()
        ]
        for op, options in payload.items()
    }


def _describe(batch: Any) -> str:
    shapes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(batch)]
    return f"a {type(batch).__name__} of {', '.join(shapes[:4]) or 'no tensors'}"
