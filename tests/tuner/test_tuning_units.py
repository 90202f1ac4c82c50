"""Ops that read one tensor of an integer kernel read it alike; the bits of weights may differ."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from strategies.uniform import uniform_plans
from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig
from tuner.exporters.targets import exporter
from tuner.placement import readers, residual_sums
from tuner.preparation import Preparation, Prepared
from tuner.prices import Price
from tuner.progress import Progress

X = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A4 = TensorScheme(format="uint4", symmetric=False)


class Blocks(nn.Module):
    """A block that adds what it reads, one with a shortcut, and a head that reads no integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.short, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a(self.drop(x)) + x)
        x = torch.relu(self.b(x) + self.short(x))
        return self.head(x.mean((2, 3)))


@cache
def prepared(target: str | None, space: str = "mixed-int") -> Prepared:
    return prepared_in(SearchSpace(preset=space, repairs=()), target)


def prepared_in(space: SearchSpace, target: str | None) -> Prepared:
    torch.manual_seed(0)
    config = TuningConfig(space=space, target=target)
    preparation = Preparation(Blocks().eval(), [X], None, config)
    preparation.record()
    return preparation.finish(Progress(False))


def input_of(config: OpConfig, index: int = 0) -> TensorScheme | None:
    return config.input_scheme(index)


def test_layers_that_read_what_integer_kernels_give_are_found() -> None:
    graph = prepared("onnxruntime").graph
    found = readers(graph, residual_sums(graph))
    assert found.groups == (("a",), ("b", "short"))
    assert found.beside == {"/add:0": ((), ("a",)), "/add:1": ((), ())}


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino"])
def test_no_plan_reads_a_tensor_in_two_ways(target: str) -> None:
    space = prepared(target).space
    assert [unit.name for unit in space.units] == ["stem", "a", "b", "head"]
    start = [0] * len(space.units)
    weights = set()
    for position, unit in enumerate(space.units):
        for index in range(len(unit.choices)):
            plan = space.plan((*start[:position], index, *start[position + 1 :]))
            b, short = plan["b"], plan["short"]
            assert b.is_float or short.is_float or input_of(b) == input_of(short)
            if not plan["a"].is_float:
                assert input_of(plan["/add:0"], 1) == input_of(plan["a"])
            weights.add((b.weight, short.weight))
    assert len({pair for pair in weights if None not in pair and pair[0] != pair[1]}) > 2


def test_without_residual_sums_of_integers_all_choose_for_themselves() -> None:
    for target in (None, "torch", "integer"):
        names = [unit.name for unit in prepared(target).space.units]
        assert names == ["stem", "a", "b", "short", "head"]


def test_uniform_plans_are_those_that_they_were() -> None:
    ready, alone = prepared("openvino"), prepared("torch")
    plans = {p.label: ready.space.plan(p.assignment) for p in uniform_plans(ready.space.space)}
    expected = {p.label: alone.space.plan(p.assignment) for p in uniform_plans(alone.space.space)}
    widest = "W7A8" if exporter("openvino").saturates else "W8A8"
    for label in (widest, "W4A8", "W4A4", "W2A4"):
        assert {n: plans[label][n] for n in expected[label]} == dict(expected[label])
    assert input_of(plans["W4A4"]["/add:0"], 1) == input_of(plans["W4A4"]["a"])


def test_joint_choices_have_the_best_combination_at_every_price_of_damage() -> None:
    ready = prepared("openvino")
    position = [unit.name for unit in ready.space.units].index("b")
    options = ready.space.space.units[position].options
    ops = [ready.graph.ops[name] for name in ("b", "short")]
    price = Price(ready.costs, "bops", None)
    each = [ready.damages[op.name] for op in ops]
    led = ready.space.followers[1]
    assert led.leaders[0] == "b"
    harm = ready.damages[led.name][led.config]
    combined = [
        (sum(price.of([op], {op.name: c}) for op, c in zip(ops, pair, strict=True)),
         sum(damages[c] for damages, c in zip(each, pair, strict=True))
         + (0.0 if pair[0].is_float else harm))
        for pair in itertools.product(*each)
        if pair[0].is_float or pair[1].is_float or input_of(pair[0]) == input_of(pair[1])
    ]  # fmt: skip
    for weight in 10.0 ** torch.arange(0, 12, 0.5).double():
        best = min(cost + weight * damage for cost, damage in combined)
        assert min(o.cost + weight * o.damage for o in options) == pytest.approx(float(best))
    assert len(options) < len(combined) / 2


def test_what_a_sum_harms_more_beside_an_op_counts_with_that_op() -> None:
    ready = prepared("onnxruntime")
    follower = ready.space.followers[0]
    position = [unit.name for unit in ready.space.units].index("a")
    unit, options = ready.space.units[position], ready.space.space.units[position].options
    for choice, option in zip(unit.choices, options, strict=True):
        config = choice.configs["a"]
        beside = follower.config_alike({"a": config})
        more = ready.damages[follower.name][beside]
        base = ready.damages[follower.name][follower.config]
        leads = base if follower.leaders[0] == "a" and not config.is_float else 0.0
        assert option.damage == pytest.approx(ready.damages["a"][config] + leads + more - base)
    four = next(c.configs["a"] for c in unit.choices if c.label == "W4A4")
    assert follower.harm_beside("a", four, ready.damages) > 0


def test_readers_whose_rules_differ_choose_for_themselves() -> None:
    rule = Rule(names=["short"], options=[OpConfig(weight=W4, inputs=A4)])
    ready = prepared_in(SearchSpace(preset="int8", rules=[rule]), "openvino")
    assert [unit.name for unit in ready.space.units] == ["stem", "a", "b", "short", "head"]


def test_a_sum_takes_no_scheme_that_integer_kernels_lack() -> None:
    scheme = TensorScheme(format="uint8", symmetric=False, dynamic=True)
    rule = Rule(names=["a"], options=[OpConfig(weight=W4, inputs=scheme)])
    ready = prepared_in(SearchSpace(preset="int8", rules=[rule]), "onnx")
    plan = ready.space.plan((0,) * len(ready.space.units))
    assert input_of(plan["a"]) == scheme
    found = input_of(plan["/add:0"], 1)
    assert found is not None
    assert not found.is_dynamic
