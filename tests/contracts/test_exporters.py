"""What every exporter must do: a checked artifact, a model that stays, clear refusals."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, TensorScheme, TuningConfig, quantization
from tuner.errors import ExportError
from tuner.exporters.report import ExportReport
from tuner.exporters.targets import exporter, targets
from tuner.quantized_model import QuantizedModel

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution with a residual sum, pooling and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.first(image))
        x = torch.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


@cache
def tuned() -> QuantizedModel:
    torch.manual_seed(0)
    return quantization.fit(Net().eval(), [X], config=TuningConfig())


@cache
def exported(target: str) -> tuple[ExportReport, dict[str, int], bool]:
    """Return the report of an export, its files with their sizes, and whether the model stayed."""
    model = tuned()
    before = model(X), {name: t.clone() for name, t in model.state_dict().items()}
    with TemporaryDirectory() as folder:
        report = model.export(Path(folder) / "artifact", target=target, batches=())
        sizes = {path.name: path.stat().st_size for path in report.files}
    stayed = torch.equal(model(X), before[0]) and all(
        torch.equal(t, before[1][name]) for name, t in model.state_dict().items()
    )
    return report, sizes, stayed


@pytest.mark.parametrize("target", targets())
def test_the_report_tells_of_the_files(target: str) -> None:
    report, sizes, _ = exported(target)
    assert report.target == target
    assert sizes
    assert sum(sizes.values()) == report.size_bytes
    assert report.float_size_bytes is None or report.float_size_bytes > 0
    assert report.latency == ()
    assert str(report.files[0]) in report.summary()


@pytest.mark.parametrize("target", [t for t in targets() if t != "calibration"])
def test_the_artifact_agrees_with_the_simulation(target: str) -> None:
    agreement = exported(target)[0].agreement
    assert agreement is not None
    assert agreement.samples == len(X)
    assert agreement.max_abs < 0.05
    assert agreement.argmax is not None
    assert agreement.argmax > 0.8


@pytest.mark.parametrize("target", targets())
def test_the_model_stays(target: str) -> None:
    assert exported(target)[2]


@pytest.mark.parametrize("target", targets())
def test_what_a_target_can_run_is_told_by_op(target: str) -> None:
    found, model = exporter(target), tuned()
    weight = TensorScheme(format="mxfp4")
    for name, op in model._parts.model.ops.items():
        if name not in model.plan:
            continue
        assert found.why_not(op, model.plan[name]) is None
        why = found.why_not(op, OpConfig(weight=weight, inputs=weight))
        assert target == "calibration" or why


@pytest.mark.parametrize("target", targets())
def test_a_path_that_cannot_be_written_is_an_error(target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"cannot|exists|directory"):
        tuned().export(tmp_path / "file" / "artifact", target=target, batches=())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
