"""Latency as the objective where goals, models and machines are odd: nothing slow comes back."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.base import Outcome, Strategy
from strategies.replay import SearchRun
from strategies.space import Assignment
from tuner import (
    AccuracyGoal,
    NothingQuantizedWarning,
    OpConfig,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import EvaluationError
from tuner.example import Example
from tuner.exporters.base import Call
from tuner.exporters.onnx_exporter import OnnxRuntimeExporter
from tuner.exporters.targets import exporter
from tuner.exporters.tracing import Traced
from tuner.latency import LatencyModel, MeasuredLatency
from tuner.model import InstrumentedModel
from tuner.op_times import OpTimes
from tuner.ops import Op
from tuner.quantized_model import QuantizedModel

pytestmark = pytest.mark.usefixtures("own_times")

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Two layers, the second of which is run where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        x = self.a(x)
        return self.b(torch.relu(x)) if deep else x


def scores(fp32: float, quantized: float) -> Callable[[nn.Module], float]:
    return lambda model: fp32 if type(model.a) is nn.Linear else quantized


def fit(
    eval_func: Callable[[nn.Module], float], data: Any = (X,), **options: Any
) -> QuantizedModel:
    names = ("storage", "study_name", "train_func")
    kept = {name: options.pop(name) for name in names if name in options}
    options = {"max_trials": 2, **options}
    config = TuningConfig(objective="latency", target="onnxruntime", **options)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        return quantization.fit(Layers().eval(), list(data), eval_func, config, **kept)


def slower(model: LatencyModel) -> MeasuredLatency:
    """Measure twice what FP32 takes: no clock is slow to order."""
    took = 2 * model.baseline.latency_ms
    return MeasuredLatency(took, took, took)


def test_where_fp32_misses_the_goal_too_no_plan_comes_back_that_was_not_timed() -> None:
    found = fit(scores(0.90, 0.91), goal=AccuracyGoal(at_least=0.95)).result
    assert [trial.meets_goal for trial in found.trials] == [False]
    assert found.best is found.baseline_trial
    assert found.goal_met is False
    assert "latency_ms" in found.summary()


def test_a_slower_plan_comes_back_where_fp32_misses_the_goal_that_it_meets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LatencyModel, "measure", slower)
    found = fit(scores(0.90, 0.96), goal=AccuracyGoal(at_least=0.95)).result
    assert found.goal_met
    assert found.quantized_ops == 2


def test_a_plan_that_the_target_cannot_run_is_a_failed_trial(tmp_path: Path) -> None:
    """The example is the first batch, which does not reach the second layer."""
    data = [{"x": X, "deep": False}, {"x": X, "deep": True}]
    storage = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s"}
    for _ in range(2):  # the second finds what the first stored
        with pytest.raises(EvaluationError, match=r"passed it(.|\n)*does not reach"):
            fit(scores(1.0, 1.0), data, **storage)


def test_what_is_timed_once_it_meets_a_looser_goal_is_known_to_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Outcome] = []

    class Told(SearchRun):
        def __init__(self, strategy: Strategy, known: Mapping[Assignment, Outcome]) -> None:
            told[:] = known.values()
            super().__init__(strategy, known)

    monkeypatch.setattr("tuner.session.SearchRun", Told)
    monkeypatch.setattr(LatencyModel, "measure", slower)
    storage = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s"}
    fit(scores(1.0, 0.9), **storage)
    again = fit(scores(1.0, 0.9), goal=AccuracyGoal(max_drop=0.5), **storage).result
    whole = again.baseline_costs["latency_ms"]
    assert [outcome.measured_cost for outcome in told] == pytest.approx([2 * whole], rel=0.01)


def test_a_study_with_trained_plans_that_missed_the_goal_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def option_ms(model: LatencyModel, op: Op, config: OpConfig) -> float:
        return (0.4 if config.is_float else 0.1) * model.baseline.latency_ms

    monkeypatch.setattr(LatencyModel, "option_ms", option_ms)
    options = {
        "storage": f"sqlite:///{tmp_path}/study.db",
        "study_name": "s",
        "train_func": lambda model: float(model(X).sum().detach()),
        "max_trials": 50,
    }
    once, again = (fit(scores(1.0, 0.9), **options).result for _ in range(2))
    assert any(trial.reason.startswith("trained") for trial in once.trials)
    assert again.trials == once.trials


class Similar(nn.Module):
    """The products of all samples with each other: at batch 1 one number by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 1), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.b(x).T


