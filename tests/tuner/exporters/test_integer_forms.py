"""Sums of products and layers of one sample are integers like others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.integer_nets import exported, fitted
from tuner.exporters.report import ExportReport

BIASES = 1e-4
"""They are float in the plan, and in steps of products in the artifact."""


class SumsOfProducts(nn.Module):
    """A layer as GPT-2 writes it, then scores that are added to others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])
        return torch.baddbmm(x[..., :5], y, torch.relu(y).transpose(1, 2))


class OneImage(nn.Module):
    """Convolutions and poolings of [C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(torch.relu(self.conv(image)), 2)
        return nn.functional.avg_pool2d(self.up(pooled), 3)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(SumsOfProducts, (4, 5, 8)), (OneImage, (3, 8, 8))],
)
def test_all_of_it_is_computed_with_integers(
    model: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = torch.randn(shape)
    report: ExportReport = exported(fitted(model().eval(), data), data, tmp_path)
    assert report.left_float == ()
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(BIASES, report.agreement.floor)
    assert max(layer.max_steps for layer in report.layers) <= 1
