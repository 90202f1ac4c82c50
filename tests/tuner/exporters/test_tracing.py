"""A traced graph is the simulated model, to the bit, for other batch sizes too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.tracing import Traced, trace
from tuner.quantized_model import QuantizedModel

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)


class Block(nn.Module):
    """A convolution with a residual sum, functional calls and a tied module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.conv(image)) + image)
        x = self.conv(x).mean((2, 3))
        return {"logits": self.fc(self.fc(x)), "pooled": x}


class Attention(nn.Module):
    """The projections of nn.MultiheadAttention, whose weights are rows of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        out, _ = self.attention(x, x, x, need_weights=False)
        return out if mask is None else out * mask[..., None]


def quantized(model: nn.Module, data: list[object], space: object = "int8") -> QuantizedModel:
    torch.manual_seed(0)
    return quantization.fit(model.eval(), data, config=TuningConfig(space=space))


def traced(model: QuantizedModel, batch: object, axes: object = None) -> Traced:
    return trace(model._parts.model, Example.of_batch(model.model, batch), axes)


def image(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("space", ["int8", "mixed-int", "int8-dynamic", "int4-weight-only", "fp8"])
def test_a_trace_simulates_to_the_bit(space: str) -> None:
    model = quantized(Block(), [image(8)], space)
    graph = traced(model, image(4, 1))
    for n in (4, 1, 7):
        logits, pooled = graph.simulate(image(n, 2))
        expected = model(image(n, 2))
        assert graph.outputs == ("logits", "pooled")
        assert torch.equal(logits, expected["logits"])
        assert torch.equal(pooled, expected["pooled"])


def test_a_batch_of_one_is_no_constant() -> None:
    graph = traced(quantized(Block(), [image(8)]), image(1))
    assert graph.dynamic == {"image": {0: "batch"}}
    assert graph.simulate(image(5))[0].shape == (5, 3)


def test_markers_and_weights_are_those_of_the_plan() -> None:
    model = quantized(Block(), [image(8)])
    graph = traced(model, image(4))
    keys = [key for _, key in graph.markers()]
    assert keys == ["conv|0", "conv|0", "fc|0", "fc|0"]  # each is called twice
    assert {w.ref.path: len(w.nodes) for w in graph.weights} == {"conv.weight": 1, "fc.weight": 1}


def test_rows_of_one_parameter_are_weights_of_their_own() -> None:
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    model = quantized(Attention(), [tokens])
    graph = traced(model, tokens)
    rows = {w.ref.rows: len(w.nodes) for w in graph.weights if w.ref.rows}
    assert rows == {(0, 8): 1, (8, 16): 1, (16, 24): 1}
    assert torch.equal(graph.simulate(tokens)[0], model(tokens))
    assert graph.dynamic == {"tokens": {0: "batch", 1: "sequence"}}
    assert torch.equal(graph.simulate(tokens[:3, :5])[0], model(tokens[:3, :5]))


def test_the_model_keeps_its_plan_and_its_quantizers() -> None:
    model = quantized(Block(), [image(8)])
    before = model(image(4))["logits"]
    traced(model, image(4))
    assert torch.equal(model(image(4))["logits"], before)


@pytest.mark.parametrize("space", ["int8", "int4-weight-only"])
def test_noise_moves_the_outputs_a_little(space: str) -> None:
    graph = traced(quantized(Block(), [image(8)], space), image(4))
    still, moved = graph.simulate(image(4))[0], graph.simulation(1e-2).run(image(4))[0]
    assert 0 < (moved - still).abs().max() < 0.2


class Counted(nn.Module):
    """Multiplies integers beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = (x > 0).long()
        return self.fc(x), count @ count.T


def test_noise_leaves_integers_as_they_are() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    graph = traced(quantized(Counted(), [x], "int4-weight-only"), x)
    (still, count), (moved, again) = graph.simulate(x), graph.simulation(1e-2).run(x)
    assert not torch.equal(moved, still)
    assert torch.equal(again, count)


def test_keyword_inputs_keep_their_names() -> None:
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"mask": torch.ones(4, 6), "tokens": tokens}
    model = quantized(Attention(), [batch])
    graph = traced(model, batch)
    assert graph.example.names == ("mask", "tokens")
    assert graph.dynamic["mask"] == {0: "batch", 1: "sequence"}


def test_an_op_that_the_example_does_not_reach_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, twice: bool = True) -> Tensor:
            return self.b(self.a(x)) if twice else self.a(x)

    model = quantized(Branching(), [torch.randn(4, 3)])
    example = Example.of_call(model.model, (torch.randn(4, 3), False), {})
    with pytest.raises(ExportError, match="does not reach 'b'"):
        trace(model._parts.model, example)


