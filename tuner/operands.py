"""Which operands of an op have a range that must be calibrated, and whether that can be done."""

from collections.abc import Mapping

from tuner.calibrators import calibrator
from tuner.errors import SchemeError
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme
from tuner.slices import Shape, slice_count

OUTPUT = -1
"""The operand index that stands for an op's output."""

Static = tuple[int, TensorScheme]
"""An operand, OUTPUT for the output, and a scheme of it that needs a calibrated range."""

Operands = Mapping[str, tuple[Static, ...]]
"""Op name → what needs a range: the statistics that calibration keeps follow from the schemes."""


def static_operands(op: Op, config: OpConfig) -> tuple[Static, ...]:
    """Return what needs a range under a configuration of the op."""
    schemes = [*((i, config.input_scheme(i)) for i in op.activations), (OUTPUT, config.output)]
    return tuple((i, s) for i, s in schemes if s is not None and s.needs_range)


def operand_shape(op: Op, index: int) -> Shape:
    """Return the shape of an activation of the op as it was recorded, the batch included."""
    if index == OUTPUT:
        return op.output_shape
    return op.input_shapes[op.activations.index(index)]


def operand_name(op: str, index: int) -> str:
    """Return how messages call an operand."""
    return f"{op}, {'output' if index == OUTPUT else f'input {index}'}"


def check_operands(ops: Mapping[str, Op], wanted: Operands) -> None:
    """Raise SchemeError where a range cannot be had, whatever the data.

    Either the method is not defined for the format, or the operand lacks the scheme's axis.
    """
    for name, statics in wanted.items():
        for index, scheme in statics:
            try:
                calibrator(scheme)
                slice_count(operand_shape(ops[name], index), scheme.granularity)
            except SchemeError as error:
                raise SchemeError(f"{operand_name(name, index)}: {error}") from error
