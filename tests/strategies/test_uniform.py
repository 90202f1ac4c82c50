"""Labels, and the uniform plans of spaces whose units do not all have the same ones."""

import pytest

from strategies.space import Option, Space, Unit
from strategies.uniform import (
    Bits,
    cheapest,
    closest,
    frontier,
    parse_label,
    safest,
    uniform_plans,
)


def _unit(name: str, *labels: str) -> Unit:
    """Return a unit whose cost and damage follow from the bits that a label names."""
    options = []
    for label in labels:
        bits = parse_label(label)
        wide = (bits.weight or 16) * (bits.inputs or 16)
        options.append(Option(label, float(wide), 100.0 / wide, is_float=label == "FP32"))
    return Unit(name, "Linear", tuple(options))


CONV = _unit("conv", "W8A8", "W4A8", "W4A4", "FP32")
FLOATS = _unit("linear", "W8A8", "W8:e4m3fn A8:e4m3fn", "W8:e4m3fn A8:e5m2", "W4:mxfp4", "FP32")
EMBEDDING = _unit("embedding", "W8", "W4", "FP32")
MATMUL = _unit("matmul", "A8", "A6", "A4", "FP32")


@pytest.mark.parametrize(
    ("label", "bits"),
    [
        ("W4A8", Bits(4, 8)),
        ("W16A16", Bits(16, 16)),
        ("W8", Bits(8, None)),
        ("A6", Bits(None, 6)),
        ("FP32", Bits(None, None)),
        ("mxfp4", Bits(None, None)),
        ("W4:mxfp4 A8:mxfp8_e4m3", Bits(4, 8, "mxfp4", "mxfp8_e4m3")),
        ("W8 A8:e5m2", Bits(8, 8, None, "e5m2")),
        ("A8:e5m2", Bits(None, 8, None, "e5m2")),
        ("W8:e4m3fn A8 O16:fp16", Bits(8, 8, "e4m3fn", None)),
        ("W4A8O8B32", Bits(4, 8)),
        ("W8A8 dynamic", Bits(8, 8)),
        ("W4A8-percentile", Bits(None, None)),
    ],
)
def test_parse_label(label: str, bits: Bits) -> None:
    assert parse_label(label) == bits


@pytest.mark.parametrize(
    ("unit", "label", "taken"),
    [
        (CONV, "W4A4", "W4A4"),
        (CONV, "W4A6", "W4A8"),
        (CONV, "W6A8", "W8A8"),
        (CONV, "W8A16", "FP32"),
        (CONV, "A8", "W8A8"),
        (CONV, "W4", "W4A8"),
        (CONV, "FP32", "FP32"),
        (CONV, "mxfp4", "FP32"),
        (FLOATS, "W8:e4m3fn A8:e3m4", "W8:e4m3fn A8:e4m3fn"),  # one other format, not two
        (FLOATS, "A8:e5m2", "W8:e4m3fn A8:e5m2"),
        (FLOATS, "W4:mxfp4 A4:mxfp4", "W4:mxfp4"),
        (FLOATS, "W6:e2m3 A8:e4m3fn", "W8:e4m3fn A8:e4m3fn"),
        (EMBEDDING, "W4:mxfp4 A4:mxfp4", "W4"),
        (CONV, "W4:mxfp4 A4:mxfp4", "W4A4"),
        (EMBEDDING, "W4A8", "W4"),
        (EMBEDDING, "W6A6", "W8"),
        (EMBEDDING, "A8", "FP32"),
        (MATMUL, "W4A8", "A8"),
        (MATMUL, "W2A6", "A6"),
        (MATMUL, "W2A2", "A4"),
        (MATMUL, "W4", "FP32"),
        (_unit("no float", "W4", "W2"), "W8", "W4"),
    ],
)
def test_closest(unit: Unit, label: str, taken: str) -> None:
    assert unit.options[closest(unit, label)].label == taken


def test_of_two_options_with_the_label_the_less_damaging_one_is_taken() -> None:
    options = (Option("W8A8", 64.0, 0.5), Option("W8A8", 64.0, 0.2))
    assert closest(Unit("conv", "Conv2d", options), "W8A8") == 1


def test_uniform_plans_are_distinct_and_most_damaged_first() -> None:
    space = Space((CONV, EMBEDDING, MATMUL))
    plans = uniform_plans(space)
    damages = [plan.damage for plan in plans]
    assert damages == sorted(damages, reverse=True)
    assert len({plan.assignment for plan in plans}) == len(plans)
    by_label = {plan.label: plan.assignment for plan in plans}
    assert by_label["W4A8"] == (1, 1, 0)
    assert by_label["W4A4"] == (2, 1, 2)
    assert "FP32" not in by_label


def test_a_plan_goes_under_the_label_that_most_units_have() -> None:
    space = Space((_unit("a", "W8A8", "FP32"), _unit("b", "W8A8", "FP32"), _unit("c", "A8")))
    assert [plan.label for plan in uniform_plans(space)] == ["W8A8"]


def test_frontier_drops_what_costs_more_and_harms_more() -> None:
    good = Option("W4A8", 32.0, 0.1)
    space = Space((Unit("a", "Linear", (Option("W6A6", 36.0, 0.3), good, Option("W2", 8.0, 0.9))),))
    assert [plan.label for plan in frontier(uniform_plans(space))] == ["W2", "W4A8"]


def test_safest_is_float_where_float_is_allowed() -> None:
    harmless = Unit("a", "Linear", (Option("W8", 8.0, 0.0), Option("FP32", 32.0, 0.0, True)))
    space = Space((harmless, _unit("no float", "W4", "W8")))
    assert safest(space) == (1, 1)
    assert cheapest(space) == (0, 0)


def test_labels_of_single_operands_make_no_plan_where_others_name_both() -> None:
    linear = Unit("a", "Linear", (Option("W8A8", 8.0, 0.1), Option("W4A4", 4.0, 0.4)))
    matmul = Unit("b", "matmul", (Option("A8", 2.0, 0.1), Option("A4", 1.0, 0.4)))
    embed = Unit("c", "Embedding", (Option("W8", 0.2, 0.1), Option("W4", 0.1, 0.4)))
    found = [plan.label for plan in uniform_plans(Space((linear, matmul, embed)))]
    assert found == ["W4A4", "W8A8"]
    assert [plan.label for plan in uniform_plans(Space((matmul,)))] == ["A4", "A8"]
