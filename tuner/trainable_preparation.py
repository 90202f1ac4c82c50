"""From a model and a plan to one that can be trained under it: prepare_qat()."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import nn

from tuner.batches import Feeder, read_batches
from tuner.config import Rule, TuningConfig
from tuner.costs import CostModel
from tuner.data_pass import DataPass
from tuner.errors import ModelError, PlanError, SpaceError, TunerError, UnknownNameError
from tuner.example import Example
from tuner.graph import OpGraph
from tuner.isolation import copied, isolated_random_state
from tuner.model import InstrumentedModel, Ranges
from tuner.op_rules import fitted
from tuner.op_table import op_table
from tuner.operands import Operands, static_operands
from tuner.ops import Op, WeightRef
from tuner.packed_tensor import stored_qparams
from tuner.plan import Plan
from tuner.qparams import compute_qparams
from tuner.quantized_model import QuantizedModel
from tuner.ranges import QParams
from tuner.records import TrialRecord
from tuner.recovery.folding import FoldedPair, find_pairs, fold, folded_names
from tuner.recovery.scaling import Scaling
from tuner.recovery.trainable_quantizers import Choices, Known, Method, QuantizerTable, Start
from tuner.recovery.trainable_site import Switch
from tuner.repairs import SCALINGS, name_of
from tuner.results import TuningResult
from tuner.schemes import OpConfig, TensorScheme
from tuner.simulate import SchemeOrName, Wish, as_scheme, checked_rules, parameter_shapes
from tuner.trainable_model import TrainableModel, TrainableParts


def prepare_qat(
    source: nn.Module,
    plan: Plan | None = None,
    calib_dataloader: Iterable[Any] | None = None,
    *,
    inputs: SchemeOrName | None = None,
    weights: SchemeOrName | None = None,
    outputs: SchemeOrName | None = None,
    rules: Iterable[Rule] = (),
    forward: Callable[[Any, Any], Any] | None = None,
    calib_samples: int | None = None,
    method: Method = "qat",
    init: Start | None = None,
    quant_start_step: int = 0,
    ema_decay: float = 0.99,
) -> TrainableModel:
    """Return a trainable model, in training mode, whose forward computes as a plan says.

    `qat`: weights are rounded by scales of their own values at every call, activations by moving
    averages of their ranges (Jacob et al., CVPR 2018, section 3). `lsq`: scales of weights, inputs
    and outputs are parameters (Esser et al., ICLR 2020); `lsq+`: zero points of affine schemes,
    too (Bhalgat et al., CVPRW 2020). Gradients pass where a value is inside its range.

    Batch norm behind a convolution or linear layer is folded into it, once, by its running
    statistics; these no longer change. Without `calib_dataloader` an FP32 model is never run: then
    functional calls stay FP32, batch norm is not folded, and ranges come from the first batch that
    trains. Dynamic activations and block formats take their scales from the data in any case.

    Args:
        source: what fit() or load() returned, or an FP32 model; it is never changed.
        plan: the plan, for an FP32 model; or give schemes.
        calib_dataloader: batches as fit() takes them, read once.
        inputs: the scheme of all inputs, as simulate() takes it; `weights`, `outputs` and `rules`
            likewise.
        forward: `forward(model, batch)` calls the model on a batch, where the default cannot.
        calib_samples: how many samples to read at most.
        method: `qat`, `lsq` or `lsq+`.
        init: where learned scales start. `lsq`: at 2 · mean|x| / sqrt(Qp) of the weights, and of
            the first batch; `calibrated`: at the calibrated ones. None takes the calibrated ones
            of a QuantizedModel, else `lsq`.
        quant_start_step: so many optimizer steps are done in float before; running ranges are
            averaged meanwhile. In eval mode the model is always quantized.
        ema_decay: of running ranges, 0…1; 1 keeps calibrated ranges as they are.

    Raises:
        ModelError: the model cannot be copied, or has nothing that trains.
        PlanError: the plan is for another architecture.
        SpaceError: nothing would be quantized, or a rule does not fit.
        TunerError: an argument cannot be used, or there is nothing to learn.
    """
    choices = _choices(source, method, init, quant_start_step, ema_decay)
    config = OpConfig(
        weight=as_scheme("weights", weights),
        inputs=as_scheme("inputs", inputs),
        output=as_scheme("outputs", outputs),
    )
    rules = checked_rules(rules)
    _check_reading(calib_dataloader, forward, calib_samples)
    _check(source, plan, not config.is_float or bool(rules))
    reading = _Reading(calib_dataloader, forward, calib_samples)
    with isolated_random_state():
        if isinstance(source, QuantizedModel):
            start = _of_quantized(source, reading)
        else:
            shapes = parameter_shapes(source) if isinstance(source, nn.Module) else {}
            start = _of_float(source, _Asked(plan, config, rules, shapes), reading)
        return _trainable(start, choices, quant_start_step)


@dataclass(frozen=True, eq=False)
class _Start:
    """A float model with its ops recorded, a plan for it, and what is known of its ranges.

    `batches` reach all ops, where there are any.
    """

    model: InstrumentedModel
    plan: Plan
    folded: tuple[FoldedPair, ...]
    known: Known
    result: TuningResult
    feeder: Feeder
    batches: tuple[Any, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    example: Example | None = None


@dataclass(frozen=True, eq=False)
class _Reading:
    """How the calibration data are read, if there are any."""

    loader: Iterable[Any] | None
    forward: Callable[[Any, Any], Any] | None
    samples: int | None


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked for an FP32 model: a plan, or schemes and rules."""

    plan: Plan | None
    config: OpConfig
    rules: tuple[Rule, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def plan_for(self, ops: Mapping[str, Op]) -> Plan:
        """Return the plan for these ops; raises PlanError where it names others."""
        if self.plan is None:
            return Wish(self.config, self.shapes, self.rules).plan(ops)
        unknown = [name for name in self.plan if name not in ops]
        if unknown:
            raise PlanError(
                f"the plan names {unknown[0]!r}, which is no op of this model ({len(unknown)} "
                f"unknown of {len(self.plan)}): is it a plan for another architecture? Functional "
                "calls are found with calib_dataloader only"
            )
        return Plan({name: fitted(ops[name], c, self.shapes) for name, c in self.plan.items()})

    def operands(self, ops: Mapping[str, Op]) -> Operands:
        """Return the operands of each op that need a range."""
        return {name: static_operands(ops[name], c) for name, c in self.plan_for(ops).items()}


def _of_quantized(source: QuantizedModel, reading: _Reading) -> _Start:
    """Take the plan off a copy: float weights, folded norms and ranges stay."""
    parts = source._parts
    model = parts.model
    twin = model.copy()
    twin.apply({})
    model = InstrumentedModel(twin.model)
    model.install(parts.model.ops, _NoRanges())
    batches = () if reading.loader is None else (next(read_batches(reading.loader, 1)),)

    def of_weight(ref: WeightRef, scheme: TensorScheme) -> QParams:
        stored = parts.model.weights.packed(ref, scheme)
        if stored is not None:
            return stored_qparams(stored, scheme)
        return compute_qparams(model.weights.original(ref), scheme)

    known = Known(parts.model.qparams, of_weight)
    feeder = Feeder(model.model, reading.forward)
    return _Start(
        model=model,
        plan=_trained(parts.plan),
        folded=parts.folded,
        known=known,
        result=parts.result,
        feeder=feeder,
        batches=batches,
        scalings=parts.scalings,
        example=parts.example,
    )


def _of_float(source: nn.Module, asked: _Asked, reading: _Reading) -> _Start:
    """Record the ops of a copy, fold its norms, and calibrate."""
    model = InstrumentedModel(copied(source))
    ranges: Ranges | None = None
    folded: tuple[FoldedPair, ...] = ()
    batches: tuple[Any, ...] = ()
    if reading.loader is None:
        graph = OpGraph(model.module_ops())
        feeder = Feeder(model.model, reading.forward)
    else:
        data = DataPass(model, reading.loader, reading.forward, reading.samples, keep=1)
        data.record()
        folded = tuple(find_pairs(model.model, data.graph))
        model.weights.replace_originals(fold(model.model, folded))
        ranges = data.calibrate(asked.operands)
        graph, feeder, batches = data.graph, data.feeder, (data.kept[0], *data.late)
    model.install(graph.ops, ranges or _NoRanges())
    plan = _trained(asked.plan_for(graph.ops))

    def of_operand(op: str, index: int, scheme: TensorScheme) -> QParams | None:
        return None if ranges is None else ranges.qparams(op, index, scheme)

    def of_weight(ref: WeightRef, scheme: TensorScheme) -> QParams:
        return compute_qparams(model.weights.original(ref), scheme)

    result = _result(model, graph, plan, folded)
    return _Start(model, plan, folded, Known(of_operand, of_weight), result, feeder, batches)


def _trainable(start: _Start, choices: Choices, quant_start_step: int) -> TrainableModel:
    for path in (pair.norm for pair in start.folded):
        start.model.model.get_submodule(path).requires_grad_(False)  # they are in the layers now
    _refuse_untrainable(start)
    switch = Switch()
    table = QuantizerTable(start.model, choices, start.known)
    table.install(start.plan, switch)
    table.quantizers.to(next(start.model.model.parameters()).device)
    if choices.method != "qat" and not any(True for _ in table.quantizers.parameters()):
        raise TunerError(
            f"method={choices.method!r} has no scale to learn: the plan has only block formats, "
            "formats without a scale, or dynamic scales. Use method='qat', or other schemes"
        )
    parts = TrainableParts(
        model=start.model,
        plan=start.plan,
        folded=start.folded,
        result=start.result,
        quantizers=table.quantizers,
        operands=table.operands,
        switch=switch,
        feeder=start.feeder,
        scalings=start.scalings,
        example=start.example,
    )
    trainable = TrainableModel(parts, quant_start_step)
    if start.batches and not trainable.is_ready:
        trainable.observe(start.batches)
    return trainable.train()


def _refuse_untrainable(start: _Start) -> None:
    if not start.plan.quantized:
        raise SpaceError(
            "nothing would be quantized: give a plan that quantizes an op, or inputs, weights, "
            "outputs or rules that fit one. Without calib_dataloader only modules are found"
        )
    if not any(parameter.requires_grad for parameter in start.model.model.parameters()):
        raise ModelError(
            "the model has no parameter that requires a gradient: call model.requires_grad_(True) "
            "on what shall be trained"
        )


def _trained(plan: Mapping[str, OpConfig]) -> Plan:
    """Return the plan without what training undoes: roundings and corrections.

    Trained weights are rounded to nearest, and biases train with them.
    """

    def without(config: OpConfig) -> OpConfig:
        kept = tuple(repair for repair in config.recovery if name_of(repair) in SCALINGS)
        return config.model_copy(update={"recovery": kept})

    return Plan({name: without(config) for name, config in plan.items()})


def _result(
    model: InstrumentedModel, graph: OpGraph, plan: Plan, folded: tuple[FoldedPair, ...]
) -> TuningResult:
    """Return what is known of a plan that no search found: its costs, where data were read."""
    config = TuningConfig()
    whole = Plan({name: plan.get(name, OpConfig.float()) for name in graph.ops})
    float_plan = Plan(dict.fromkeys(graph.ops, OpConfig.float()))
    costs: CostModel | None = None
    if graph.nodes:
        costs = CostModel(model.model, graph, folded_names(model.model, folded))
    best = _unjudged(1, whole, costs, "given to prepare_qat()")
    return TuningResult(
        config=config,
        baseline_trial=_unjudged(0, float_plan, costs, "FP32 baseline"),
        best=best,
        trials=(best,),
        stop_reason="no_eval_func",
        evaluations=0,
        op_table=() if costs is None else op_table(graph, whole, costs, {}, config.objective),
        uncovered=graph.uncovered,
        unreached=graph.unreached,
    )


def _unjudged(number: int, plan: Plan, costs: CostModel | None, reason: str) -> TrialRecord:
    return TrialRecord(
        number=number,
        plan=plan,
        accuracy=None,
        metrics={},
        costs={} if costs is None else costs.costs(plan).to_dict(),
        meets_goal=None,
        state="complete",
        duration_s=0.0,
        reason=reason,
    )


class _NoRanges:
    """Stands for calibration: quantizers know their ranges themselves."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Refuse."""
        raise TunerError(f"{op}: no range was calibrated for operand {operand} ({scheme.format})")


def _choices(
    source: object, method: object, init: object, quant_start_step: object, ema_decay: object
) -> Choices:
    """Check the arguments that say how to train."""
    if method not in get_args(Method):
        raise UnknownNameError("method", method, get_args(Method))
    if init is not None and init not in get_args(Start):
        raise UnknownNameError("init", init, get_args(Start))
    if type(quant_start_step) is not int or quant_start_step < 0:
        raise TunerError(
            f"quant_start_step is {quant_start_step!r}: give a number of optimizer steps, 0 or more"
        )
    if not isinstance(ema_decay, int | float) or not 0 <= ema_decay <= 1:
        raise TunerError(f"ema_decay is {ema_decay!r}: give a number from 0 to 1, such as 0.99")
    start = "calibrated" if isinstance(source, QuantizedModel) else "lsq"
    return Choices(cast(Method, method), cast(Start, init or start), float(ema_decay))


def _check_reading(loader: object, forward: object, samples: object) -> None:
    if forward is not None and not callable(forward):
        raise TunerError(f"forward is a {type(forward).__name__}: give a function")
    if loader is None and samples is not None:
        raise TunerError("calib_samples says how to read data: give calib_dataloader, too")


def _check(source: object, plan: object, has_schemes: bool) -> None:
    """Refuse what cannot be prepared."""
    if isinstance(source, TrainableModel):
        raise TunerError("source is a TrainableModel already: train it, or give the FP32 model")
    if plan is not None and not isinstance(plan, Plan):
        raise TunerError(f"plan is a {type(plan).__name__}: give a Plan, as Plan.from_json() reads")
    given = plan is not None or has_schemes
    if isinstance(source, QuantizedModel) and given:
        raise TunerError("source has a plan: leave plan, inputs, weights, outputs and rules out")
    if plan is not None and has_schemes:
        raise TunerError("a plan and schemes are given: give one of them")
