"""What a sweep puts on a model: from a format's name to the schemes of every op."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tuner import formats
from tuner.biases import bias_problem
from tuner.errors import TunerError
from tuner.granularity import PerChannel
from tuner.op_rules import Shapes, fitted
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme

Part = Literal["weights", "inputs", "both"]
PARTS: tuple[Part, ...] = ("weights", "inputs", "both")
_CLIPPED_BELOW_BITS = 8  # as in the presets: clipping pays at few levels only
_ANY_BIAS = OpConfig(bias=TensorScheme(format="int8"))  # int32 asks for a weight and an input, too


@dataclass(frozen=True)
class Entry:
    """One format of a sweep: its name, and `config(axis)` for an op.

    `axis` is that of the output channels of the op's weight, None where it has none.
    """

    name: str
    config: Callable[[int | None], OpConfig]

    def parts(self, wanted: Iterable[Part]) -> tuple[Part, ...]:
        """Return the wanted parts, without those that hold nothing or what another one holds."""
        distinct: dict[OpConfig, Part] = {}
        for part in wanted:
            config = _part(self.config(0), part)
            if not config.is_float:
                distinct.setdefault(config, part)
        return tuple(distinct.values())

    def bits(self, part: Part) -> int:
        """Return the bits of a part, the fewest of any tensor in it."""
        config = _part(self.config(0), part)
        inputs = config.inputs if isinstance(config.inputs, tuple) else (config.inputs,)
        schemes = (config.weight, config.output, config.bias, *inputs)
        return min(scheme.bits for scheme in schemes if scheme is not None)

    def on(self, op: Op, part: Part, axis: int | None, shapes: Shapes) -> OpConfig:
        """Return what a part means for one op; of embeddings, the weight only.

        `shapes` are those of the model's parameters. Raises SpaceError or SchemeError where the op
        lacks what is asked for, other than a bias.
        """
        config = _part(self.config(axis), part)
        if not op.activations:
            config = OpConfig(weight=config.weight)
        elif config.bias is not None and bias_problem(op, _ANY_BIAS, shapes) is not None:
            config = config.model_copy(update={"bias": None})
        return fitted(op, config, shapes)


def read_entries(given: Any) -> tuple[Entry, ...]:
    """Read format names, schemes and (name, OpConfig) pairs; raises TunerError for others."""
    if isinstance(given, str | TensorScheme) or not isinstance(given, Iterable):
        raise TunerError(f"formats is {given!r}: give a list, such as formats=['int8', 'int4']")
    entries = tuple(_entry(item) for item in given)
    if not entries:
        raise TunerError("formats is empty: give at least one, such as formats=['int8', 'int4']")
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TunerError(
            f"formats holds {twice!r} twice: give one of them another name, ('name', OpConfig(…))"
        )
    return entries


def read_parts(given: Any) -> tuple[Part, ...]:
    """Read which parts are wanted; raises TunerError for others than weights, inputs and both."""
    is_one = isinstance(given, str) or not isinstance(given, Iterable)
    wanted = [given] if is_one else list(given)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise TunerError(f"parts is {given!r}: choose from {', '.join(map(repr, PARTS))}")
    return tuple(part for part in PARTS if part in wanted)


def _entry(item: Any) -> Entry:
    if isinstance(item, str):
        return _of_format(formats.get(item))
    if isinstance(item, TensorScheme):
        return _fixed(item.format, OpConfig(weight=item, inputs=item))
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], OpConfig):
        if item[1].is_float:
            raise TunerError(f"formats holds {item[0]!r} with an OpConfig that quantizes nothing")
        if not isinstance(item[0], str) or not item[0].strip() or not item[0].isprintable():
            raise TunerError(
                f"formats holds a pair with the name {item[0]!r}: give one line of printable text"
            )
        return _fixed(item[0], item[1])
    raise TunerError(
        f"formats holds {item!r}: give the name of a format, a TensorScheme or a pair "
        "('name', OpConfig(…))"
    )


def _fixed(name: str, config: OpConfig) -> Entry:
    return Entry(name, lambda axis: config)


def _of_format(fmt: formats.Format) -> Entry:
    """Return a format's usual use: weights per channel, static inputs per tensor.

    Integers as in the presets: symmetric weights, affine inputs in the unsigned format, MSE ranges
    (minmax for weights of 8 bits and more). Formats with scales of their own, or none, as they are.
    """
    if fmt.block is not None or not fmt.scaled:
        scheme = TensorScheme(format=fmt.name)
        return _fixed(fmt.name, OpConfig(weight=scheme, inputs=scheme))
    weight, inputs = TensorScheme(format=fmt.name), TensorScheme(format=fmt.name)
    if fmt.kind == "int":
        if fmt.bits < _CLIPPED_BELOW_BITS:
            weight = TensorScheme(format=fmt.name, calibration="mse")
        unsigned = f"uint{fmt.bits}" if f"uint{fmt.bits}" in formats.names() else fmt.name
        inputs = TensorScheme(format=unsigned, symmetric=False, calibration="mse")

    def config(axis: int | None) -> OpConfig:
        if axis is None:
            return OpConfig(weight=weight, inputs=inputs)
        per_channel = weight.model_copy(update={"granularity": PerChannel(axis)})
        return OpConfig(weight=per_channel, inputs=inputs)

    return Entry(fmt.name, config)


def _part(config: OpConfig, part: Part) -> OpConfig:
    if part == "weights":
        return OpConfig(weight=config.weight)
    if part == "inputs":
        return config.model_copy(update={"weight": None, "bias": None})
    return config
