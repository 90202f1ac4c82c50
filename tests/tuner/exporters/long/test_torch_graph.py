"""The spelled graph computes what the simulation does, with int8 weights and integer products."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from tests.tuner.exporters.torch_nets import A8, S8, TOKEN, W8
from tuner import (
    OpConfig,
    PerChannel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.example import Example
from tuner.exporters.torch_capability import why_not_integer
from tuner.exporters.torch_eager import with_integer_kernels
from tuner.exporters.torch_graph import integer_products, spelled_graph
from tuner.exporters.torch_layers import layer_agreement
from tuner.exporters.tracing import Traced, trace
from tuner.quantized_model import QuantizedModel

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A4 = TensorScheme(format="uint4", symmetric=False)


class Cnn(nn.Module):
    """One input channel, a residual sum, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(self.conv(x) + x)
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """An embedding whose table is the head's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.mlp = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + torch.relu(self.mlp(x)))


def image(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def words(n: int, length: int = 6) -> Tensor:
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(n))


def quantized(model: nn.Module, batch: Tensor, space: object) -> QuantizedModel:
    """Return what a plan for PyTorch makes of a model, where it has kernels for a preset."""
    target = "torch" if space in ("int8", "int8-dynamic", "mixed-int") else None
    config = TuningConfig(space=space, target=target)
    return quantization.fit(model.eval(), [batch], config=config)


def of_model(make: type[nn.Module], batch: Tensor, space: object) -> Traced:
    torch.manual_seed(0)
    model = quantized(make(), batch, space)
    return trace(model._parts.model, Example.of_batch(model.model, batch))


def by_type(**options: OpConfig) -> SearchSpace:
    rules = [Rule(op_types=[name], options=[option]) for name, option in options.items()]
    return SearchSpace(preset="int8", rules=rules)


STATIC = OpConfig(weight=W8, inputs=A8)
SPACES = {
    "int8": ("int8", 3),
    "signed": (by_type(Conv2d=OpConfig(weight=W8, inputs=S8), Linear=STATIC), 3),
    "four bits": (by_type(Conv2d=OpConfig(weight=W4, inputs=A4), Linear=STATIC), 3),
    "per token": (by_type(Conv2d=STATIC, Linear=OpConfig(weight=W8, inputs=TOKEN)), 3),
    "weights alone": (by_type(Conv2d=OpConfig(weight=W8), Linear=STATIC), 1),
    "fp8": ("fp8", 0),
    "mx": ("mx", 0),
    "grouped": ("int4-weight-only", 0),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_spelled_graph_is_the_simulation(name: str) -> None:
    space, integers = SPACES[name]
    traced = of_model(Cnn, image(4), space)
    graph = spelled_graph(traced)
    assert integer_products(graph) == integers
    program = traced.exported(graph).module(check_guards=False)
    for n in (4, 7):
        expected = traced.simulate(image(n, 1))[0]
        torch.testing.assert_close(program(image(n, 1))[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_the_table_says_what_the_graph_has(name: str) -> None:
    space, integers = SPACES[name]
    torch.manual_seed(0)
    model = quantized(Cnn(), image(4), space)
    ops = model._parts.model.ops
    can = [name for name, config in model.plan.items() if not why_not_integer(ops[name], config)]
    assert len(can) == integers


@pytest.mark.parametrize("space", ["int8", "int8-dynamic", "int4-weight-only", "mixed-int"])
def test_words(space: str) -> None:
    traced = of_model(Words, words(4), space)
    graph = spelled_graph(traced)
    assert integer_products(graph) == (0 if space == "int4-weight-only" else 2)
    program = traced.exported(graph).module(check_guards=False)
    for tokens in (words(4), words(5, 3)):
        expected = traced.simulate(tokens)[0]
        torch.testing.assert_close(program(tokens)[0], expected, rtol=1e-5, atol=1e-5)


class Mlp(nn.Module):
    """Layers over a sequence; one output of them is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return x + torch.relu(self.out(x))


