"""export(): from a quantized model to a checked artifact, and what is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner import AccuracyGoal, TuningConfig, quantization
from tuner.errors import ExportError, UnknownNameError
from tuner.quantized_model import QuantizedModel

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


@dataclass
class Answer:
    """What a model of this test returns; torch's pytree does not know it."""

    logits: Tensor


class Net(nn.Module):
    """Two linear layers, and a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(x))
        return {"logits": self.b(h), "hidden": h}

    def predict(self, x: Tensor) -> Tensor:
        return self(x)["logits"].argmax(-1)


def tuned(model: nn.Module | None = None, **config: Any) -> QuantizedModel:
    torch.manual_seed(0)
    model = Net() if model is None else model
    return quantization.fit(model.eval(), [X], config=TuningConfig(**config))


def test_an_export_reports_agreement_size_and_latency(tmp_path: Path) -> None:
    report = tuned().export(tmp_path / "net.onnx")
    assert report.files == (tmp_path / "net.onnx",)
    assert report.size_bytes == (tmp_path / "net.onnx").stat().st_size
    assert report.agreement is not None
    assert report.agreement.samples == 32
    assert report.agreement.max_abs < 0.02
    assert [latency.batch for latency in report.latency] == [1, 8]
    assert all(0 < latency.quantized_ms < 1e3 for latency in report.latency)
    assert "Agreement with the simulation" in report.summary()


def test_eval_func_gets_the_artifact_as_the_users_class(tmp_path: Path) -> None:
    model, seen = tuned(), []

    def eval_func(artifact: Any) -> float:
        assert isinstance(artifact, Net)
        seen.append(artifact.predict(X[:5]))
        outputs = artifact(X[:3])
        assert list(outputs) == ["logits", "hidden"]
        return float(outputs["logits"].detach().abs().mean())

    report = model.export(tmp_path, eval_func=eval_func, batches=())
    assert torch.equal(seen[0], model.model.predict(X[:5]))  # type: ignore[operator]
    expected = float(model(X[:3])["logits"].detach().abs().mean())
    assert report.metric == pytest.approx(expected, rel=1e-2)
    assert report.latency == ()


def test_the_metric_is_the_goals(tmp_path: Path) -> None:
    def eval_func(artifact: Any) -> dict[str, float]:
        return {"size": 3.0, "accuracy": float(artifact.predict(X).float().mean())}

    goal = AccuracyGoal(metric="accuracy", max_drop=10.0)
    model = quantization.fit(Net().eval(), [X], eval_func, TuningConfig(goal=goal, max_trials=1))
    report = model.export(tmp_path, eval_func=eval_func, batches=())
    assert report.metric == pytest.approx(model.result.best.accuracy, abs=0.2)


def test_a_loaded_model_exports_the_same_file(tmp_path: Path) -> None:
    model = tuned(space="mixed-int")
    model.save(tmp_path / "saved")
    again = quantization.load(tmp_path / "saved", Net())
    model.export(tmp_path / "a.onnx", batches=())
    again.export(tmp_path / "b.onnx", example_inputs=X, batches=())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_loaded_model_wants_inputs(tmp_path: Path) -> None:
    tuned().save(tmp_path / "saved")
    with pytest.raises(ExportError, match="give example_inputs"):
        quantization.load(tmp_path / "saved", Net()).export(tmp_path / "a.onnx")


def test_the_random_state_and_the_model_stay(tmp_path: Path) -> None:
    model = tuned()
    before, state = model(X)["logits"], torch.get_rng_state()
    model.export(tmp_path, batches=())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(X)["logits"], before)


def test_unknown_targets_are_refused_with_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        tuned().export(tmp_path, target="onnxrt")


@pytest.mark.parametrize("inputs", [3, "batch"])
def test_example_inputs_of_a_wrong_type_are_refused(inputs: object, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give a tensor, a tuple of inputs or a mapping"):
        tuned().export(tmp_path / "net.onnx", example_inputs=inputs)


def test_outputs_that_cannot_be_put_together_are_told_to_eval_func(tmp_path: Path) -> None:
    class Unknown(Net):
        def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
            return Answer(super().forward(x)["logits"])

    model = tuned(Unknown())
    report = model.export(tmp_path / "a.onnx", batches=())
    assert report.agreement is not None
    with pytest.raises(ExportError, match="returns a Answer, which cannot be put together"):
        model.export(tmp_path / "b.onnx", batches=(), eval_func=lambda m: 1.0)
