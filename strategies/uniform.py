"""Uniform plans: the same kind of choice for every unit."""

import re
from dataclasses import dataclass

from strategies.space import Assignment, Option, Space, Unit

_OPERAND = r"(?:{}(\d+)(?::([^\s/]+))?)?"
_LABEL = re.compile(rf"{_OPERAND.format('W')} ?{_OPERAND.format('A')}(?: ?[OB]\d\S*)*(?: [a-z]+)?")


@dataclass(frozen=True)
class Bits:
    """The widths that a label names; None for an operand that it does not mention.

    The formats are those that it names beside the widths; None stands for integers.
    """

    weight: int | None
    inputs: int | None
    weight_format: str | None = None
    input_format: str | None = None

    @property
    def operands(self) -> int:
        """How many operands are named, 0 to 2."""
        return (self.weight is not None) + (self.inputs is not None)


@dataclass(frozen=True)
class UniformPlan:
    """The plan in which every unit takes `label`, or what it has closest to it."""

    label: str
    assignment: Assignment
    cost: float
    damage: float


def parse_label(label: str) -> Bits:
    """Read "W4A8", "W8", "A8" or "W4:mxfp4 A8:mxfp8_e4m3"; any other label names no widths.

    What follows for the output and the bias ("O8", "B32"), and a word at the end ("dynamic"), is
    passed over.
    """
    match = _LABEL.fullmatch(label)
    if match is None:
        return Bits(None, None)
    weight, weight_format, inputs, input_format = match.groups()
    widths = int(weight) if weight else None, int(inputs) if inputs else None
    return Bits(*widths, weight_format, input_format)


def closest(unit: Unit, label: str) -> int:
    """Return the option of `unit` that is closest to `label`.

    First the label itself; then the fewest bits that are nowhere below the label's, in the label's
    formats if possible; then float; then whatever does the least damage. An operand that one of
    the two labels does not mention is not compared, so that a weight-only unit takes "W4" and a
    matmul takes "A8" for "W4A8"; where the label leaves an operand open, the option with the most
    bits there is taken.
    """
    indices = range(len(unit.options))
    same = [i for i in indices if unit.options[i].label == label]
    if same:
        return min(same, key=lambda i: unit.options[i].damage)
    wanted = parse_label(label)
    fits = [i for i in indices if _excess(parse_label(unit.options[i].label), wanted) is not None]
    if fits:
        return min(fits, key=lambda i: _distance(unit.options[i], wanted))
    return least_damaging(unit)


def least_damaging(unit: Unit) -> int:
    """Return float where the unit may stay float, else the option with the least damage."""
    return min(
        range(len(unit.options)),
        key=lambda i: (not unit.options[i].is_float, unit.options[i].damage, unit.options[i].cost),
    )


def safest(space: Space) -> Assignment:
    """Return the plan in which every unit takes its least damaging option (float where it may)."""
    return tuple(least_damaging(unit) for unit in space.units)


def cheapest(space: Space) -> Assignment:
    """Return the cheapest possible plan; of equally cheap options the least damaging."""
    return tuple(_cheapest(unit.options) for unit in space.units)


def uniform_plans(space: Space) -> tuple[UniformPlan, ...]:
    """Return one plan for each label, most predicted damage first, without the all-float plan.

    A label that names one operand ("A8", "W8") makes a plan of its own only where a unit could have
    named both, or where no unit can. Labels that give the same plan are one plan, under the label
    that most units have.
    """
    labels = [name for name in space.labels if _is_choice(space, name)]
    held = {n: sum(unit.index_of(n) is not None for unit in space.units) for n in labels}
    plans: dict[Assignment, UniformPlan] = {}
    for label in sorted(labels, key=lambda n: -held[n]):
        chosen = tuple(closest(unit, label) for unit in space.units)
        plan = UniformPlan(label, chosen, space.cost(chosen), space.damage(chosen))
        plans.setdefault(chosen, plan)
    return tuple(sorted(plans.values(), key=lambda p: (-p.damage, p.cost)))


def _is_choice(space: Space, label: str) -> bool:
    """Return whether a label is more than what ops with a single operand have for another one."""
    named = parse_label(label).operands
    widest = {
        unit: max(parse_label(o.label).operands for o in unit.options) for unit in space.units
    }
    if named in (0, max(widest.values())):
        return True
    return any(unit.index_of(label) is not None and most > named for unit, most in widest.items())


def frontier(plans: tuple[UniformPlan, ...]) -> tuple[UniformPlan, ...]:
    """Keep the plans that no other plan beats in both cost and predicted damage, in order."""
    kept: list[UniformPlan] = []
    for plan in reversed(plans):
        if not kept or plan.cost < kept[-1].cost:
            kept.append(plan)
    return tuple(reversed(kept))


def _distance(option: Option, wanted: Bits) -> tuple[int, int, int, float]:
    """Order options that fit: few bits too many, few other formats, many bits where nothing is
    asked, then harm."""
    have = parse_label(option.label)
    open_bits = -(have.weight or 0) - (have.inputs or 0)
    return _excess(have, wanted) or 0, _strangers(have, wanted), open_bits, option.damage


def _strangers(have: Bits, want: Bits) -> int:
    """Count the operands that both name, in different formats."""
    weight = None not in (have.weight, want.weight) and have.weight_format != want.weight_format
    inputs = None not in (have.inputs, want.inputs) and have.input_format != want.input_format
    return weight + inputs


def _cheapest(options: tuple[Option, ...]) -> int:
    return min(range(len(options)), key=lambda i: (options[i].cost, options[i].damage))


def _excess(have: Bits, want: Bits) -> int | None:
    """Return the bits beyond what is wanted; None where fewer, or where nothing compares."""
    pairs = [(have.weight, want.weight), (have.inputs, want.inputs)]
    extra = [h - w for h, w in pairs if h is not None and w is not None]
    return sum(extra) if extra and min(extra) >= 0 else None
