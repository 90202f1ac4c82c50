"""The user's metric of an artifact stands beside that of the simulation, and its own floor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.evaluation import Evaluator
from tuner.exporters.disturbance import disturbed
from tuner.exporters.metric import MetricFloor
from tuner.isolation import RandomState
from tuner.quantized_model import QuantizedModel

# with steps of 1, each value but the last is halfway between two codes, and rounded to the lower
X = torch.cat([torch.arange(0.5, 100.5, 2), torch.tensor([127.0])]).unsqueeze(1)


class Net(nn.Module):
    """Gives the codes of its input, and has a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def score(self) -> float:
        return float(self(X).detach().mean())


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    eight = TensorScheme(format="int8")
    rule = Rule(names=["fc"], options=[OpConfig(weight=eight, inputs=eight)])
    config = TuningConfig(space=SearchSpace(preset="int8", rules=[rule], repairs=()))
    return quantization.fit(Net().eval(), [X], config=config)


def counted(scores: list[float]) -> Evaluator:
    def eval_func(net: Net) -> float:
        scores.append(net.score())
        return scores[-1]

    return Evaluator(eval_func, None, RandomState.now())


def test_a_disturbance_rounds_ties_otherwise_and_nothing_else(model: QuantizedModel) -> None:
    still = model.model(X)
    (one, other) = (disturbed(model._parts.model, seed).model(X) for seed in (0, 1))
    step = still.max() / 127
    for moved in (one, other):
        codes = ((moved - still) / step).detach()
        torch.testing.assert_close(codes.abs().max(), torch.tensor(1.0))
        assert 0.3 < codes.round().abs().mean() < 0.7  # half of the ties go the other way
        assert codes[-1] == 0
    assert not torch.equal(one, other)
    assert torch.equal(disturbed(model._parts.model, 0).model(X), one)
    assert torch.equal(model.model(X), still)


def test_layers_with_quantized_weights_alone_are_disturbed() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
    model = quantization.fit(net, [x], config=TuningConfig(space="int4-weight-only"))
    assert model.result.quantized_ops == 2
    still = model.model(x)
    moved = disturbed(model._parts.model, 0).model(x)
    torch.testing.assert_close(moved, still, rtol=1e-4, atol=1e-5)
    assert not torch.equal(moved, still)
    assert torch.equal(model.model(x), still)


@pytest.mark.parametrize(
    ("difference", "evaluations"),
    [(0.0, 1), (0.0019, 1), (-0.0019, 1), (0.0021, 2), (-0.0021, 2), (0.1, 3)],
)
def test_as_few_evaluations_as_answer_the_question(
    model: QuantizedModel, difference: float, evaluations: int
) -> None:
    scores: list[float] = []
    simulated = model.model.score()
    found = MetricFloor.of(simulated * (1 + difference), model._parts.model, counted(scores))
    assert found.simulated == simulated == scores[0]
    assert len(scores) == evaluations
    if evaluations == 1:
        assert found.floor is None
    else:
        assert found.floor == max(abs(score - simulated) for score in scores[1:])
        assert 0 < found.floor < 0.1 * simulated


def given(*scores: float) -> Callable[[nn.Module], float]:
    left = iter(scores)
    return lambda net: next(left)


@pytest.mark.parametrize(
    ("scores", "floor", "line", "warns"),
    [
        ((0.75, 0.75), None, "artifact: 0.75, on the simulation: 0.75 (0 apart)", False),
        ((0.75, 0.7438, 0.7376), 0.0062, "the simulation's own floor is 0.0062", False),
        ((0.75, 0.70, 0.71, 0.73), 0.03, "the simulation's own floor is 0.03", True),
        ((-2.0, -1.0, -1.0, -1.0), 0.0, "the simulation's own floor is 0", True),
        ((1.0, 0.0, 0.0, 0.0), 0.0, "on the simulation: 0 (1 apart)", True),
    ],
)
def test_the_report_says_how_far_metrics_are_apart(
    model: QuantizedModel,
    scores: tuple[float, ...],
    floor: float | None,
    line: str,
    warns: bool,
    tmp_path: Path,
) -> None:
    report = model.export(tmp_path / "out", target="integer", eval_func=given(*scores))
    assert (report.metric, report.simulated_metric) == scores[:2]
    assert report.metric_floor == (None if floor is None else pytest.approx(floor))
    kept = json.loads(json.dumps(report.to_dict()))
    assert [kept[key] for key in ("metric", "simulated_metric")] == list(scores[:2])
    assert kept["metric_floor"] == report.metric_floor
    assert line in report.summary()
    warnings = [note for note in report.notes if note.startswith("Warning: eval_func gives")]
    assert bool(warnings) is warns
    assert all(note in report.summary() for note in warnings)


def test_who_asks_for_no_metric_gets_none(model: QuantizedModel, tmp_path: Path) -> None:
    report = model.export(tmp_path / "out", target="integer")
    assert (report.metric, report.simulated_metric, report.metric_floor) == (None, None, None)
    assert "eval_func" not in report.summary()
