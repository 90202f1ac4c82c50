"""What a target cannot run at all is refused before the search, not at the export after it."""

import pytest
import torch
from torch import Tensor, nn

from tuner import TuningConfig, quantization
from tuner.errors import ExportError, SpaceError

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


class Projected(nn.Module):
    """An LSTM with projections, which ONNX has no op for."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, proj_size=3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


class Branching(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * 2 if y.sum() > 0 else y


def never(model: nn.Module) -> float:
    raise AssertionError("evaluated, before the target was asked")


def refused(model: nn.Module, target: str) -> str:
    with pytest.raises(ExportError) as caught:
        quantization.fit(model.eval(), [X], never, TuningConfig(target=target))
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("target", ["onnx", "openvino", "integer"])
def test_a_layer_that_a_target_does_not_know(target: str) -> None:
    assert f"target '{target}' cannot run this model" in refused(Projected(), target)


@pytest.mark.parametrize("target", ["onnxruntime", "torch", "integer", "calibration"])
def test_branches_on_values(target: str) -> None:
    assert "torch.export cannot trace this model" in refused(Branching(), target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_that_are_not_fp32(dtype: torch.dtype) -> None:
    model, name = nn.Sequential(nn.Linear(8, 2)).to(dtype), str(dtype).removeprefix("torch.")
    with pytest.raises(ExportError, match=rf"'0.weight' is {name}.*fit\(model.float\(\)"):
        quantization.fit(model, [X.to(dtype)], config=TuningConfig(target="onnxruntime"))


def test_batch_norms_that_are_folded_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.ReLU()).eval()
    assert quantization.fit(model, [X], config=TuningConfig(target="integer")).plan.quantized


class Narrowed(nn.Module):
    """Takes float64, computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.float())


@pytest.mark.parametrize(
    ("model", "data", "why"),
    [(Narrowed(), X.double(), "comes from float64"), (nn.Linear(8, 2), X[0, 0], "one vector")],
)
def test_what_openvino_runs_in_fp32_but_not_quantized(
    model: nn.Module, data: Tensor, why: str
) -> None:
    config = TuningConfig(target="openvino")
    with pytest.raises(ExportError, match=why):
        quantization.fit(model.eval(), [data], never, config)


def test_integer_convolutions_of_pytorch_take_batches() -> None:
    config = TuningConfig(target="torch")
    with pytest.raises(SpaceError, match="take batches, not one sample"):
        quantization.fit(nn.Conv1d(5, 4, 3).eval(), [X[0]], never, config)
