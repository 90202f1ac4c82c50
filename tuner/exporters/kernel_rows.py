"""What tables of a runtime's low-precision kernels are made of: rows, and what rows ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuner import formats
from tuner.granularity import PerChannel, PerGroup, PerTensor
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme

Check = Callable[[Op, int, TensorScheme | None], str | None]
"""Takes an op, the index of one of its operands and a scheme; returns why it does not fit."""

WEIGHT, OUTPUT = -2, -1


@dataclass(frozen=True)
class Row:
    """Ops of some types have a kernel where all of their schemes fit.

    `kernel` is what the kernel is called in the graph that the runtime makes.
    """

    types: tuple[str, ...]
    kernel: str
    inputs: Check
    weight: Check
    output: Check


def why_not_in(table: Sequence[Row], runtime: str, op: Op, config: OpConfig) -> str | None:
    """Return why no row of a table has a kernel for an op's choice, None if one has."""
    rows = [row for row in table if op.type in row.types]
    if not rows:
        return f"{runtime} computes {op.type} in float"
    has_inputs = any(config.input_scheme(i) is not None for i in op.activations)
    rows.sort(key=lambda row: (row.inputs is nothing) == has_inputs)
    reasons = [_why_not(row, op, config) for row in rows]
    return None if None in reasons else f"{runtime}: {reasons[0]}"


def _why_not(row: Row, op: Op, config: OpConfig) -> str | None:
    asked = [(row.inputs, i, config.input_scheme(i)) for i in op.activations]
    asked.append((row.weight, WEIGHT, config.weight if op.weights else None))
    asked.append((row.output, OUTPUT, config.output))
    reasons = (check(op, index, scheme) for check, index, scheme in asked)
    return next((reason for reason in reasons if reason is not None), None)


def nothing(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for a tensor that is left in float."""
    return None if scheme is None else f"its kernel takes {_named(index)} in float"


def no_weight(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for an op that has no weight."""
    return "integer kernels need its weight quantized" if op.weights else None


def codes(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for integers of at most 8 bits with one static scale."""
    if scheme is None:
        return f"integer kernels need {_named(index)} quantized"
    if not is_narrow(scheme):
        return f"integer kernels take 8 bits at most, not {scheme.format}"
    if scheme.is_dynamic:
        return f"integer kernels need a static scale of {_named(index)}"
    if not isinstance(scheme.granularity, PerTensor):
        return f"integer kernels need one scale of {_named(index)}, not {scheme.granularity!r}"
    return None


def codes_or_nothing(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for static integers, or for float."""
    return None if scheme is None else codes(op, index, scheme)


def columns(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for a weight of integers with one scale, or one for each output channel."""
    if scheme is None:
        return "integer kernels need a quantized weight"
    if not is_narrow(scheme):
        return f"integer kernels take weights of 8 bits at most, not {scheme.format}"
    reach = scheme.granularity
    if isinstance(reach, PerTensor) or (
        isinstance(reach, PerChannel) and _is_channel_axis(op, reach.axis)
    ):
        return None
    return f"integer kernels take one weight scale for each output channel, not {reach!r}"


def symmetric_columns(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for what `columns` does, without zero points."""
    if scheme is not None and not _has_no_zero_point(scheme):
        return "integer kernels take weights without zero points"
    return columns(op, index, scheme)


def unsigned_by_signed(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for a first operand without a sign, which must have no zero point, and signed others."""
    if scheme is not None and index == 0 and (scheme.symmetric or scheme.quant_range[0] < 0):
        return (
            "products of two activations are of integers where the first is never negative only: "
            "use uint8 with symmetric=False for that, and int8 for the second"
        )
    if scheme is not None and index > 0 and not _has_no_zero_point(scheme):
        return (
            "products of two activations are of integers where the second has no zero point only: "
            "use int8 for that, and uint8 for the first, which must not be negative"
        )
    return codes(op, index, scheme)


def rows_of_a_table(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
    """Ask for integers that rows can be looked up in: scales by row, or by groups in it."""
    if scheme is None:
        return "its table is float"
    if not is_narrow(scheme):
        return f"tables are held in 8 bits at most, not in {scheme.format}"
    reach = scheme.granularity
    if isinstance(reach, PerGroup) and reach.axis % 2 == 0:
        return "the groups of a table lie within its rows"
    return None


def groups_from(least: int, most: int | None, powers_of_two: bool) -> Check:
    """Ask for a weight of integers whose groups along the input channels a kernel reads."""

    def check(op: Op, index: int, scheme: TensorScheme | None) -> str | None:
        reason = columns(op, index, scheme)
        if scheme is None or reason is None or not isinstance(scheme.granularity, PerGroup):
            return reason
        reach, shape = scheme.granularity, op.input_shapes[0] if op.input_shapes else ()
        length = shape[-1] if shape else reach.size
        is_of_columns = not _is_channel_axis(op, reach.axis)
        if not is_narrow(scheme) or not is_of_columns:
            return "weight-only kernels take integers in groups along the input channels"
        if reach.size >= length:
            return None
        fits = least <= reach.size and (most is None or reach.size <= most)
        fits = fits and not (powers_of_two and reach.size & (reach.size - 1))
        if not fits or length % reach.size:
            return f"weight-only kernels do not read groups of {reach.size} in {length} channels"
        return None

    return check


def is_narrow(scheme: TensorScheme) -> bool:
    """Return whether a scheme is one of integers that kernels hold as codes of 8 bits."""
    fmt = formats.get(scheme.format)
    return fmt.kind == "int" and fmt.bits <= 8 and fmt.block is None and fmt.forward is None


def _has_no_zero_point(scheme: TensorScheme) -> bool:
    return scheme.symmetric and scheme.quant_range[0] < 0


def _is_channel_axis(op: Op, axis: int) -> bool:
    """Whether an axis is that of output channels; of matrices also counted from the end."""
    own = op.weights[0].axis
    is_matrix = not op.type.startswith("Conv")
    return axis == own or (is_matrix and {axis, own} in ({1, -1}, {0, -2}))


def _named(index: int) -> str:
    return {WEIGHT: "its weight", OUTPUT: "its output"}.get(index, f"input {index}")
