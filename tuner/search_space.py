"""From a model's ops and the user's SearchSpace to the units that a strategy may choose from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from strategies.space import Assignment, Option, Space, Unit
from tuner import formats
from tuner.config import Rule, SearchSpace
from tuner.costs import CostModel
from tuner.errors import PlanError, SpaceError
from tuner.latency import LatencyModel
from tuner.op_rules import Shapes, fitted, matching_ops
from tuner.ops import Op
from tuner.plan import Plan
from tuner.presets import INPUT_CALIBRATIONS, Candidate, along_first_axes, preset_candidates
from tuner.prices import Price
from tuner.records import describe_config
from tuner.repairs import BIAS_CORRECTION, BN_REESTIMATION, SUPPORTED, in_order
from tuner.schemes import OpConfig, TensorScheme
from tuner.sensitivity import (
    WEIGHT,
    WEIGHT_TREATED,
    Component,
    Sensitivity,
    Treatment,
    components_of,
)
from tuner.tuning_units import (
    NO_TIES,
    Damages,
    Follower,
    Ties,
    TuningUnit,
    alike_choices,
    followers_of,
    reading_alike,
    tied,
    tied_choices,
)

FLOAT = Candidate("FP32", OpConfig.float())

_OPTIMISM = 1.1
"""Weights are rounded by the data that their damage is then predicted on."""

_CAUTION = {"mse": 1.0, "minmax": 1.0, "percentile": 6.0}
"""Clipped outliers err in one direction, which a sum of squares does not see: on MiniLM a fixed
percentile did up to ten times the damage that was predicted, mse and minmax what was predicted."""


Treatments = Callable[[str, TensorScheme], Sequence[Treatment]]
"""Returns how the weight of an op may be treated under a scheme, beside rounding to nearest."""


@dataclass(frozen=True)
class TuningSpace:
    """The strategy's Space, and what its assignments mean for the model.

    `followers` are ops that nobody chooses for: each has its configuration as soon as one of the
    ops that it follows takes quantized inputs.
    """

    units: tuple[TuningUnit, ...]
    space: Space
    cost_weights: Mapping[str, float]
    followers: tuple[Follower, ...] = ()

    def price(self, costs: Mapping[str, float]) -> float:
        """Return what strategies minimise, for a whole model of these costs."""
        return sum(weight * costs[name] for name, weight in self.cost_weights.items())

    def plan(self, assignment: Assignment) -> Plan:
        """Return the plan that an assignment stands for."""
        chosen: dict[str, OpConfig] = {}
        for unit, index in zip(self.units, assignment, strict=True):
            chosen.update(unit.choices[index].configs)
        for follower in self.followers:
            chosen[follower.name] = follower.config_beside(chosen)
        return Plan(chosen)

    def assignment(self, plan: Plan) -> Assignment:
        """Return the assignment of a plan; raises PlanError if this space does not hold it."""
        return tuple(_choice_index(unit, plan) for unit in self.units)


def _choice_index(unit: TuningUnit, plan: Plan) -> int:
    for index, choice in enumerate(unit.choices):
        if all(plan.get(name) == config for name, config in choice.configs.items()):
            return index
    raise PlanError(f"{unit.name}: the plan's choice is not in this search space")


def candidates_of(
    ops: Mapping[str, Op],
    space: SearchSpace,
    shapes: dict[str, tuple[int, ...]],
    repairs: tuple[str, ...] = SUPPORTED,
) -> dict[str, list[Candidate]]:
    """Return the candidates of every op in the space, FP32 last unless a rule takes it away.

    `repairs` are those that rules may ask for.

    Raises SpaceError for a rule that matches nothing, or whose options no matched op can take.
    """
    found: dict[str, list[Candidate]] = {}
    for name, op in along_first_axes(ops).items():
        if candidates := preset_candidates(space.preset, op, shapes):
            found[name] = [*candidates, FLOAT]
    for rule in space.rules:
        for op in matching_ops(ops, rule):
            found[op.name] = _rule_candidates(op, rule, shapes, repairs)
    if not found:
        raise SpaceError(
            "nothing in this model can be quantized in this space: it has no op with "
            f"multiply-accumulates or an embedding that the preset {space.preset!r} covers. "
            f"Ops that were recorded: {', '.join(ops) or 'none'}"
        )
    return {name: found[name] for name in ops if name in found}


def _rule_candidates(
    op: Op, rule: Rule, shapes: Shapes, repairs: tuple[str, ...]
) -> list[Candidate]:
    configs = dict.fromkeys(_changing(op, config, shapes, repairs) for config in rule.options)
    given = [replace(candidate, given=True) for candidate in labelled(configs)]
    return sorted(given, key=lambda c: c.config.is_float)


def labelled(configs: Iterable[OpConfig]) -> list[Candidate]:
    """Return configurations under the labels of their formats, which are told apart."""
    labels: dict[str, int] = {}
    candidates = []
    for config in configs:
        label = describe_config(config)
        labels[label] = labels.get(label, 0) + 1
        suffix = f"#{labels[label]}" if labels[label] > 1 else ""
        candidates.append(Candidate(label + suffix, config))
    return candidates


def _changing(op: Op, config: OpConfig, shapes: Shapes, repairs: tuple[str, ...]) -> OpConfig:
    """Return a rule's option as it applies to one op; it must quantize something."""
    found = fitted(op, config, shapes, repairs)
    if found.is_float and not config.is_float:
        raise SpaceError(
            f"{op.name} ({op.type}) has {'no weight' if not op.weights else 'no such input'}: "
            f"the rule's option {describe_config(config)} would change nothing. Restrict the rule "
            "with op_types or names"
        )
    return found


