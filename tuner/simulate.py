"""One quantization on a whole model, or one per rule: simulate()."""

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, TypeVar, cast

from torch import nn

from tuner import formats
from tuner.config import Rule
from tuner.data_pass import DataPass, Wanted
from tuner.errors import DataError, SpaceError, TunerError
from tuner.isolation import copied, isolated_random_state
from tuner.model import InstrumentedModel
from tuner.op_rules import Shapes, fitted, matching_ops
from tuner.operands import OUTPUT, Operands, static_operands
from tuner.ops import FAMILY_OF_MODULE, FUNCTIONS, Op
from tuner.plan import Plan
from tuner.ranges import QParams
from tuner.records import describe_config
from tuner.schemes import OpConfig, TensorScheme

_log = logging.getLogger(__name__)

_TYPES = {family.op_type for family in FAMILY_OF_MODULE.values()}
_TYPES |= {family.op_type for _, family in FUNCTIONS.values()}

Model = TypeVar("Model", bound=nn.Module)
SchemeOrName = TensorScheme | str


def simulate(
    model: Model,
    inputs: SchemeOrName | None = None,
    weights: SchemeOrName | None = None,
    outputs: SchemeOrName | None = None,
    calib_dataloader: Iterable[Any] | None = None,
    *,
    rules: Iterable[Rule] = (),
    forward: Callable[[Any, Any], Any] | None = None,
    calib_samples: int | None = None,
) -> Model:
    """Return a copy of the model, in eval mode, that computes as if it were quantized.

    The schemes go on every op with multiply-accumulates, and `weights` on embeddings; rules give
    other ops, or other schemes, by type or name. `print()` of the copy shows schemes and scales.
    The structure stays as it is: batch norm is not folded. Weights are rounded once, when this
    returns; inputs and outputs at each call, their gradient passed straight through.

    Under torch.utils.checkpoint, modules are computed again as they are, quantized; a function that
    makes functional calls is refused in training, with UnsupportedError. A checkpoint of another
    library is not known.

    Without `calib_dataloader` the model is never run: then functional calls (`F.linear`, `@`,
    attention) are out of reach and stay FP32, and so do static ranges of inputs and outputs.

    Args:
        model: the float model; it is never changed.
        inputs: the scheme of all inputs, or the name of a format: "e4m3fn" stands for
            TensorScheme(format="e4m3fn"). None leaves them in float. Static scales along an axis,
            as of PerChannel(-1) or PerGroup(32), are shared by all other axes; minmax and ema are
            the quickest calibrations for many of them, the others keep a histogram of each.
        weights: the scheme of all weights. PerChannel(axis) counts the axes of the weight itself:
            output channels are axis 0, and 1 in a transposed convolution.
        outputs: the scheme of all outputs.
        calib_dataloader: batches as fit() takes them, read once: from them come the ranges of
            static schemes. Modules that they never reach stay FP32, which is logged.
        rules: each with exactly one option, which replaces all of the above for the ops that it
            matches; later rules win. OpConfig.float() leaves an op in FP32. LayerNorm, softmax,
            add, mul and cat are matched by op_types or the full name only.
        forward: `forward(model, batch)` calls the model on a batch, where the default cannot.
        calib_samples: how many samples to read at most.

    Raises:
        DataError: a static range is asked for without data, or the data cannot be used: for scales
            along an axis its size must not change.
        SpaceError: a rule matches nothing or has several options, or nothing would be quantized.
        TunerError: the model, a scheme or a format name cannot be used.
    """
    config = OpConfig(
        weight=as_scheme("weights", weights),
        inputs=as_scheme("inputs", inputs),
        output=as_scheme("outputs", outputs),
    )
    _check_reading(calib_dataloader, forward, calib_samples)
    rules = checked_rules(rules)
    with isolated_random_state():
        instrumented = InstrumentedModel(copied(model))
        paths = tuple(path for path, _ in instrumented.model.named_modules())
        wish = Wish(config, parameter_shapes(instrumented.model), rules, paths)
        if calib_dataloader is None:
            instrumented.install(instrumented.module_ops(), _NoRanges())
        else:
            calibrate_for(instrumented, calib_dataloader, wish.operands, forward, calib_samples)
        plan = wish.plan(instrumented.ops)
        if not plan.quantized:
            raise SpaceError(_why_nothing(wish, instrumented.ops, calib_dataloader is None))
        instrumented.apply(plan)
        instrumented.weights.forget_cache()
    return cast(Model, instrumented.model)


