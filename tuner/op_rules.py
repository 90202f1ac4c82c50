"""Which ops a rule speaks of, and what a configuration means for one op."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from tuner.biases import bias_problem, can_correct
from tuner.config import Rule
from tuner.errors import SchemeError, SpaceError, UnknownNameError, UnsupportedError
from tuner.kernels import parameter_shape
from tuner.ops import Op
from tuner.repairs import TRAININGS, name_of
from tuner.schemes import OpConfig, TensorScheme

Shapes = Mapping[str, tuple[int, ...]]


def matching_ops(ops: Mapping[str, Op], rule: Rule) -> list[Op]:
    """Return the ops that a rule speaks of; raises SpaceError where it names none or one unknown.

    Ops outside presets (add, softmax …) must be named in full or by type.
    """
    types = {op.type for op in ops.values()}
    for op_type in rule.op_types or ():
        if op_type not in types:
            raise SpaceError(str(UnknownNameError("op type in a rule", op_type, types)))
    for glob in rule.names or ():
        if not any(fnmatchcase(name, glob) for name in ops):
            raise SpaceError(str(UnknownNameError("op name in a rule", glob, ops)))
    matched = [op for op in ops.values() if _matches(op, rule)]
    if not matched:
        raise SpaceError(
            f"a rule matches nothing: op_types {rule.op_types} and names {rule.names} have no op "
            "in common"
        )
    return matched


def _matches(op: Op, rule: Rule) -> bool:
    by_type = rule.op_types is None or op.type in rule.op_types
    by_name = rule.names is None or any(fnmatchcase(op.name, glob) for glob in rule.names)
    named = op.by_default or rule.op_types is not None or op.name in (rule.names or ())
    return by_type and by_name and named


def fitted(op: Op, config: OpConfig, shapes: Shapes, repairs: tuple[str, ...] = ()) -> OpConfig:
    """Return a configuration as it applies to one op: a scheme for each tensor that it has.

    `shapes` are those of the model's parameters, `repairs` those that can be done. Raises
    SpaceError where the op has fewer operands, or cannot have that bias, SchemeError where a weight
    lacks the scheme's axis.
    """
    unsupported = [name for name in map(name_of, config.recovery) if name not in repairs]
    if unsupported:
        hint = f"choose from {', '.join(repairs)}" if repairs else "leave it out"
        if repairs and unsupported[0] in TRAININGS:
            hint = "it takes fit(train_func=…)"
        raise UnsupportedError(
            f"{op.name}: recovery {unsupported[0]!r} is not supported here: {hint}"
        )
    count = op.operand_count
    if isinstance(config.inputs, tuple) and len(config.inputs) > count:
        raise SpaceError(
            f"{op.name} ({op.type}) has {count} input operands, but {len(config.inputs)} schemes "
            "are given: give one for all, or one each"
        )
    inputs = tuple(config.input_scheme(i) if i in op.activations else None for i in range(count))
    found = OpConfig(
        weight=config.weight if op.weights else None,
        inputs=inputs if any(inputs) else None,
        output=config.output,
        bias=config.bias,
        recovery=config.recovery,
    )
    if (problem := bias_problem(op, found, shapes)) is not None:
        raise SpaceError(problem)
    if found.corrects_bias and not can_correct(op, shapes):
        raise SpaceError(
            f"{op.name} ({op.type}) has no bias to correct: bias_correction is for Linear, Conv "
            "and ConvTranspose modules with a bias parameter. Restrict the rule with op_types or "
            "names"
        )
    for ref in op.weights:
        if ref.path in shapes:
            _check_axis(op, shapes[ref.path], found.weight)
    return found


def _check_axis(op: Op, shape: tuple[int, ...], scheme: TensorScheme | None) -> None:
    if scheme is None:
        return
    try:
        parameter_shape(shape, scheme.reach)
    except SchemeError as error:
        raise SchemeError(f"{op.name}, weight: {error}") from error