def test_functions_stand_right_behind_the_products_of_sequences() -> None:
    def sequence(n: int, length: int) -> Tensor:
        return torch.randn(n, length, 8, generator=torch.Generator().manual_seed(n))

    traced = of_model(Mlp, sequence(4, 6), "int8")
    graph = spelled_graph(traced)
    (gelu,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    (user,) = gelu.users
    assert str(gelu.args[0]).startswith("linear")
    assert "quantized_decomposed.quantize_per_tensor" in str(user.target)
    ShapeProp(graph).propagate(sequence(5, 6))
    layers = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    (relu,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    shapes = [tuple(node.meta["tensor_meta"].shape) for node in (*layers, gelu, relu)]
    assert shapes == [(30, 24), (30, 8), (30, 8), (30, 24), (30, 8)]
    program = traced.exported(graph).module(check_guards=False)
    expected = traced.simulate(sequence(5, 6))[0]
    torch.testing.assert_close(program(sequence(5, 6))[0], expected, rtol=1e-5, atol=1e-5)


def test_weights_are_stored_as_int8() -> None:
    traced = of_model(Words, words(4), "int8")
    names = {n.target for n in spelled_graph(traced).graph.nodes if n.op == "get_attr"}
    buffers = dict(spelled_graph(traced).named_buffers())
    matrices = [buffers[name] for name in names if name in buffers and buffers[name].dim() == 2]
    large = [matrix for matrix in matrices if min(matrix.shape) > 1]
    assert sorted(tuple(m.shape) for m in large) == [(11, 16), (16, 16)]  # the tied one once
    assert {matrix.dtype for matrix in large} == {torch.int8}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (OpConfig(weight=W4), {(6, 16): torch.uint8, (8, 16): torch.uint8}),  # two rows in one
        (OpConfig(weight=W8), {(11, 16): torch.int8, (16, 16): torch.int8}),
        (OpConfig(weight=W4, inputs=A8), {(11, 16): torch.int8, (16, 16): torch.int8}),
    ],
)
def test_four_bits_take_half_a_byte_where_no_kernel_wants_int8(
    config: OpConfig, sizes: dict[tuple[int, ...], torch.dtype]
) -> None:
    table = OpConfig(weight=config.weight)
    traced = of_model(Words, words(4), by_type(Linear=config, Embedding=table))
    graph = spelled_graph(traced)
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    stored = [tensor for name, tensor in graph.named_buffers() if name in names]
    assert {
        tuple(t.shape): t.dtype for t in stored if not t.is_floating_point() and t.dim() == 2
    } == sizes
    for tokens in (words(4), words(5, 3)):
        expected = traced.simulate(tokens)[0]
        torch.testing.assert_close(graph(tokens)[0], expected, rtol=1e-5, atol=1e-5)


def test_signed_activations_become_unsigned() -> None:
    traced = of_model(Cnn, image(4), by_type(Conv2d=OpConfig(weight=W8, inputs=S8)))
    calls = [n for n in spelled_graph(traced).graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert {node.args[5] for node in calls} == {torch.uint8}
    assert 128 in {node.args[2] for node in calls}


def test_fewer_bits_are_clamped_before_they_are_codes() -> None:
    traced = of_model(Cnn, 3 * image(4), by_type(Conv2d=OpConfig(weight=W8, inputs=A4)))
    graph = spelled_graph(traced)
    codes = [n for n in graph.graph.nodes if "quantized_decomposed.quantize" in str(n.target)]
    clamped = ["clamp" in str(node.args[0]) or "pad" in str(node.args[0]) for node in codes]
    assert clamped == [True, True, False]
    far = 100 * image(4)
    torch.testing.assert_close(graph(far)[0], traced.simulate(far)[0], rtol=1e-5, atol=1e-5)


def test_what_stays_float_may_be_bfloat16() -> None:
    traced = of_model(Cnn, image(4), by_type(Conv2d=OpConfig.float()))
    full, half = spelled_graph(traced)(image(4))[0], spelled_graph(traced, True)(image(4))[0]
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.05


@pytest.mark.parametrize("name", SPACES)
def test_every_quantized_tensor_is_compared_alone(name: str) -> None:
    traced = of_model(Cnn, image(4), SPACES[name][0])
    layers = layer_agreement(traced, spelled_graph(traced))
    assert layers[-1].name == "output"
    for layer in layers:
        assert layer.max_steps <= 1
        assert layer.equal > 0.98
    if name in ("int8", "four bits", "signed"):
        assert {"conv|0", "head|0"} <= {layer.name for layer in layers}


def test_a_wrong_layer_shows_alone() -> None:
    traced = of_model(Cnn, image(4), "int8")
    graph = spelled_graph(traced)
    relu = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[1]
    with graph.graph.inserting_after(relu):
        doubled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (relu, 2.0))
    relu.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    graph.recompile()
    steps = {layer.name: layer.max_steps for layer in layer_agreement(traced, graph)}
    assert steps["conv|0"] <= 1
    assert steps["head|0"] > 20
    assert steps["output"] <= 1


def test_kernels_of_onednn_agree_without_a_compiler() -> None:
    traced = of_model(Cnn, image(4), "int8")
    module = with_integer_kernels(spelled_graph(traced))
    kernels = [n for n in module.graph.nodes if "onednn" in str(n.target)]
    assert len(kernels) == 3
    with torch.no_grad():
        found = module(image(6))[0]
    torch.testing.assert_close(found, traced.simulate(image(6))[0], rtol=1e-4, atol=1e-4)
