"""Latency as the objective: ops are timed alone, whole plans beside FP32."""

import json
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.tuner.exporters.torch_nets import A8, W8, Small
from tuner import (
    AccuracyGoal,
    NothingQuantizedWarning,
    OpConfig,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import ExportError, StudyMismatchError
from tuner.example import Example
from tuner.exporters import torch_package, torch_runtime
from tuner.exporters.targets import exporter
from tuner.exporters.timing import interleaved
from tuner.exporters.tracing import trace
from tuner.latency import LatencyModel, MeasuredLatency
from tuner.model import InstrumentedModel
from tuner.op_times import OpTimes, can_measure
from tuner.ops import Op
from tuner.plan import Plan
from tuner.preparation import Prepared
from tuner.quantized_model import QuantizedModel

pytestmark = pytest.mark.usefixtures("own_times")

X = torch.randn(8, 8, 24, 24, generator=torch.Generator().manual_seed(0))
W8A8 = OpConfig(weight=W8, inputs=(A8,))


class Net(nn.Module):
    """A convolution, attention and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x)[:, :, ::3, ::3].flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.fc(mixed.mean(1))


def eval_func(model: nn.Module) -> float:
    with torch.no_grad():
        return -float(model(X).abs().mean())


def fit(goal: AccuracyGoal | None = None, **options: Any) -> QuantizedModel:
    torch.manual_seed(0)
    goal = AccuracyGoal() if goal is None else goal
    config = TuningConfig(objective="latency", target="onnxruntime", max_trials=2, goal=goal)
    with warnings.catch_warnings():
        # so small a model may be fastest in FP32, and then that is what comes back
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        return quantization.fit(Small(8).eval(), [X], config=config, **options)


def test_plans_are_measured_beside_fp32_and_none_is_slower() -> None:
    result = fit(eval_func=eval_func).result
    for record in (result.baseline_trial, *result.trials):
        low, mid, high = (record.costs[f"latency_{n}ms"] for n in ("lower_", "", "upper_"))
        assert 0 < low <= mid <= high
    assert result.best.costs["latency_ms"] <= result.baseline_costs["latency_ms"]
    meeting = [t.costs["latency_ms"] for t in result.trials if t.meets_goal]
    assert result.best.costs["latency_ms"] <= min(meeting)
    assert "of FP32), half of the calls took" in result.summary()
    assert "latency_lower_ms" not in result.summary()


def test_a_resumed_study_keeps_what_was_measured(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    once = fit(eval_func=eval_func, storage=storage, study_name="s").result
    again = fit(eval_func=eval_func, storage=storage, study_name="s").result
    assert [t.costs for t in again.trials] == [t.costs for t in once.trials]
    assert again.baseline_costs == once.baseline_costs


def test_without_eval_func_the_plan_is_measured_too() -> None:
    result = fit().result
    assert result.best.costs["latency_ms"] > 0
    assert result.baseline_costs["latency_ms"] > 0


def test_a_model_that_integers_make_slower_stays_fp32_and_is_told_why() -> None:
    config = TuningConfig(objective="latency", target="onnxruntime", max_trials=2)
    with pytest.warns(NothingQuantizedWarning, match="met the goal, but the fastest of them takes"):
        model = quantization.fit(slow_in_integers(), [X[0, 0, :8, :4]], one, config)
    assert model.result.quantized_ops == 0
    assert model.result.best.costs["latency_ms"] == model.result.baseline_costs["latency_ms"]


def slow_in_integers() -> nn.Module:
    layers = (layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.Sigmoid()))
    return nn.Sequential(*layers).eval()


def test_calibration_alone_gives_no_plan_that_is_slower() -> None:
    config = TuningConfig(objective="latency", target="onnxruntime")
    with pytest.warns(NothingQuantizedWarning, match="none is faster beyond the noise"):
        model = quantization.fit(slow_in_integers(), [X[0, 0, :8, :4]], config=config)
    (trial,) = model.result.trials
    assert trial.costs["latency_ms"] > model.result.baseline_costs["latency_ms"]
    assert model.result.quantized_ops == 0
    assert model.result.best is model.result.baseline_trial
    assert model.plan == model.result.baseline_trial.plan


@pytest.mark.parametrize(("upper", "is_returned"), [(0.95, True), (0.99, False), (1.05, False)])
def test_a_plan_within_the_noise_of_fp32_is_not_called_faster(
    upper: float, is_returned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: LatencyModel) -> MeasuredLatency:  # no clock is noisy to order
        whole = model.baseline.latency_ms
        return MeasuredLatency(0.9 * whole, 0.8 * whole, upper * whole)

    monkeypatch.setattr(LatencyModel, "measure", measure)
    result = fit(eval_func=eval_func).result
    assert any(trial.meets_goal for trial in result.trials)
    assert (result.quantized_ops > 0) is is_returned
    assert (result.best.costs["latency_ms"] < result.baseline_costs["latency_ms"]) is is_returned


class Deep(nn.Module):
    """Two convolutions and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def test_what_plans_are_measured_to_take_corrects_what_is_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def option_ms(model: LatencyModel, op: Op, config: OpConfig) -> float:
        return (0.25 if config.is_float else 0.1) * model.baseline.latency_ms

    def plan_costs(prepared: Prepared, plan: Plan, measures: bool = True) -> dict[str, float]:
        costs = prepared.costs.costs(plan).to_dict()
        if not measures:
            return costs
        assert prepared.latency is not None
        convs = sum(name.startswith("conv") for name in plan.quantized)
        layers = sum(name.startswith("fc") for name in plan.quantized)
        took = (1 - 0.15 * convs + 0.1 * layers) * prepared.latency.baseline.latency_ms
        return costs | MeasuredLatency(took, took, took).to_costs()

    monkeypatch.setattr(LatencyModel, "option_ms", option_ms)
    monkeypatch.setattr(Prepared, "plan_costs", plan_costs)
    config = TuningConfig(objective="latency", target="onnxruntime", max_trials=12)
    torch.manual_seed(0)
    found = quantization.fit(Deep().eval(), [X], lambda model: 1.0, config)
    assert set(found.plan.quantized) == {"conv1", "conv2"}
    assert found.result.evaluations < 12


def test_a_plan_that_misses_the_goal_is_not_measured_until_it_meets_one(tmp_path: Path) -> None:
    def accuracy(model: nn.Module) -> float:
        kinds = type(model.conv), type(model.fc)  # of quantized ops they are others
        return 1.0 if kinds == (nn.Conv2d, nn.Linear) else 0.9

    storage = f"sqlite:///{tmp_path}/study.db"
    options = {"eval_func": accuracy, "storage": storage, "study_name": "s"}
    strict = fit(**options).result
    assert strict.trials
    assert not any("latency_ms" in trial.costs for trial in strict.trials)
    loose = fit(goal=AccuracyGoal(max_drop=0.5), **options).result
    assert all(trial.costs["latency_ms"] > 0 for trial in loose.trials)


def test_the_prediction_is_fp32_less_what_ops_save() -> None:
    model = InstrumentedModel(Small(8).eval())
    x = X[:1]
    with torch.no_grad():
        ops = model.record(lambda: model.model(x), 1).ops
    latency = LatencyModel(model, exporter("onnxruntime"), Example.of_batch(model.model, x))
    name = next(name for name, op in ops.items() if can_measure(op))
    assert latency.predicted_ms({}) == latency.baseline.latency_ms
    assert latency.predicted_ms({name: OpConfig.float()}) == latency.baseline.latency_ms
    saved = latency.option_ms(ops[name], OpConfig.float()) - latency.option_ms(ops[name], W8A8)
    assert saved != 0
    assert latency.predicted_ms({name: W8A8}) == pytest.approx(latency.baseline.latency_ms - saved)


def test_the_ops_of_small_models_never_take_longer_than_the_model() -> None:
    linears = [nn.Linear(4, 4) for _ in range(12)]
    model = InstrumentedModel(nn.Sequential(*linears).eval())
    x = X[:1, 0, 0, :4]
    with torch.no_grad():
        ops = model.record(lambda: model.model(x), 1).ops
    latency = LatencyModel(model, exporter("onnxruntime"), Example.of_batch(model.model, x))
    floats = [latency.option_ms(op, OpConfig.float()) for op in ops.values()]
    assert sum(floats) == pytest.approx(latency.baseline.latency_ms)
    assert latency.predicted_ms(dict.fromkeys(ops, W8A8)) > 0


def test_in_pytorch_fp32_is_the_faster_of_compiled_and_op_by_op() -> None:
    layer = nn.Linear(4, 4).eval()
    example = Example.of_batch(layer, X[:1, 0, 0, :4])
    found = exporter("torch")
    package = found.compiled(trace(InstrumentedModel(layer), example))
    latency = LatencyModel(InstrumentedModel(layer), found, example)
    inputs = example.tensors
    with torch.no_grad():
        times = interleaved({"package": package, "layer": lambda: layer(*inputs)}, 200)
    slower = max(timing.median_ms for timing in times.values())
    assert latency.baseline.latency_ms < slower


def test_a_package_is_timed_as_an_export_compiles_it_for_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_with = []

    def compile_package(program: ExportedProgram, path: Path) -> None:
        compiled_with.append(torch.get_num_threads())
        torch_package.compile_package(program, path)

    monkeypatch.setattr(torch_runtime, "compile_package", compile_package)
    layer, before = nn.Linear(4, 4).eval(), torch.get_num_threads()
    example = Example.of_batch(layer, X[:1, 0, 0, :4])
    torch.set_num_threads(2)
    try:
        call = exporter("torch").compiled(trace(InstrumentedModel(layer), example))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert compiled_with == [1]
    assert isinstance(call(), tuple)


def one(model: nn.Module) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("target", "message"),
    [(None, "name it"), ("onnx", "choose onnxruntime, openvino or torch")],
)
def test_latency_wants_a_runtime(target: str | None, message: str) -> None:
    config = TuningConfig(objective="latency", target=target)
    with pytest.raises(ExportError, match=message):
        quantization.fit(Net().eval(), [X], eval_func, config)