def test_branches_on_values_cannot_be_traced() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else -self.a(x)

    model = quantized(Looking(), [torch.ones(4, 3)])
    with pytest.raises(ExportError, match="branches that depend on values"):
        traced(model, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"picture": {0: "n"}}, "the model's inputs are image"),
        ({"image": {4: "n"}}, "no axis 4"),
        ({"image": {1: "colours"}}, "as the constant 3"),
    ],
)
def test_dynamic_axes_are_checked(axes: object, message: str) -> None:
    model = quantized(Block(), [image(8)])
    with pytest.raises(ExportError, match=message):
        traced(model, image(4), axes)


def test_dynamic_axes_may_be_named() -> None:
    graph = traced(quantized(Block(), [image(8)]), image(4), {"image": {0: "n", 2: "h", 3: "w"}})
    assert graph.dynamic == {"image": {0: "n", 2: "h", 3: "w"}}
    assert graph.simulate(torch.randn(2, 3, 6, 10))[0].shape == (2, 3)


def test_an_output_without_tensors_is_refused() -> None:
    class Talking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> str:
            return str(self.a(x).shape)

    model = quantized(Talking(), [torch.ones(4, 3)])
    with pytest.raises(ExportError, match="returns a str without tensors"):
        traced(model, torch.ones(4, 3))


def test_ops_outside_presets_are_marked_where_a_rule_quantizes_them() -> None:
    adds = Rule(op_types=["add"], options=[OpConfig(inputs=A8, output=A8)])
    model = quantized(Block(), [image(8)], SearchSpace(preset="int8", rules=[adds]))
    graph = traced(model, image(4))
    keys = [key for _, key in graph.markers()]
    assert keys[:4] == ["conv|0", "/add:0|0", "/add:0|1", "/add:0|-1"]
    assert torch.equal(graph.simulate(image(4))[0], model(image(4))["logits"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_traced(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    model = quantized(Recurrent(), [x])
    graph = traced(model, x)
    # on some CPUs the layer has a kernel of its own, which adds in another order
    torch.testing.assert_close(graph.simulate(x)[0], model(x), rtol=0, atol=1e-6)
    assert all(weight.nodes for weight in graph.weights)


class Mutating(nn.Module):
    """Works in place on what it computes, on its input and on a buffer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.a(x)
        h.relu_()
        h[:, :2] = 0
        x.mul_(2)
        return self.b(h) + x[:, :4]


def rows(n: int, width: int = 8) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


def test_a_trace_has_no_op_that_works_in_place() -> None:
    model = quantized(Mutating(), [rows(6)])
    graph = traced(model, rows(6))
    for node in graph.module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
    expected = model(rows(6))
    given = rows(6)
    for _ in range(2):
        assert torch.equal(graph.simulate(given)[0], expected)
    assert torch.equal(given, rows(6))


def test_outputs_called_like_an_input_get_a_name_of_their_own() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, output: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"scale": self.fc(output) * scale, "output": output}

    batch = {"output": rows(6), "scale": rows(6)}
    graph = traced(quantized(Echo(), [batch]), batch)
    assert graph.example.names == ("output", "scale")
    assert graph.outputs == ("scale_out", "output_out")


def test_a_batch_of_one_beside_a_scalar_stays_free() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.fc(x) * factor

    batch = {"x": rows(1), "factor": torch.tensor(2.0)}
    model = quantized(Scaled(), [batch])
    graph = traced(model, batch)
    assert graph.dynamic["x"] == {0: "batch"}
    assert torch.equal(graph.simulate(rows(5), torch.tensor(3.0))[0], model(rows(5), 3.0))


def test_with_batch_leaves_alone_what_has_no_batch_in_front() -> None:
    state = torch.zeros(2, 3, 4)
    example = Example.of_call(nn.Identity(), (rows(3), state), {})
    assert example.batch == 3
    assert [len(t) for t in example.with_batch(7).tensors] == [7, 2]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 8, 8)])
def test_a_sample_of_one_channel_without_a_batch_is_told_from_a_batch(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = quantization.fit(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval(), [x])
    if len(shape) == 4:
        assert model.export(tmp_path, "calibration").files
        return
    for example in (None, x):
        with pytest.raises(ExportError, match=r"shape \[1, 8, 8\], but not two .*unsqueeze\(0\)"):
            model.export(tmp_path, "calibration", example)
    assert model.export(tmp_path, "calibration", x.unsqueeze(0)).files