def test_an_op_that_cannot_be_traced_alone_counts_no_time() -> None:
    model = InstrumentedModel(Similar().eval())
    with torch.no_grad():
        ops = dict(model.record(lambda: model.model(X[:1]), 1).ops)
    latency = LatencyModel(model, exporter("onnxruntime"), Example.of_batch(model.model, X))
    product = ops["/matmul:0"]
    codes = TensorScheme(format="uint8", symmetric=False)
    assert latency.option_ms(product, OpConfig.float()) == 0
    assert latency.option_ms(product, OpConfig(inputs=(codes, codes))) == 0
    assert latency.option_ms(ops["a"], OpConfig.float()) > 0


def test_what_the_runtime_refuses_alone_takes_the_time_of_fp32(tmp_path: Path) -> None:
    model = InstrumentedModel(Layers().eval())
    with torch.no_grad():
        ops = dict(model.record(lambda: model.model(X[:1]), 1).ops)
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    unknown = TensorScheme(format="nf4")  # no ONNX of these can be written
    config = OpConfig(weight=TensorScheme(format="int8"), inputs=(unknown,))
    found = times.time_ms(model, ops["a"], config)
    assert found == times.time_ms(model, ops["a"], OpConfig.float()) > 0
    (kept,) = tmp_path.glob("*.json")
    assert list(json.loads(kept.read_text()).values()) == [found]


def test_searches_at_the_same_time_keep_the_times_of_both(tmp_path: Path) -> None:
    model = InstrumentedModel(Layers().eval())
    with torch.no_grad():
        ops = dict(model.record(lambda: model.model(X[:1]), 1).ops)
    one, other = (OpTimes(exporter("onnxruntime"), tmp_path) for _ in range(2))
    codes = TensorScheme(format="uint8", symmetric=False)
    config = OpConfig(weight=TensorScheme(format="int8"), inputs=(codes,))
    found = [
        one.time_ms(model, ops["a"], OpConfig.float()),
        other.time_ms(model, ops["a"], config),
    ]
    (kept,) = tmp_path.iterdir()
    assert sorted(json.loads(kept.read_text()).values()) == sorted(found)


class Slow(OnnxRuntimeExporter):
    """Runs what it compiles in 0.4 s, and counts how often."""

    calls = 0

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        run = super().compiled(traced, batch, on_codes)

        def call() -> object:
            self.calls += 1
            time.sleep(0.4)
            return run()

        return call


def test_slow_models_are_warmed_up_once() -> None:
    slow, layers = Slow(), Layers().eval()
    LatencyModel(InstrumentedModel(layers), slow, Example.of_batch(layers, X))
    assert 0.4 * slow.calls < 15  # 12 s, and a first look of six calls


class OnThreads(OnnxRuntimeExporter):
    """Keeps on how many threads it was to run what it compiles."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        self.threads.append(torch.get_num_threads())
        return super().compiled(traced, batch, on_codes)


def test_threads_that_eval_func_sets_make_no_plan_faster() -> None:
    found, before = OnThreads(), torch.get_num_threads()
    model = InstrumentedModel(Layers().eval())
    with torch.no_grad():
        ops = dict(model.record(lambda: model.model(X[:1]), 1).ops)
    latency = LatencyModel(model, found, Example.of_batch(model.model, X))
    torch.set_num_threads(before + 1)
    try:
        latency.option_ms(ops["a"], OpConfig.float())
        latency.measure()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert set(found.threads) == {before}
    assert len(found.threads) >= 2