def recorded() -> tuple[InstrumentedModel, dict[str, Any]]:
    model = InstrumentedModel(Net().eval())
    with torch.no_grad():
        return model, dict(model.record(lambda: model.model(X[:1]), 1).ops)


def test_a_signature_is_measured_once_and_kept(tmp_path: Path) -> None:
    model, ops = recorded()
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    floats = times.time_ms(model, ops["conv"], OpConfig.float())
    quantized = times.time_ms(model, ops["conv"], W8A8)
    assert 0 < floats < 100
    assert 0 < quantized < 100
    (kept,) = tmp_path.glob("*.json")
    assert sorted(json.loads(kept.read_text()).values()) == sorted((floats, quantized))
    again = OpTimes(exporter("onnxruntime"), tmp_path)
    assert again.time_ms(model, ops["conv"], W8A8) == quantized


def test_fewer_bits_take_the_time_of_one_kernel(tmp_path: Path) -> None:
    model, ops = recorded()
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    four = W8A8.model_copy(update={"inputs": (TensorScheme(format="uint4", symmetric=False),)})
    assert times.time_ms(model, ops["conv"], four) == times.time_ms(model, ops["conv"], W8A8)
    full = W8.model_copy(update={"reduce_range": False})
    weights = [full.model_copy(update={"format": f"int{bits}"}) for bits in (7, 4, 2)]
    weights.append(full.model_copy(update={"reduce_range": True}))
    narrow = [W8A8.model_copy(update={"weight": weight}) for weight in weights]
    assert len({times.time_ms(model, ops["conv"], config) for config in narrow}) == 1
    times.time_ms(model, ops["conv"], W8A8.model_copy(update={"weight": full}))
    (kept,) = tmp_path.glob("*.json")
    assert len(json.loads(kept.read_text())) == 2  # of 8 bits the sums of products may overflow


