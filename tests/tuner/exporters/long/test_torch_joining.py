"""Layers that read the same codes become one product, and give what they gave alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from tests.tuner.exporters.torch_nets import A8, W8
from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.example import Example
from tuner.exporters import torch_graph
from tuner.exporters.torch_eager import with_integer_kernels
from tuner.exporters.torch_graph import integer_products, spelled_graph
from tuner.exporters.torch_package import has_compiler
from tuner.exporters.tracing import Traced, trace

A6 = TensorScheme(format="uint6", symmetric=False)
W4 = TensorScheme(format="int4", granularity=PerChannel(0))
ALL = OpConfig(weight=W8, inputs=A8)
HEADS = 2


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def unflattened(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def activated(x: Tensor) -> Tensor:
    return heads(torch.relu(x))


def of_batches(x: Tensor) -> Tensor:
    return x.view(-1, HEADS, x.shape[1], x.shape[2] // HEADS)


class Attention(nn.Module):
    """Queries, keys and values by layers of their own; keys have other lengths than values."""

    def __init__(self, split: Callable[[Tensor], Tensor] = heads, bias: bool = True) -> None:
        super().__init__()
        self.split = split
        self.query = nn.Linear(12, 8, bias=bias)
        self.key = nn.Linear(12, 8, bias=bias)
        self.value = nn.Linear(12, 16, bias=bias)
        self.out = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(found.transpose(1, 2).flatten(2))


def sequence(n: int) -> Tensor:
    return torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(n))


def traced_with(model: nn.Module, *rules: Rule) -> Traced:
    everywhere = Rule(op_types=["Linear"], options=[ALL])
    space = SearchSpace(rules=[everywhere, *rules])
    found = quantization.fit(model.eval(), [sequence(4)], config=TuningConfig(space=space))
    return trace(found._parts.model, Example.of_batch(found.model, sequence(4)))


def rule(name: str, **options: TensorScheme) -> Rule:
    return Rule(names=[name], options=[OpConfig(**options)])


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)


def unjoined(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    with monkeypatch.context() as patched:
        patched.setattr(torch_graph, "join_layers", lambda module, layers: None)
        return spelled_graph(traced)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", [heads, unflattened])
def test_three_layers_become_one_to_the_bit(
    split: Callable[[Tensor], Tensor], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    traced = traced_with(Attention(split, bias))
    graph, apart = spelled_graph(traced), unjoined(traced, monkeypatch)
    assert [len(linears(each)) for each in (graph, apart)] == [2, 4]
    assert integer_products(graph) == 2
    for x in (sequence(4), sequence(3)):
        found, expected = (with_integer_kernels(each)(x)[0] for each in (graph, apart))
        assert torch.equal(found, expected)
        torch.testing.assert_close(found, traced.simulate(x)[0], rtol=1e-4, atol=1e-2)


def test_weights_of_other_bits_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    traced = traced_with(Attention(), rule("key", weight=W4, inputs=A8))
    graph, apart = spelled_graph(traced), unjoined(traced, monkeypatch)
    assert len(linears(graph)) == 2
    found, expected = (with_integer_kernels(each)(sequence(4))[0] for each in (graph, apart))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("split", "rules", "count"),
    [
        (heads, [rule("key", weight=W8, inputs=A6)], 3),  # other codes
        (heads, [rule("key", weight=W8)], 3),  # floats
        (activated, [], 4),  # a function that goes into the kernel
        (of_batches, [], 4),  # more than the last axis is split
    ],
)
def test_what_differs_stays_apart(
    split: Callable[[Tensor], Tensor], rules: list[Rule], count: int
) -> None:
    torch.manual_seed(0)
    traced = traced_with(Attention(split), *rules)
    graph = spelled_graph(traced)
    assert len(linears(graph)) == count
    found, expected = graph(sequence(4))[0], traced.simulate(sequence(4))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_a_joint_product_is_one_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    everywhere = Rule(op_types=["Linear"], options=[ALL])
    config = TuningConfig(space=SearchSpace(rules=[everywhere]), target="torch")
    model = quantization.fit(Attention().eval(), [sequence(4)], config=config)
    report = model.export(tmp_path, target="torch", example_inputs=sequence(4), batches=())
    assert "2 integer kernels" in report.notes[0]
    assert all(layer.max_steps <= 1 for layer in report.layers)
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(2 * report.agreement.floor, 1e-4)
