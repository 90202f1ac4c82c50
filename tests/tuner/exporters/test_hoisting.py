"""Quantizers before what commutes with them: the same outputs, and none of them elsewhere."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.exporters.hoisting import hoisted
from tuner.exporters.tracing import Traced, is_marker, trace


def w8(inputs: str) -> OpConfig:
    """Return weights of 8 bits with inputs of another format, within the range that was seen."""
    return OpConfig(
        weight=TensorScheme(format="int8", granularity=PerChannel(0)),
        inputs=TensorScheme(format=inputs, symmetric=False, calibration="minmax"),
    )


class Moves(nn.Module):
    """Two convolutions, what is between them given."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[operator]


def traced(model: nn.Module, space: str | SearchSpace = "int8") -> Traced:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 10, 10)
    found = quantization.fit(model.eval(), [x], config=TuningConfig(space=space))
    assert found._parts.example is not None
    return trace(found._parts.model, found._parts.example)


def sources(graph: Traced) -> list[str]:
    """Return the nodes that markers take, in order, but for the input of the model."""
    nodes = graph.module.graph.nodes
    return [n.args[0].name for n in nodes if is_marker(n)][1:]


COMMUTING = {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "transpose": lambda x: x.transpose(2, 3),
    "flatten": lambda x: x.flatten(2).unsqueeze(-1),
    "slice": lambda x: x[:, :, 1:5],
    "cat": lambda x: torch.cat((x.relu(), x), 2),
    "two": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}


@pytest.mark.parametrize("name", COMMUTING)
@pytest.mark.parametrize("space", ["int8", "mixed-int"])
def test_the_outputs_stay_to_the_bit(name: str, space: str) -> None:
    torch.manual_seed(1)
    graph = traced(Moves(COMMUTING[name]), space)
    moved = hoisted(graph)
    x = torch.randn(5, 4, 10, 10) * 3
    assert torch.equal(moved.simulate(x)[0], graph.simulate(x)[0])
    assert len(sources(moved)) > len(sources(graph))
    assert "conv2d" in sources(moved)


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.pad(x, (1, 1, 1, 1), value=3.0),
        lambda x: x + 1,
    ],
)
def test_what_does_not_commute_is_left_alone(between: object) -> None:
    graph = traced(Moves(between))
    assert sources(hoisted(graph)) == sources(graph)


class Shared(nn.Module):
    """What is moved about is read by a convolution, and by something else."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), other

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.a(x), 2)
        return self.b(y) + self.other(y)  # type: ignore[no-any-return]


OTHERS = {
    "floats": (nn.Identity(), ()),
    "other codes": (nn.Conv2d(4, 4, 1), (Rule(names=["other"], options=[w8("uint4")]),)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_read_otherwise_as_well_is_left_alone(name: str) -> None:
    other, rules = OTHERS[name]
    graph = traced(Shared(other), SearchSpace(preset="int8", rules=rules))
    moved = hoisted(graph)
    x = torch.randn(5, 4, 10, 10) * 3
    assert torch.equal(moved.simulate(x)[0], graph.simulate(x)[0])
    assert sources(moved) == sources(graph)


def test_what_two_layers_read_as_the_same_codes_is_moved() -> None:
    rule = Rule(names=["b", "other"], options=[w8("uint8")])
    graph = traced(Shared(nn.Conv2d(4, 4, 1)), SearchSpace(preset="int8", rules=[rule]))
    moved = hoisted(graph)
    x = torch.randn(5, 4, 10, 10) * 3
    assert torch.equal(moved.simulate(x)[0], graph.simulate(x)[0])
    assert "conv2d" in sources(moved)


def test_an_input_of_the_model_is_left_alone() -> None:
    graph = traced(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)))
    assert len(list(hoisted(graph).markers())) == 1


def test_dynamic_scales_are_left_alone() -> None:
    graph = traced(Moves(COMMUTING["max_pool2d"]), "int8-dynamic")
    assert sources(hoisted(graph)) == sources(graph)


def test_the_traced_graph_is_not_changed() -> None:
    graph = traced(Moves(COMMUTING["cat"]))
    before = str(graph.module.graph)
    hoisted(graph)
    assert str(graph.module.graph) == before
