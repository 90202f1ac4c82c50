"""Whole models as QDQ: equal to the simulation, small, and free where they are said to be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import (
    A8,
    STATIC,
    W8,
    Attention,
    Branches,
    Exported,
    exported,
    floats,
    only,
    scheme,
    tokens,
)
from tuner import OpConfig, PerChannel, TuningConfig, quantization

ROUNDING = 1e-5


class ConvNet(nn.Module):
    """Grouped, depthwise and transposed convolutions, a residual sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = nn.functional.relu6(self.norm(self.stem(image)))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(x))) + x)
        x = torch.relu(self.line(self.up(x).mean(-1)))
        return {"logits": self.head(x.mean(-1)), "maps": (x, x.amax(-1))}


class Tokens(nn.Module):
    """nn.MultiheadAttention over embeddings, and a head that is tied to their table."""

    def __init__(self, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y, _ = self.attention(x, x, x, key_padding_mask=ids == 0, need_weights=False)
        return self.head(self.norm(x + y))


def worst(model: Exported, optimized: bool = False) -> float:
    return max(model.worst(optimized).values())


@pytest.fixture(scope="module")
def convolutions() -> Exported:
    torch.manual_seed(0)
    return exported(ConvNet(), floats(4, 3, 8, 8))


@pytest.fixture(scope="module")
def attention() -> Exported:
    torch.manual_seed(0)
    return exported(Tokens(), tokens())


def test_convolutions(convolutions: Exported) -> None:
    assert worst(convolutions) < ROUNDING
    assert max(layer.max_steps for layer in convolutions.layers()) <= 1
    stored = {n: t for n, t in convolutions.types().items() if n.endswith("_weight_codes")}
    assert set(stored.values()) == {"INT8"}
    assert len(stored) == 6


def test_names_are_kept_and_axes_are_free(convolutions: Exported) -> None:
    graph = convolutions.proto
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["logits", "maps_0", "maps_1"]
    first = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in first] == ["batch", 3, 8, 8]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for n in (1, 7):
        image = floats(n, 3, 8, 8)
        expected = convolutions.traced.simulate(image)
        for found, value in zip(convolutions.run([image]), expected, strict=True):
            torch.testing.assert_close(found, value)


def test_what_the_tracer_notes_stays_out_of_the_file(convolutions: Exported) -> None:
    keys = {entry.key for node in convolutions.proto.node for entry in node.metadata_props}
    assert keys <= {"accutune.tensor", "accutune.stored"}
    assert b"test_onnx_graph.py" not in convolutions.contents


def test_multihead_attention_and_a_tied_head(attention: Exported) -> None:
    assert worst(attention) < ROUNDING
    assert worst(attention, optimized=True) < ROUNDING
    kernels = attention.kernels()
    assert kernels["MatMulIntegerToFloat"] + kernels["QLinearMatMul"] == 7
    ids = tokens(3, 9)
    ids[:, 7:] = 0
    torch.testing.assert_close(attention.run([ids])[0], attention.traced.simulate(ids)[0])


@pytest.mark.parametrize("space", ["int8-dynamic", "int4-weight-only"])
def test_other_spaces_on_tied_tables(space: str) -> None:
    model = exported(Tokens(), tokens(), space)
    assert worst(model) < ROUNDING
    assert worst(model, optimized=True) < ROUNDING
    assert model.kernels()["MatMulNBits"] == 5


