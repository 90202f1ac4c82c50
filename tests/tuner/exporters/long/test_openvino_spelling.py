"""What OpenVINO would compute wrongly, or refuse, is spelled otherwise: integers all the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner import TuningConfig, quantization


class ReadTwice(nn.Module):
    """A convolution that two others read, one of them through an activation."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.cat([torch.tanh(y), y], 1)).flatten(2).mean(2)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bias", ["none", "zeros", "some"])
def test_scales_of_a_convolution_that_is_read_twice_count_once(
    bias: str, axes: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    first = convolution(3, 6, 3, bias=bias != "none")
    if bias == "zeros":
        nn.init.zeros_(first.bias)
    x = torch.randn(8, 3, *[8] * axes)
    net = ReadTwice(first, convolution(12, 4, 3)).eval()
    model = quantization.fit(net, [x], config=TuningConfig(target="openvino"))
    report = model.export(tmp_path / "model.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert not report.left_float


@pytest.mark.parametrize(
    ("length", "stride", "padding", "dilation", "is_float"),
    [
        (3, 1, 1, 1, False),
        (3, 1, 3, 1, True),
        (2, 1, 2, 2, False),
        (2, 1, 3, 2, True),
        (1, 1, 0, 1, False),
        (1, 2, 1, 1, True),
    ],
)
def test_a_convolution_of_nothing_but_padding_is_float(
    length: int, stride: int, padding: int, dilation: int, is_float: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    padded = nn.Conv2d(1, 2, length, stride, padding, dilation)
    x = torch.randn(8, 1, 12, 12)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), padded, nn.Flatten()).eval()
    model = quantization.fit(net, [x], config=TuningConfig(target="openvino"))
    report = model.export(tmp_path / "model.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert {left.op for left in report.left_float} == ({"1"} if is_float else set())


def mean_of_columns(x: Tensor, numbers: Tensor) -> Tensor:
    return (torch.tanh(x) * numbers).mean(1)


def joined_rows(x: Tensor, numbers: Tensor) -> Tensor:
    return torch.cat([numbers.expand(len(x), 1, -1), x, x[:, :3]], 1)


def padded_rows(x: Tensor, numbers: Tensor) -> Tensor:
    return functional.pad(torch.tanh(x), (0, 0, 1, 1))


def padded_columns(x: Tensor, numbers: Tensor) -> Tensor:
    return functional.pad(torch.tanh(x)[..., 2:], (1, 1))


class Between(nn.Module):
    """Two layers, and between them what moves no value from its column."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
        self.between, self.numbers = between, nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), self.numbers))


@pytest.mark.parametrize("between", [mean_of_columns, joined_rows, padded_rows, padded_columns])
def test_quantizers_stay_where_they_are(
    between: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 7, 6)
    model = quantization.fit(Between(between).eval(), [x], config=TuningConfig(target="openvino"))
    report = model.export(tmp_path / "model.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) < 0.01
    assert not report.left_float


@pytest.mark.parametrize("pads", [(2, 0), (4, 0), (0, 2)])
def test_padding_apart_from_a_convolution_is_of_zeros(
    pads: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rows = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.GELU(), nn.ConstantPad1d(pads, 0.0), nn.Conv1d(8, 4, 3)
    )
    model = quantization.fit(
        rows.eval(), [torch.randn(8, 3, 12)], config=TuningConfig(target="openvino")
    )
    report = model.export(tmp_path / "rows.onnx", target="openvino", batches=())
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert not report.left_float