def test_other_codes_are_timed_by_themselves(tmp_path: Path) -> None:
    model, ops = recorded()
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    signed = W8A8.model_copy(update={"inputs": (TensorScheme(format="int8"),)})
    affine = W8A8.model_copy(update={"weight": W8.model_copy(update={"symmetric": False})})
    found = [times.time_ms(model, ops["fc"], config) for config in (W8A8, signed, affine)]
    (kept,) = tmp_path.glob("*.json")
    assert sorted(json.loads(kept.read_text()).values()) == sorted(found)


def test_times_of_another_version_of_the_library_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ops = recorded()
    OpTimes(exporter("onnxruntime"), tmp_path).time_ms(model, ops["fc"], W8A8)
    monkeypatch.setattr("tuner.op_times.VERSION", "another")
    OpTimes(exporter("onnxruntime"), tmp_path).time_ms(model, ops["fc"], W8A8)
    (kept,) = tmp_path.glob("*.json")
    assert len(json.loads(kept.read_text())) == 2


def test_every_kind_of_op_is_measured(tmp_path: Path) -> None:
    model, ops = recorded()
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    measured = [name for name, op in ops.items() if can_measure(op)]
    assert len(measured) == 8  # conv, fc, four projections, two products
    for name in measured:
        assert times.time_ms(model, ops[name], OpConfig.float()) > 0


def test_a_damaged_file_of_times_is_replaced(tmp_path: Path) -> None:
    model, ops = recorded()
    times = OpTimes(exporter("onnxruntime"), tmp_path)
    first = times.time_ms(model, ops["fc"], OpConfig.float())
    (kept,) = tmp_path.glob("*.json")
    kept.write_text("[1, 2")
    again = OpTimes(exporter("onnxruntime"), tmp_path)
    assert again.time_ms(model, ops["fc"], OpConfig.float()) > 0
    assert first > 0
    assert len(json.loads(kept.read_text())) == 1


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, ops = recorded()
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    OpTimes(exporter("onnxruntime"), tmp_path).time_ms(model, ops["conv"], W8A8)
    assert all(torch.equal(t, before[name]) for name, t in model.model.state_dict().items())


def test_a_study_that_was_timed_elsewhere_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    fit(eval_func=eval_func, storage=storage, study_name="s")
    monkeypatch.setattr("tuner.latency.processor", lambda: "another one")
    with pytest.raises(StudyMismatchError, match="version of runtime: 'onnxruntime-"):
        fit(eval_func=eval_func, storage=storage, study_name="s")


def test_a_baseline_that_was_never_timed_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    fit(eval_func=eval_func, storage=f"sqlite:///{file}", study_name="s")
    with sqlite3.connect(file) as database:
        (text,) = database.execute("SELECT record FROM trials WHERE number = 0").fetchone()
        record = json.loads(text)
        del record["costs"]["latency_ms"]
        database.execute("UPDATE trials SET record = ? WHERE number = 0", (json.dumps(record),))
    database.close()
    with pytest.raises(StudyMismatchError, match="without a latency_ms"):
        fit(eval_func=eval_func, storage=f"sqlite:///{file}", study_name="s")