def components_wanted(
    ops: Mapping[str, Op],
    candidates: Mapping[str, Sequence[Candidate]],
    treatments: Treatments = lambda op, scheme: (),
) -> dict[str, list[Component]]:
    """Return every component whose effect must be known, with the variants that may replace it.

    `treatments` tells what repairs a weight may have.
    """
    wanted: dict[str, list[Component]] = {}
    for name, options in candidates.items():
        unique: dict[Component, None] = {}
        for candidate in options:
            for component in components_of(ops[name], candidate.config):
                if candidate.given:
                    variants = list(dict.fromkeys((component, _to_nearest(component))))
                else:
                    variants = _variants(name, component, treatments)
                unique.update(dict.fromkeys(variants))
        wanted[name] = list(unique)
    return wanted


def _to_nearest(component: Component) -> Component:
    """Return a weight as it is without the repair that rounds it, anything else as it is."""
    index, scheme = component
    return (WEIGHT, scheme) if index in WEIGHT_TREATED.values() else component


def _variants(op: str, component: Component, treatments: Treatments) -> list[Component]:
    index, scheme = component
    if index == WEIGHT:
        found = ((None, False), *treatments(op, scheme))
        return [(WEIGHT_TREATED[treatment], scheme) for treatment in found]
    return [(index, s) for s in calibration_variants(scheme)] if index >= 0 else [component]


def calibration_variants(scheme: TensorScheme) -> list[TensorScheme]:
    """Return an input's scheme with each of the calibration methods worth a try."""
    methods = INPUT_CALIBRATIONS[formats.get(scheme.format).kind]
    if not scheme.needs_range or scheme.calibration not in methods:
        return [scheme]
    others = [m for m in methods if m != scheme.calibration]
    return [scheme, *(scheme.model_copy(update={"calibration": m}) for m in others)]


def best_variants(
    op: Op,
    candidates: Sequence[Candidate],
    sensitivity: Sensitivity,
    calibrates: bool = True,
) -> list[Candidate]:
    """Return the candidates with inputs calibrated, and weights rounded, to least predicted harm.

    What the user gave stays as it is, and all inputs do without `calibrates`: where all that read
    a tensor calibrate it alike, they share one scale.
    """
    best: dict[Component, TensorScheme] = {}

    def choose(index: int, scheme: TensorScheme | None) -> TensorScheme | None:
        if scheme is None or index not in op.activations:
            return scheme
        if (index, scheme) not in best:
            variants = [
                v for v in calibration_variants(scheme) if (index, v) in sensitivity.components
            ]
            alone = {v: sensitivity.alone((index, v)) for v in variants}
            best[index, scheme] = min(variants, key=lambda v: alone[v] * _CAUTION[v.calibration])
        return best[index, scheme]

    chosen = []
    for candidate in candidates:
        inputs = candidate.config.inputs
        if isinstance(inputs, tuple) and calibrates and not candidate.given:
            picked = tuple(choose(i, scheme) for i, scheme in enumerate(inputs))
            config = candidate.config.model_copy(update={"inputs": picked})
            candidate = Candidate(candidate.label, config)
        if not candidate.given:
            config = _best_treated(candidate.config, sensitivity)
            candidate = Candidate(candidate.label, config)
        chosen.append(candidate)
    return chosen


