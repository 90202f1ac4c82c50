"""Plans that are trained before they are judged: fit(train_func=…)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import seeded
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import TunerError, UnsupportedError
from tuner.quantization import TrainableModel, Training

_SAMPLES, _WIDTH, _CLASSES = 256, 8, 4


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SAMPLES, _WIDTH, generator=generator)
    teacher = torch.randn(_WIDTH, _CLASSES, generator=generator)
    return x, (x @ teacher).argmax(-1)


X, Y = _data()
BATCHES = list(zip(X.split(32), Y.split(32), strict=True))
W2A2 = OpConfig(
    weight=TensorScheme(format="int2", granularity=PerChannel(0), calibration="mse"),
    inputs=TensorScheme(format="uint3", symmetric=False, calibration="mse"),
)


class Student(nn.Module):
    """Two layers, trained on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(_WIDTH, 32), nn.ReLU(), nn.Linear(32, _CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.body(x)
        return logits


@pytest.fixture(scope="module")
def student() -> nn.Module:
    model = seeded(Student)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        for x, y in BATCHES:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


class Counted:
    """The accuracy on the data, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        assert not model.training
        with torch.no_grad():
            return float((model(X).argmax(-1) == Y).float().mean())


def asking(recovery: str) -> TuningConfig:
    option = W2A2.model_copy(update={"recovery": (recovery,)})
    space = SearchSpace(rules=[Rule(options=[option, OpConfig.float()])])
    return TuningConfig(space=space, goal=AccuracyGoal(max_drop=0.1), max_trials=8)


def epoch_of(lr: float) -> Callable[[Any], float]:
    def train(model: TrainableModel) -> float:
        optimizer = torch.optim.Adam(quantization.parameter_groups(model, lr))
        losses = []
        for x, y in BATCHES:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)

    return train


@pytest.mark.parametrize("recovery", ["lsq", "qat"])
def test_options_that_are_trained_first(
    recovery: str, student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    evaluate = Counted()
    training = Training(epoch_of(1e-2), search_epochs=4, epochs=8)
    model = quantization.fit(student, BATCHES, evaluate, asking(recovery), train_func=training)
    result = model.result
    assert result.goal_met
    assert result.quantized_ops == 2
    assert all(recovery in config.recovery for config in result.best.plan.values())
    assert evaluate.calls == result.evaluations
    assert "never ran" not in caplog.text
    assert result.best.accuracy == Counted()(model.model)
    unjudged = quantization.fit(student, BATCHES, None, asking(recovery), train_func=training)
    plain = asking(recovery).space.rules[0].options[0].model_copy(update={"recovery": ()})
    rule = Rule(options=[plain])
    untrained = quantization.fit(
        student, BATCHES, None, TuningConfig(space=SearchSpace(rules=[rule]))
    )
    assert Counted()(untrained.model) < Counted()(unjudged.model) - 0.02
    model.save(tmp_path / "saved")
    loaded = quantization.load(tmp_path / "saved", seeded(Student))
    assert torch.equal(loaded(X), model(X))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_missed_the_goal_is_trained_last(student: nn.Module, tmp_path: Path) -> None:
    config = TuningConfig(space="mixed-int", goal=AccuracyGoal(max_drop=0.02))
    storage = f"sqlite:///{tmp_path}/studies.db"
    training = Training((BATCHES, F.cross_entropy), search_epochs=10, epochs=10, lr=1e-2)

    def run(evaluate: Counted, **options: Any) -> Any:
        return quantization.fit(
            student, BATCHES, evaluate, config, storage=storage, study_name="s", **options
        )

    plain = quantization.fit(student, BATCHES, Counted(), config)
    first, again = Counted(), Counted()
    model = run(first, train_func=training)
    trained = [trial for trial in model.result.trials if trial.reason.startswith("trained")]
    assert trained
    assert model.result.best in trained
    assert model.result.best.costs["bops"] < plain.result.best.costs["bops"]
    resumed = run(again, train_func=training)
    assert again.calls == 0
    assert resumed.plan == model.plan
    assert torch.equal(resumed(X), model(X))


def test_a_loss_that_is_no_number_fails_the_trial(student: nn.Module) -> None:
    config = asking("lsq")
    result = quantization.fit(
        student, BATCHES, Counted(), config, train_func=_breaking_after_a_while()
    ).result
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert "loss" in str(failed[0].error)
    assert result.goal_met


def _breaking_after_a_while() -> Callable[[Any], float]:
    train, calls = epoch_of(1e-2), iter(range(1000))
    return lambda model: train(model) if next(calls) else float("nan")


@pytest.mark.parametrize("given", ["train", 3, (BATCHES, None), (BATCHES,)])
def test_what_cannot_train_is_refused(given: Any, student: nn.Module) -> None:
    with pytest.raises(TunerError, match="train_func is a"):
        quantization.fit(student, BATCHES, Counted(), train_func=given)


@pytest.mark.parametrize("field", ["search_epochs", "epochs", "attempts"])
def test_numbers_are_checked(field: str) -> None:
    with pytest.raises(TunerError, match=f"{field} is -1"):
        Training(epoch_of(1e-2), **{field: -1})


def test_training_takes_a_function(student: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="train_func"):
        quantization.fit(student, BATCHES, Counted(), asking("lsq"))