@pytest.mark.parametrize(("fmt", "most"), [("int8", 0.26), ("int4", 0.135)])
def test_a_tied_table_is_stored_once(fmt: str, most: float) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(2000, 64)
            self.head = nn.Linear(64, 2000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    # per tensor, so that there are next to no scales beside the codes
    config = OpConfig(weight=scheme(fmt))
    model = exported(Tied(), tokens(), only({"embed": config, "head": config}))
    assert len(model.contents) < most * 4 * 2000 * 64
    assert worst(model, optimized=True) < ROUNDING


def test_a_mask_whose_rows_may_be_empty() -> None:
    mask = torch.ones(4, 6, 6, dtype=torch.bool).tril()
    mask[1, 2] = mask[0, 0] = False
    model = exported(Attention(is_causal=False), {"x": floats(4, 6, 16), "mask": mask})
    assert [value.name for value in model.proto.input] == ["x", "mask"]
    assert worst(model) < ROUNDING
    assert worst(model, optimized=True) < 1 / 200


def test_a_causal_mask_at_other_lengths() -> None:
    axes = {"x": {0: "batch", 1: "time"}}
    model = exported(Attention(is_causal=True), floats(4, 6, 16), axes=axes)
    assert worst(model) < ROUNDING
    x = floats(2, 9, 16)
    torch.testing.assert_close(model.run([x])[0], model.traced.simulate(x)[0])
    shape = model.proto.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", "time", 16]


def test_4_and_8_bits_of_equal_codes_are_told_apart() -> None:
    # equal constants become one: codes of both, and their zero points
    weight = torch.randint(-7, 8, (16, 16)).float()
    net = Branches(small=nn.Linear(16, 16), large=nn.Linear(16, 16))
    bounds = {"quant_min": -7, "quant_max": 7}
    configs = {
        "small": OpConfig(weight=scheme("int4", PerChannel(0))),
        "large": OpConfig(weight=scheme("int8", PerChannel(0), **bounds), inputs=A8),
    }
    weight[:, 0] = 7
    net.small.weight.data.copy_(weight)  # type: ignore[operator, union-attr]
    net.large.weight.data.copy_(2 * weight)  # type: ignore[operator, union-attr]
    model = exported(net, floats(3, 5, 16), only(configs))
    assert worst(model) < ROUNDING
    assert worst(model, optimized=True) < ROUNDING
    assert {"INT4", "INT8"} <= set(model.types().values())


def test_modules_that_are_called_twice_share_their_codes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(8, 8), nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.c(self.a(self.a(x))))

    model = exported(Twice(), floats(3, 4, 8))
    assert worst(model) < ROUNDING
    assert [t for n, t in model.types().items() if n.endswith("_codes")] == ["INT8", "INT8"]


class SumsOfProducts(nn.Module):
    """Layers as GPT-2 writes them, of a weight [in, out], and others of addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(floats(16, 12)), nn.Parameter(floats(12, 16))
        self.bias = nn.Parameter(floats(12))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "plain": torch.addmm(self.bias, x, self.weight),
            "turned": torch.addmm(self.bias, x, self.turned.t()),
            "of_two": torch.addmm(x[:, :5], x, torch.tanh(x[:5]).t()),
            "scaled": torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2),
        }


def test_sums_of_products_are_of_integers_but_where_they_are_scaled() -> None:
    found = exported(SumsOfProducts(), floats(8, 16))
    assert max(found.worst().values()) < ROUNDING
    assert max(found.worst(optimized=True).values()) < ROUNDING
    kernels = {name: found.behind(name) for name in found.traced.outputs}
    assert all("MatMulIntegerToFloat" in kernels[name] for name in ("plain", "turned", "of_two"))
    assert "Gemm" in kernels["scaled"]


@pytest.mark.parametrize(
    ("low", "rounds_scale", "count"),
    [(0.0, False, 1), (1.0, False, 0), (0.0, True, 0)],  # the last: codes go on beyond 3
)
def test_limits_that_codes_of_four_bits_have_too_keep_no_convolution_float(
    low: float, rounds_scale: bool, count: int
) -> None:
    layers = nn.Conv2d(3, 8, 3), nn.Hardtanh(low, 3.0), nn.Conv2d(8, 4, 1)
    four = scheme("uint4", symmetric=False, power_of_two_scale=rounds_scale)
    space = only({"0": STATIC, "2": OpConfig(weight=W8, inputs=four)})
    found = exported(nn.Sequential(*layers), 4 * floats(4, 3, 9, 9), space)
    assert max(found.worst(optimized=True).values()) < ROUNDING
    assert found.kernels()["QLinearConv"] == count


def test_repairs_are_in_the_weights() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.norm.weight.data[3] = 40.0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.norm(x))))

    repaired = OpConfig(weight=W8, inputs=A8, recovery=("smoothquant", "bias_correction"))
    model = exported(Uneven(), floats(3, 5, 16), only({"a": repaired, "b": STATIC}))
    assert model.quantized.result.best is not None
    assert worst(model) < ROUNDING


def test_norms_are_reestimated_before() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    config = OpConfig(
        weight=scheme("int4", PerChannel(0)), inputs=A8, recovery=("bn_reestimation",)
    )
    model = exported(net, floats(4, 3, 8, 8), only({"0": config, "3": STATIC}))
    assert worst(model) < ROUNDING


def test_an_input_called_like_an_initializer(tmp_path: Path) -> None:
    class Tied(nn.Module):
        """A head that is the table turned, which is called t in the graph, as the input is."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)

        def forward(self, t: Tensor) -> Tensor:
            return self.norm(self.table(t)) @ self.table.weight.t()

    torch.manual_seed(0)
    ids = torch.randint(0, 20, (4, 6))
    model = quantization.fit(Tied().eval(), [ids], config=TuningConfig())
    report = model.export(tmp_path, target="onnxruntime", batches=())
    assert report.agreement is not None
    assert report.agreement.max_abs <= 3 * report.agreement.floor
