"""Before the first trial: record, fold, calibrate once, predict damage, build the space."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tuner.biases import bias_name, can_correct
from tuner.config import TuningConfig
from tuner.costs import CostModel, Costs
from tuner.data_pass import DataPass
from tuner.errors import StudyMismatchError
from tuner.example import Example
from tuner.exporters.exporting import check_model
from tuner.exporters.targets import exporter
from tuner.graph import OpGraph
from tuner.latency import LatencyModel, circumstances, latency_model, timed_target
from tuner.model import InstrumentedModel
from tuner.narrow_sums import within_sums
from tuner.observe import CalibratedRanges, Watcher
from tuner.op_table import Damages
from tuner.operands import OUTPUT, Operands, check_operands, static_operands
from tuner.ops import Op
from tuner.placement import (
    Readers,
    following,
    readers,
    residual_sums,
    runnable,
    with_integer_biases,
)
from tuner.plan import Plan
from tuner.predictions import Predictions, predicted
from tuner.presets import Candidate
from tuner.progress import Progress
from tuner.records import TrialRecord
from tuner.recovery.bn_reestimation import keeps_statistics, reestimate_batch_norms
from tuner.recovery.folding import FoldedPair, find_pairs, fold, folded_names
from tuner.recovery.rounder import Rounder, can_have
from tuner.recovery.scaling import Scaling
from tuner.repairs import BIAS_CORRECTION, BN_REESTIMATION, ROUNDINGS, SUPPORTED, TRAININGS
from tuner.rescaling import Candidates, Rescaling, with_scalings
from tuner.schemes import OpConfig, TensorScheme
from tuner.search_space import (
    TuningSpace,
    build_space,
    candidates_of,
    components_wanted,
    with_reestimation,
)
from tuner.sensitivity import SAMPLES, SensitivityAnalysis, Treatment
from tuner.tuning_units import NO_TIES, Ties

Payload = dict[str, Any]
"""What a resumed study must not compute anew: options, ranges of activations, scalings."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model that is ready for plans, the space of plans, and what they cost."""

    model: InstrumentedModel
    graph: OpGraph
    folded: tuple[FoldedPair, ...]
    costs: CostModel
    space: TuningSpace
    damages: Damages
    unrepaired: Damages
    payload: Payload
    rescaling: Rescaling
    scalings: tuple[Scaling, ...]
    example: Example | None
    latency: LatencyModel | None = None

    def plan_costs(self, plan: Plan, measures: bool = True) -> dict[str, float]:
        """Return the costs of the plan that is on the model, measured where they must be."""
        costs = self.costs.costs(plan).to_dict()
        if self.latency is not None and measures:
            costs |= self.latency.measure().to_costs()
        return costs


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
        trains: bool = False,
    ) -> None:
        self.model = InstrumentedModel(model)
        self.float_costs = Costs(0.0, 0.0)
        self._config = config
        self._repairs = (*SUPPORTED, *TRAININGS) if trains else SUPPORTED
        self._data = DataPass(self.model, loader, forward, config.calib_samples, keep=SAMPLES)
        self._candidates: Candidates = {}
        self._exporter = None if config.target is None else exporter(config.target)
        if config.objective == "latency":
            timed_target(self._exporter)
        self._ties = NO_TIES
        self._latency: LatencyModel | None = None

    def record(self) -> OpGraph:
        """Record the op graph on the first batch and look up every op's candidates."""
        graph = self._data.record()
        self._candidates = self._candidates_of(graph.ops)
        check_operands(graph.ops, self._wanted(graph.ops))
        self.float_costs = CostModel(self.model.model, graph).costs({})
        self._check_target(graph)
        return graph

    def _check_target(self, graph: OpGraph) -> None:
        """Raise ExportError where the target cannot run the model, whatever the plan."""
        if self._exporter is None or self._data.example is None:
            return
        twin = self.model.copy()
        twin.weights.replace_originals(fold(twin.model, tuple(find_pairs(twin.model, graph))))
        check_model(self._exporter, twin, self._data.example)

    def finish(self, progress: Progress, payload: Payload | None = None) -> Prepared:
        """Fold, calibrate and predict damage; a stored payload takes the place of prediction."""
        pairs = tuple(find_pairs(self.model.model, self._data.graph))
        self.model.weights.replace_originals(fold(self.model.model, pairs))
        rescaling = Rescaling(self.model, self._data, self._config)
        rescaling.find(pairs, self._candidates, self._wanted(self._data.graph.ops))
        rounder = Rounder(self._data.graph.ops.values(), self._treated())
        ranges = self._calibrate(progress, (rescaling.watch, rounder.watch))
        graph = self._data.graph
        self.model.install(graph.ops, ranges)
        self.model.weights.rounder = rounder.rounded
        self.model.corrections.correction = partial(self._correction, rounder)
        self.model.norms.reestimate = self._reestimate
        rounder.refuse_vain(_asking(self._candidates))
        if payload:
            scalings = rescaling.adopt(payload.get("scalings", ()))
            self._rescale(rounder, scalings)
            ranges.adopt(payload["ranges"])
        else:
            progress.phase("rescaling channels", None)
            scalings = rescaling.run(ranges, self._candidates)
            self._rescale(rounder, scalings)
            self._candidates = with_scalings(self._candidates, scalings)
            if self._may_reestimate():
                self._candidates = with_reestimation(self._candidates)
            stored = self._predict(progress, rounder, scalings)
            payload = {
                "options": stored.options,
                "ranges": ranges.entries(self._statics(stored)),
                "scalings": [scaling.to_dict() for scaling in scalings],
            }
        predictions = Predictions(payload["options"])
        damages = predictions.damages
        needless = folded_names(self.model.model, pairs)
        costs = CostModel(self.model.model, graph, needless)
        objective = self._config.objective
        options = predictions.candidates
        latency = self.latency(progress)
        space = build_space(graph.ops, options, damages, costs, objective, self._ties, latency)
        return Prepared(
            model=self.model,
            graph=graph,
            folded=pairs,
            costs=costs,
            space=space,
            damages=damages,
            unrepaired=predictions.unrepaired,
            payload=payload,
            rescaling=rescaling,
            scalings=scalings,
            example=self._data.example,
            latency=latency,
        )

    def baseline_costs(self, progress: Progress) -> dict[str, float]:
        """Return the costs of FP32, measured where they must be."""
        latency = self.latency(progress)
        measured = {} if latency is None else latency.baseline.to_costs()
        return self.float_costs.to_dict() | measured

    def latency(self, progress: Progress) -> LatencyModel | None:
        """Return the times of the model, made once, where they are the objective."""
        if self._latency is None and self._config.objective == "latency":
            progress.phase("timing ops", None)
            self._latency = latency_model(self.model, self._exporter, self._data.example)
        return self._latency

    def anchor(self, baseline: TrialRecord, progress: Progress) -> None:
        """Make all times relative to those of a baseline; to be called before `finish`.

        Raises StudyMismatchError where the baseline of a resumed study was never timed.
        """
        latency = self.latency(progress)
        if latency is None:
            return
        if "latency_ms" not in baseline.costs:
            raise StudyMismatchError(
                "objective='latency' cannot go on with this study: its FP32 baseline was stored "
                "without a latency_ms. Choose another study_name"
            )
        latency.anchor(baseline.costs["latency_ms"])

    def measured_with(self) -> dict[str, str]:
        """Return what measured costs depend on, which a resumed study must share.

        Raises ExportError where the target cannot be timed.
        """
        if self._exporter is None or self._config.objective != "latency":
            return {}
        return {"runtime": circumstances(self._exporter)}

    def signature(self) -> str:
        """Describe the options of every op, whatever their damage: what a resumed study shares."""
        table = {
            name: [[c.label, c.config.model_dump(mode="json")] for c in candidates]
            for name, candidates in self._candidates.items()
        }
        repairs = self._config.search_space.repairs
        target = {} if self._config.target is None else {"target": self._config.target}
        return json.dumps({"options": table, "repairs": repairs, **target}, sort_keys=True)

    def _candidates_of(self, ops: Mapping[str, Op]) -> Candidates:
        space, target = self._config.search_space, self._config.target
        found = candidates_of(ops, space, self._shapes(), self._repairs)
        if self._exporter is None or target is None:
            return found
        found = runnable(ops, found, self._exporter.why_not, target)
        if self._exporter.saturates:
            is_exact_at_a_cost = self._exporter.is_exact_at_a_cost
            found = within_sums(ops, found, self._shapes(), target, is_exact_at_a_cost)
        rounding = self._exporter.rounds_biases
        found = with_integer_biases(ops, found, rounding, self._own_biases())
        sums = residual_sums(self._data.graph) if self._exporter.reads_sums else {}
        sums = {name: residual for name, residual in sums.items() if name not in found}
        reading = readers(self._data.graph, sums) if sums else Readers((), {})
        leaders = {name: residual.leaders for name, residual in sums.items()}
        self._ties = Ties(leaders, reading.beside, reading.groups)
        adds = self._exporter.adds_before_rounding
        found |= following(ops, sums, adds, reading.beside, found)
        return {name: found[name] for name in ops if name in found}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters, those that folding adds among them."""
        model, graph = self.model.model, self._data.graph
        parameters = model.named_parameters(remove_duplicate=False)
        shapes = {name: tuple(p.shape) for name, p in parameters}
        for pair in find_pairs(model, graph):  # folding gives these a bias
            shapes.setdefault(bias_name(pair.layer), graph.ops[pair.layer].output_shape[1:2])
        return shapes

    def _own_biases(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters but those that have several names."""
        parameters = list(self.model.model.named_parameters(remove_duplicate=False))
        names = Counter(id(parameter) for _, parameter in parameters)
        shared = {name for name, p in parameters if names[id(p)] > 1}
        return {name: shape for name, shape in self._shapes().items() if name not in shared}

    def _calibrate(self, progress: Progress, watchers: Iterable[Watcher]) -> CalibratedRanges:
        progress.phase("calibrating", None)
        ranges = self._data.calibrate(self._wanted, progress.advance, watchers)
        self._candidates = self._candidates_of(self._data.graph.ops)
        return ranges

    def _wanted(self, ops: Mapping[str, Op]) -> Operands:
        """Return the operands of every op that need a calibrated range."""
        components = components_wanted(ops, self._candidates_of(ops))
        return {
            name: tuple((i, s) for i, s in found if i >= OUTPUT and s.needs_range)
            for name, found in components.items()
        }

    def _statics(self, stored: Predictions) -> list[tuple[str, int, TensorScheme]]:
        """Return every static activation scheme that the options use."""
        ops = self._data.graph.ops
        found: dict[tuple[str, int, TensorScheme], None] = {}
        for name, candidates in stored.candidates.items():
            for candidate in candidates:
                for index, scheme in static_operands(ops[name], candidate.config):
                    found[name, index, scheme] = None
        return list(found)

    def _treated(self) -> list[str]:
        """Return the ops whose weights may have repairs."""
        treatable = (
            name
            for name, options in self._candidates.items()
            for option in options
            if self._treatments(option.config.weight, True) or _asks(option)
        )
        return list(dict.fromkeys(treatable))

    def _treatments(self, scheme: TensorScheme | None, has_bias: bool) -> list[Treatment]:
        """Return how a preset's weight may be treated, beside rounding to nearest."""
        repairs = self._config.search_space.repairs
        if scheme is None or not can_have(scheme):
            return []
        roundings = [None, *(name for name in ROUNDINGS if name in repairs)]
        corrections = (False, True) if BIAS_CORRECTION in repairs and has_bias else (False,)
        return list(itertools.product(roundings, corrections))[1:]

    def _may_reestimate(self) -> bool:
        """Return whether batch norms remain whose statistics may be taken anew."""
        is_allowed = BN_REESTIMATION in self._config.search_space.repairs
        return is_allowed and any(keeps_statistics(m) for m in self.model.model.modules())

    def _reestimate(self) -> None:
        reestimate_batch_norms(self.model.model, self._data.kept, self._data.feeder)

    def _correction(self, rounder: Rounder, op: Op, config: OpConfig) -> Tensor:
        ref, weights = op.weights[0], self.model.weights
        assert config.weight is not None
        rounded = weights.quantized(ref, config.weight, config.rounding)
        return rounder.correction(op, weights.original(ref), rounded)

    def _rescale(self, rounder: Rounder, scalings: Iterable[Scaling]) -> None:
        for scaling in scalings:
            for name in scaling.chain.consumers:
                module = self.model.model.get_submodule(name)
                factors, shifts = scaling.input_factors(module), scaling.input_shifts(module)
                rounder.rescale(name, factors, shifts)

    def _predict(
        self, progress: Progress, rounder: Rounder, scalings: Iterable[Scaling]
    ) -> Predictions:
        ops, shapes, corrections = self._data.graph.ops, self._shapes(), self.model.corrections

        def treatments(op: str, scheme: TensorScheme) -> list[Treatment]:
            has_bias = can_correct(ops[op], shapes) and corrections.is_own(op)
            return self._treatments(scheme, has_bias) if rounder.can_round(op) else []

        components = components_wanted(ops, self._candidates, treatments)
        progress.phase("predicting damage", None)
        analysis = SensitivityAnalysis(self.model, self._data.feeder, components, self._config.seed)
        found = analysis.run(self._data.kept, self._data.late, progress.advance)
        calibrates = self._exporter is None
        return predicted(ops, self._candidates, found, scalings, calibrates)


def _asking(candidates: Candidates) -> list[str]:
    """Return the ops for which rules ask for repairs of the weight."""
    return [name for name, found in candidates.items() if any(map(_asks, found))]


def _asks(option: Candidate) -> bool:
    return option.config.rounding is not None or option.config.corrects_bias