class Wish:
    """What the user wants: one configuration for all ops, and rules for some.

    `paths` are those of the model's modules: a rule may name one that later batches reach.
    """

    def __init__(
        self,
        config: OpConfig,
        shapes: Shapes,
        rules: tuple[Rule, ...] = (),
        paths: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.shapes = shapes
        self.rules = rules
        self.paths = paths

    def plan(self, ops: Mapping[str, Op]) -> Plan:
        """Return the plan for these ops; raises SpaceError for a rule that matches nothing."""
        chosen = {name: self._default(op) for name, op in ops.items() if op.by_default}
        for rule in self.rules:
            chosen.update(_by_rule(ops, rule, self.shapes))
        return Plan(chosen)

    def operands(self, ops: Mapping[str, Op]) -> Operands:
        """Return the operands of each op that need a range.

        A rule may speak of ops that later batches reach; raises SpaceError where it cannot.
        """
        reached = [_reached(ops, rule, self.paths) for rule in self.rules]
        rules = tuple(rule for rule in reached if rule is not None)
        plan = Wish(self.config, self.shapes, rules).plan(ops)
        return {name: static_operands(ops[name], config) for name, config in plan.items()}

    def _default(self, op: Op) -> OpConfig:
        """Return the configuration of an op that no rule names: of embeddings, the weight only."""
        if op.activations:
            return fitted(op, self.config, self.shapes)
        return fitted(op, OpConfig(weight=self.config.weight), self.shapes)


def calibrate_for(
    model: InstrumentedModel,
    loader: Iterable[Any],
    wanted: Wanted,
    forward: Callable[[Any, Any], Any] | None = None,
    calib_samples: int | None = None,
) -> None:
    """Read the data once; install the ops that it reached, and the ranges that are wanted."""
    data = DataPass(model, loader, forward, calib_samples)
    data.record()
    ranges = data.calibrate(wanted)
    model.install(data.graph.ops, ranges)
    if data.graph.unreached:
        _log.info(
            "the calibration data never reached %d modules, which stay FP32: %s",
            len(data.graph.unreached),
            ", ".join(data.graph.unreached),
        )


def parameter_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def as_scheme(name: str, given: SchemeOrName | None) -> TensorScheme | None:
    """Return a scheme, where the argument `name` may also be the name of a format."""
    if isinstance(given, str):
        formats.get(given)  # says which names are near
        return TensorScheme(format=given)
    if given is not None and not isinstance(given, TensorScheme):
        raise TunerError(
            f"{name} is a {type(given).__name__}: give a TensorScheme, or the name of a format "
            "such as 'int8' or 'e4m3fn'"
        )
    return given


def check_calib_samples(calib_samples: object) -> None:
    """Raise TunerError unless this is None or a whole number above 0."""
    if calib_samples is None:
        return
    if isinstance(calib_samples, bool) or not isinstance(calib_samples, Integral):
        raise TunerError(
            f"calib_samples is {calib_samples!r}: give a whole number above 0, or None for all data"
        )
    if calib_samples < 1:
        raise TunerError(f"calib_samples is {calib_samples}: give 1 or more, or None for all data")


class _NoRanges:
    """Stands for calibration where there is no data."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Refuse."""
        which = "output" if operand == OUTPUT else f"input {operand}"
        raise DataError(
            f"{op}: the static range of its {which} ({scheme.format}) must come from data: give "
            "calib_dataloader, or a scheme with dynamic=True"
        )


def checked_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return rules of one option each; raises TunerError for anything else."""
    if isinstance(rules, Rule) or not isinstance(rules, Iterable):
        raise TunerError(f"rules is a {type(rules).__name__}: give a list, rules=[Rule(…)]")
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TunerError(f"rules holds a {type(rule).__name__}: give Rule(…) objects")
        if len(rule.options) != 1:
            raise SpaceError(
                f"a rule has {len(rule.options)} options: nothing is chosen here, so give each "
                "rule exactly one, Rule(…, options=[OpConfig(…)])"
            )
    return rules


def _by_rule(ops: Mapping[str, Op], rule: Rule, shapes: Shapes) -> dict[str, OpConfig]:
    """Return what a rule says of the ops that it matches."""
    (config,) = rule.options
    chosen = {op.name: fitted(op, config, shapes) for op in matching_ops(ops, rule)}
    if not config.is_float and all(c.is_float for c in chosen.values()):
        raise SpaceError(
            f"a rule changes nothing: {', '.join(list(chosen)[:4])} have no weight or input of the "
            f"kind that its option speaks of ({describe_config(config)})"
        )
    return chosen


def _reached(ops: Mapping[str, Op], rule: Rule, paths: tuple[str, ...]) -> Rule | None:
    """Return a rule without the types and names that no op has so far, None if it says nothing.

    Raises SpaceError for a type or name that no later batch can bring.
    """
    types = [t for t in rule.op_types or () if any(op.type == t for op in ops.values())]
    names = [glob for glob in rule.names or () if any(fnmatchcase(name, glob) for name in ops)]
    may_come = all(glob in names or _may_come(glob, paths) for glob in rule.names or ())
    if not may_come or not all(t in _TYPES for t in rule.op_types or ()):
        matching_ops(ops, rule)  # says which names are near
    known = rule.op_types and tuple(types), rule.names and tuple(names)
    if () in known:
        return None
    reached = rule.model_copy(update={"op_types": known[0], "names": known[1]})
    try:
        matching_ops(ops, reached)
    except SpaceError:  # no op of these types has had one of these names
        return None
    return reached


def _may_come(glob: str, paths: tuple[str, ...]) -> bool:
    """Return whether a glob may speak of a functional call, or of a module of the model."""
    return "/" in glob or any(fnmatchcase(path, glob) for path in paths)


def _check_reading(loader: object, forward: object, calib_samples: object) -> None:
    check_calib_samples(calib_samples)
    if forward is not None and not callable(forward):
        raise TunerError(f"forward is a {type(forward).__name__}: give a function")
    for name, value in (("forward", forward), ("calib_samples", calib_samples)):
        if loader is None and value is not None:
            raise TunerError(f"{name} says how to read data: give calib_dataloader, too")


def _why_nothing(wish: Wish, ops: Mapping[str, Op], without_data: bool) -> str:
    if wish.config.is_float and not wish.rules:
        return "nothing would be quantized: give inputs, weights, outputs or rules"
    found = ", ".join(f"{op.name} ({op.type})" for op in ops.values()) or "none"
    if len(found) > 200:
        found = f"{found[:200]}…"
    hint = ". Without calib_dataloader only modules are found" if without_data else ""
    return (
        f"nothing would be quantized: no op takes these schemes. Ops that were found: {found}{hint}"
    )