def with_reestimation(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
    """Return the candidates of presets with batch norm statistics taken anew in each."""
    return {name: list(map(_reestimated, options)) for name, options in candidates.items()}


def _reestimated(option: Candidate) -> Candidate:
    if option.given or option.config.is_float:
        return option
    recovery = in_order((*option.config.recovery, BN_REESTIMATION))
    return Candidate(option.label, option.config.model_copy(update={"recovery": recovery}))


def _best_treated(config: OpConfig, sensitivity: Sensitivity) -> OpConfig:
    """Return a configuration with the repairs of its weight that are predicted to harm least."""
    scheme = config.weight
    if scheme is None:
        return config
    known = {treatment: (index, scheme) for treatment, index in WEIGHT_TREATED.items()}
    alone = {t: sensitivity.alone(c) for t, c in known.items() if c in sensitivity.components}
    plain = (None, False)
    rounding, corrected = min(
        alone, key=lambda treatment: alone[treatment] * (1.0 if treatment == plain else _OPTIMISM)
    )
    found = [] if rounding is None else [rounding]
    found += [BIAS_CORRECTION] if corrected else []
    return config.model_copy(update={"recovery": in_order((*config.recovery, *found))})


def build_space(
    ops: Mapping[str, Op],
    candidates: Mapping[str, Sequence[Candidate]],
    damages: Damages,
    costs: CostModel,
    objective: str,
    ties: Ties = NO_TIES,
    latency: LatencyModel | None = None,
) -> TuningSpace:
    """Return the units, their options' cost in the objective and their predicted damage.

    `damages` maps op → configuration → damage. Ops with tied weights become one unit, and so do
    those that `ties` has read one tensor. What an op that follows others harms counts with the
    first of these that can be quantized; what it harms more because it reads a tensor as another op
    does, with that one.
    """
    units, spaces = [], []
    floats = 0.0
    price = Price(costs, objective, latency)
    followers = followers_of(candidates, ties)
    free = {n: c for n, c in candidates.items() if n not in ties.leaders}
    harm = _harm(followers, free, damages)
    groups = tied(ops, free)
    for group in reading_alike(groups, ties.readers, candidates):
        members = [ops[name] for name in group]
        if group in groups:
            choices = tied_choices(members, candidates)
        else:
            choices = alike_choices(members, candidates, harm, price.of)
        options = []
        for choice in choices:
            damage = sum(harm(name, config) for name, config in choice.configs.items())
            is_float = all(config.is_float for config in choice.configs.values())
            cost = price.of(members, choice.configs)
            options.append(Option(choice.label, cost, damage, is_float))
        floats += price.of(members, dict.fromkeys(group, OpConfig.float()))
        units.append(TuningUnit(group[0], tuple(choices)))
        spaces.append(Unit(group[0], _kind(members), tuple(options)))
    space = Space(tuple(spaces), price.whole - floats)
    return TuningSpace(tuple(units), space, price.weights, tuple(followers))


def _harm(
    followers: Sequence[Follower], free: Mapping[str, object], damages: Damages
) -> Callable[[str, OpConfig], float]:
    """Return what gives the damage of an op's configuration, and what it does to followers."""
    led = _led(followers, free, damages)

    def harm(name: str, config: OpConfig) -> float:
        own = damages[name][config] + (0.0 if config.inputs is None else led.get(name, 0.0))
        return own + sum(follower.harm_beside(name, config, damages) for follower in followers)

    return harm


def _led(
    followers: Sequence[Follower],
    free: Mapping[str, object],
    damages: Damages,
) -> dict[str, float]:
    """Return what the followers of an op harm as soon as it is quantized, each counted once."""
    led: dict[str, float] = {}
    for follower in followers:
        leader = next((name for name in follower.leaders if name in free), None)
        if leader is not None:
            led[leader] = led.get(leader, 0.0) + damages[follower.name][follower.config]
    return led


def _kind(members: Sequence[Op]) -> str:
    return max(members, key=lambda op: op.macs).type
