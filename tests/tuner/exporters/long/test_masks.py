"""Attention of padded sequences: rows of a mask that hide everything give 0, as in PyTorch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.tuner.exporters.onnx_nets import STATIC, only
from tuner import SearchSpace, TuningConfig, quantization
from tuner.exporters.onnx_masks import fill_empty_rows

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
KEEP = torch.ones(4, 6, dtype=torch.bool)
KEEP[0, 4:] = False
KEEP[1, :3] = False
KEEP[2] = False
NOTHING, LOWEST = float("-inf"), torch.finfo(torch.float32).min


class Padded(nn.Module):
    """Attention under a mask of pairs that are both kept: bool, or added numbers."""

    def __init__(self, hiding: float | None) -> None:
        super().__init__()
        self.hiding = hiding
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = keep[:, None, None, :] & keep[:, None, :, None]
        if self.hiding is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, self.hiding)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("hiding", [None, NOTHING, LOWEST])
@pytest.mark.parametrize("space", ["int8", only({"qkv": STATIC, "out": STATIC})])
@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino"])
def test_rows_that_see_nothing_are_as_in_the_simulation(
    target: str, space: str | SearchSpace, hiding: float | None, tmp_path: Path
) -> None:
    """With attention in integers where the target has that, and in float."""
    torch.manual_seed(0)
    config = TuningConfig(space=space, target=target)
    model = quantization.fit(Padded(hiding).eval(), [(X, KEEP)], config=config)
    report = model.export(tmp_path, target=target, example_inputs=(X, KEEP), batches=())
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(1e-5, report.agreement.floor)


class OneHead(nn.Module):
    """Attention without an axis of heads, under a mask of bools, or of what comes before."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = keep.unsqueeze(-2) & keep.unsqueeze(-1)
        given = {"attn_mask": mask} if self.masked else {"is_causal": True}
        return self.out(scaled_dot_product_attention(q, k, v, **given))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inputs", [(X, KEEP), (X[0], KEEP[0])], ids=["batch", "single"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_float_attention_without_heads(
    target: str, inputs: tuple[Tensor, Tensor], masked: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = TuningConfig(space=only({"qkv": STATIC, "out": STATIC}), target=target)
    model = quantization.fit(OneHead(masked).eval(), [inputs], config=config)
    options = {"batches": (), "dynamic_axes": {} if len(inputs[1].shape) == 1 else None}
    report = model.export(tmp_path, target=target, example_inputs=inputs, **options)
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(1e-5, report.agreement.floor)


def products_after_attention(module: nn.Module, *inputs: Tensor) -> int:
    graph = torch.export.export(module, inputs, strict=False).module()
    assert isinstance(graph, fx.GraphModule)
    fill_empty_rows(graph)
    return sum("_filled" in node.name for node in graph.graph.nodes)


@pytest.mark.parametrize(("hiding", "count"), [(None, 1), (NOTHING, 1), (LOWEST, 0)])
def test_masks_that_hide_no_row_are_left_alone(hiding: float | None, count: int) -> None:
    """The lowest number hides nothing from a row that has nothing else: PyTorch averages there."""
    assert products_after_attention(Padded(hiding), X, KEEP) == count


def test_a_constant_mask_is_looked_at() -> None:
    class Causal(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril())
            self.mask[0, 0] = first

        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    assert products_after_attention(Causal(True), X) == 0
    assert products_after_attention(Causal(False), X) == 1
