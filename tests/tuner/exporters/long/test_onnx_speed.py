"""What is spelled for ONNX Runtime's sake alone has the same values, and hits faster kernels."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import (
    STATIC,
    Attention,
    Exported,
    exported,
    floats,
    only,
)
from tuner.exporters.onnx_runtime import OnnxRuntimeSession

_TIGHT = 1e-5


class Twice(nn.Module):
    """Two layers of attention under one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(False), Attention(False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x, mask), mask)
        return y


class Added(nn.Module):
    """Attention under a mask that is added to the scores, as older transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        hidden = (1 - mask.to(x.dtype)) * torch.finfo(x.dtype).min
        return torch.softmax(scores + hidden, -1) @ x


class Residual(nn.Module):
    """A sum that is normalized, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.norm(torch.relu(x) + self.second(x))
        return y


def _ops(found: Exported) -> Counter[str]:
    return Counter(node.op_type for node in found.proto.node)


def _attention(batch: object, is_causal: bool, quick: bool = True) -> Exported:
    torch.manual_seed(0)
    return exported(Attention(is_causal), batch, quick=quick)


def _mask() -> Tensor:
    """Hide keys at random, and all of them from one query."""
    mask = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    mask |= torch.eye(6, dtype=torch.bool)
    mask[1, 2] = False
    return mask


class TestMaskedSoftmax:
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_is_as_the_simulation(self, is_causal: bool) -> None:
        x = floats(4, 6, 16)
        found = _attention(x if is_causal else {"x": x, "mask": _mask()}, is_causal)
        assert max(layer.max_steps for layer in found.layers()) <= 1
        assert max(found.worst().values()) < _TIGHT

    def test_makes_the_bias_of_a_mask_once(self) -> None:
        batch = {"x": floats(4, 6, 16), "mask": _mask()}
        slow, quick = exported(Twice(), batch), exported(Twice(), batch, quick=True)
        assert _before_softmax(slow) == ["Where", "Mul"]
        assert _before_softmax(quick) == ["Max", "Add"]
        assert (_ops(slow)["Where"], _ops(quick)["Where"]) == (4, 2)
        assert max(quick.worst().values()) < _TIGHT

    def test_limits_scores_that_a_mask_is_added_to(self) -> None:
        torch.manual_seed(0)
        batch = {"x": floats(4, 6, 16), "mask": _mask()}
        found = exported(Added(), batch, quick=True)
        assert _before_softmax(found) == ["Max", "Add"]
        assert max(found.worst().values()) < _TIGHT

    def test_scales_an_operand_of_integers_instead_of_the_scores(self) -> None:
        x = floats(4, 6, 16)
        assert _ops(_attention(x, True, quick=False))["Mul"] == 1
        assert _ops(_attention(x, True))["Mul"] == 0

    def test_never_gets_what_becomes_denormal(self) -> None:
        found = _attention({"x": 30 * floats(4, 6, 16), "mask": _mask()}, False)
        softmax = next(node for node in found.proto.node if node.op_type == "Softmax")
        scores = _value(found, softmax.input[0])
        depth = (scores.amax(-1, keepdim=True) - scores).max().item()
        assert depth == pytest.approx(64.0)


class TestNorms:
    def test_are_not_one_op_with_the_sum_before_them(self) -> None:
        x = floats(4, 6, 16)
        slow, quick = exported(Residual(), x), exported(Residual(), x, quick=True)
        assert slow.kernels()["SkipLayerNormalization"] == 1
        assert quick.kernels()["SkipLayerNormalization"] == 0
        assert max(quick.worst(optimized=True).values()) < _TIGHT


class TestGelus:
    def test_are_not_one_op_with_the_sum_before_them(self) -> None:
        x = floats(4, 6, 16)
        net = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        slow, quick = exported(net, x), exported(net, x, quick=True)
        assert slow.kernels()["BiasGelu"] == 1
        assert quick.kernels()["BiasGelu"] == 0
        assert quick.kernels()["Gelu"] == 1
        assert max(quick.worst(optimized=True).values()) < _TIGHT


def _stem(kernel: int, stride: int, padding: int, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, kernel, stride, padding), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )


class TestStems:
    @pytest.mark.parametrize("size", [(32, 32), (33, 30), (31, 37)])
    @pytest.mark.parametrize(
        ("kernel", "stride", "padding"), [(7, 2, 3), (3, 2, 1), (4, 4, 0), (8, 2, 3), (6, 4, 2)]
    )
    def test_are_as_the_simulation(
        self, kernel: int, stride: int, padding: int, size: tuple[int, int]
    ) -> None:
        x = floats(2, 3, *size) + 0.5
        found = exported(_stem(kernel, stride, padding), x, quick=True)
        assert _ops(found)["SpaceToDepth"] == 1
        assert max(found.worst().values()) < _TIGHT
        assert max(layer.max_steps for layer in found.layers()) <= 1

    @pytest.mark.parametrize(("size", "pads"), [((32, 32), 0), ((33, 32), 1)])
    def test_are_padded_by_the_convolution_where_it_can(
        self, size: tuple[int, int], pads: int
    ) -> None:
        found = exported(_stem(7, 2, 3), floats(2, 3, *size), quick=True)
        assert _ops(found)["Pad"] == pads

    def test_are_left_alone_without_a_stride_or_with_many_channels(self) -> None:
        for stem, x in (
            (_stem(3, 1, 1), floats(2, 3, 8, 8)),
            (_stem(3, 2, 1, 8), floats(2, 8, 8, 8)),
        ):
            found = exported(stem, x, quick=True)
            assert _ops(found)["SpaceToDepth"] == 0
            assert max(found.worst().values()) < _TIGHT

    def test_are_left_alone_where_images_may_have_any_size(self) -> None:
        axes = {"input": {0: "n", 2: "h", 3: "w"}}
        stem = _stem(7, 2, 3)
        found = exported(stem, floats(2, 3, 32, 32), axes=axes, quick=True)
        assert _ops(found)["SpaceToDepth"] == 0
        assert found.run([floats(1, 3, 48, 40)])[0].shape == (1, 8, 24, 20)

    def test_have_integer_kernels(self) -> None:
        space = only({"0": STATIC, "2": STATIC})
        found = exported(_stem(7, 2, 3), floats(2, 3, 32, 32), space, quick=True)
        assert found.kernels()["QLinearConv"] == 1
        assert found.kernels()["QuantizeLinear"] == 1


def _before_softmax(found: Exported) -> list[str]:
    """Return the op that gives the scores, and the op before it."""
    makers = {name: node for node in found.proto.node for name in node.output}
    softmax = next(node for node in found.proto.node if node.op_type == "Softmax")
    last = makers[softmax.input[0]]
    before = next(makers[name] for name in last.input if name in makers)
    if last.op_type == "Where":
        before = makers[last.input[2]]
    return [last.op_type, before.op_type]


def _value(found: Exported, name: str) -> Tensor:
    """Return what a value of the graph is on the example."""
    model = onnx.load_from_string(found.contents)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = OnnxRuntimeSession(model.SerializeToString(), optimized=False)
    return session.run(found.traced.example.tensors)[-1]


def test_files_hold_no_notes_of_the_tracer_and_no_shapes_within(tmp_path: Path) -> None:
    found = exported(_stem(3, 2, 1), floats(2, 3, 8, 8))
    found.model.save(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert len(model.graph.value_info) == 0
    assert len(model.metadata_props) + len(model.graph.metadata_props) == 0
    keys = {prop.key for node in model.graph.node for prop in node.metadata_props}
    assert keys == {"accutune.tensor"}
