"""Recording ops, names, MACs and producers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.tuner.nets import (
    ALL,
    Attention,
    Branching,
    ConvNet,
    Encoder,
    Functional,
    Recurrent,
    Tied,
    inputs_for,
    main_output,
    seeded,
)
from tuner.graph import OpGraph
from tuner.model import InstrumentedModel


def record(net: nn.Module, samples: int = 8) -> OpGraph:
    x = inputs_for(net, samples)
    return InstrumentedModel(net).record(lambda: net(x), samples)


def test_names_of_modules_and_call_sites() -> None:
    graph = record(seeded(Functional))
    assert list(graph.ops) == [
        "/linear:0",
        "/matmul:0",
        "/linear:1",
        "/linear:2",
        "/linear:3",
        "/einsum:0",
        "/softmax:0",
        "/bmm:0",
        "/scaled_dot_product_attention:0",
        "/add:0",
        "/mul:0",
        "/cat:0",
    ]
    assert list(record(seeded(ConvNet)).ops) == ["conv", "depthwise", "head"]


def test_parameters_are_recognised_as_weights() -> None:
    ops = record(seeded(Functional)).ops
    assert [(r.path, r.axis, r.transposed) for r in ops["/linear:0"].weights] == [("w", 0, False)]
    assert [(r.path, r.axis, r.transposed) for r in ops["/matmul:0"].weights] == [("k", 0, True)]
    assert [ops[f"/linear:{i}"].weights[0].rows for i in (1, 2, 3)] == [(0, 16), (16, 32), (32, 48)]
    assert ops["/bmm:0"].weights == ()
    assert ops["/bmm:0"].activations == (0, 1)


@pytest.mark.parametrize("net_type", [ConvNet, Functional, Tied, Branching])
def test_macs_agree_with_torch(net_type: type[nn.Module]) -> None:
    net, samples = seeded(net_type), 4
    x = inputs_for(net, samples)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    graph = record(net, samples)
    # an einsum is a bmm to torch, and SDPA two
    assert graph.macs * samples * 2 == counter.get_total_flops()


def test_macs_of_recurrent_layers() -> None:
    ops = record(seeded(Recurrent)).ops
    steps = 9
    first = 2 * steps * 64 * 8
    rest = 2 * steps * 64 * 16 + 2 * steps * (64 * 32 + 64 * 16)
    assert [p.macs for p in ops["lstm"].products] == [first, rest]
    assert ops["lstm"].products[1].left is None


def test_attention_is_taken_apart() -> None:
    graph = record(seeded(Attention))
    parts = ["q_proj", "k_proj", "v_proj", "matmul:0", "matmul:1", "out_proj"]
    assert [name for name in graph.ops if name.startswith("attention/")] == [
        f"attention/{part}" for part in parts
    ]
    assert graph.uncovered == {}


def test_encoder_layers_are_reached_in_spite_of_the_fused_path() -> None:
    graph = record(seeded(Encoder))
    assert "encoder.layers.1.linear2" in graph.ops
    assert "encoder.layers.0.self_attn/matmul:1" in graph.ops


def test_shared_module_is_one_op_and_its_macs_add_up() -> None:
    graph = record(seeded(Branching))
    assert list(graph.ops) == ["parts.shared", "parts.other"]
    assert graph.ops["parts.shared"].macs == 2 * 64


class Product(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)


class Lends(nn.Module):
    """One block computes with what it is given: parameters, a part of one, an activation."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        self.block = Product()
        self.w1, self.w2 = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.uses = uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = {"1": self.w1, "2": self.w2, "t": self.w1.t(), "h": self.w1[:4], "x": x}
        return torch.cat([self.block(x, given[name]) for name in self.uses], -1)


@pytest.mark.parametrize("uses", ["12", "121", "1t", "1h", "h1", "1x", "x1"])
def test_an_operand_that_is_not_always_the_same_parameter_is_an_activation(uses: str) -> None:
    net = Lends(uses)
    x = torch.randn(8, 8)
    op = InstrumentedModel(net).record(lambda: net(x), 8).ops["block/linear:0"]
    assert (op.weights, op.activations, op.parameters) == ((), (0, 1), 0)
    assert op.input_shapes == ((8, 8), (4 if uses.endswith("h") else 8, 8))
    assert op.macs == 8 * sum(4 if name == "h" else 8 for name in uses)


@pytest.mark.parametrize("uses", ["1", "22"])
def test_an_operand_that_is_always_the_same_parameter_is_a_weight(uses: str) -> None:
    net = Lends(uses)
    x = torch.randn(8, 8)
    op = InstrumentedModel(net).record(lambda: net(x), 8).ops["block/linear:0"]
    assert [ref.path for ref in op.weights] == [f"w{uses[0]}"]
    assert (op.activations, op.macs) == ((0,), 64 * len(uses))


def test_calls_that_cannot_be_quantized_are_counted_and_listed() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensordot(x, x, dims=([1], [1]))

    net = Odd()
    x = torch.randn(4, 6)
    graph = InstrumentedModel(net).record(lambda: net(x), 4)
    assert graph.uncovered == {"/tensordot": 4 * 4 * 6 // 4}


@pytest.mark.parametrize("net_type", ALL)
def test_recording_changes_nothing(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    classes = [type(m) for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        before = main_output(net(x))
        InstrumentedModel(net).record(lambda: net(x), 8)
        after = main_output(net(x))
    assert torch.equal(before, after)
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_graph_says_who_feeds_whom() -> None:
    graph = record(seeded(ConvNet))
    conv = next(node for node in graph.nodes if node.op == "conv")
    (norm,) = graph.consumers(conv.index)
    assert (norm.function, norm.scope) == ("batch_norm", "bn")
    assert graph.nodes[graph.outputs[0]].op == "head"
