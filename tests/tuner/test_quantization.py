"""fit(), by the contract."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import Branching, ConvNet, Tied, inputs_for, seeded
from tuner import (
    AccuracyGoal,
    CalibrationWarning,
    NothingQuantizedWarning,
    OpConfig,
    QuantizedModel,
    Rule,
    SearchSpace,
    TrialRecord,
    TunerError,
    TuningCancelled,
    TuningConfig,
    quantization,
)
from tuner.errors import DataError, EvaluationError, ModelError, SpaceError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore::tuner.NothingQuantizedWarning")

INT8 = TuningConfig()
MIXED = TuningConfig(space="mixed-int", max_trials=6)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


def agreement(net: nn.Module) -> Any:
    """Return an eval_func: how often the class is the one that FP32 says."""
    with torch.no_grad():
        labels = net(X).argmax(-1)

    def eval_func(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(X).argmax(-1) == labels).float().mean())

    return eval_func


def fit(net: nn.Module, **options: Any) -> QuantizedModel:
    options.setdefault("eval_func", agreement(net))
    options.setdefault("config", INT8)
    return quantization.fit(net, options.pop("loader", [X]), options.pop("eval_func"), **options)


# ---------------------------------------------------------------- results


def test_what_is_returned_was_evaluated_and_meets_the_goal(net: nn.Module) -> None:
    eval_func = agreement(net)
    model = fit(net, eval_func=eval_func, config=MIXED)
    result = model.result
    assert result.goal_met
    assert eval_func(model.model) == result.best.accuracy
    assert result.best.accuracy >= 0.99 * result.baseline
    assert [t.number for t in result.trials] == list(range(1, len(result.trials) + 1))
    assert result.best in result.trials
    assert result.evaluations == 1 + len(result.trials)
    assert result.best.costs["bops"] < result.baseline_costs["bops"]
    assert model.plan == result.best.plan
    assert set(model.plan) == {"0", "2"}


def test_int8_takes_one_trial(net: nn.Module) -> None:
    result = fit(net).result
    assert (result.stop_reason, len(result.trials)) == ("goal_met_and_minimal", 1)
    assert result.quantized_ops == 2
    ratio = result.best.costs["bops"] / result.baseline_costs["bops"]
    assert ratio == 1 / 16


def test_nothing_met_the_goal_but_fp32(net: nn.Module) -> None:
    calls = iter([1.0] + [0.5] * 99)
    with pytest.warns(NothingQuantizedWarning, match="cost most: 0"):
        model = fit(net, eval_func=lambda m: next(calls), config=MIXED)
    result = model.result
    assert result.goal_met is True
    assert result.quantized_ops == 0
    assert result.best.number == 0
    assert result.best.accuracy == result.baseline == 1.0
    assert set(model.plan) == {"0", "2"}
    with torch.no_grad():
        assert torch.allclose(model(X), net(X))


def test_a_goal_that_fp32_misses_is_said_to_be_missed(net: nn.Module) -> None:
    config = TuningConfig(goal=AccuracyGoal(at_least=2.0))
    result = fit(net, config=config).result
    assert result.goal_met is False
    assert result.best is not None


@pytest.mark.parametrize(
    ("goal", "scores", "met"),
    [
        (AccuracyGoal(higher_is_better=False), [2.0, 2.01], True),
        (AccuracyGoal(higher_is_better=False), [2.0, 2.1], False),
        (AccuracyGoal(), [-1.0, -1.005], True),
        (AccuracyGoal(), [-1.0, -1.02], False),
        (AccuracyGoal(), [0.0, 0.0], True),
        (AccuracyGoal(), [0.0, -0.001], False),
        (AccuracyGoal(max_drop=0.1, relative=False), [0.5, 0.41], True),
        (AccuracyGoal(at_most=3.0), [2.0, 2.9], True),
    ],
)
def test_goals_of_every_sign(
    net: nn.Module, goal: AccuracyGoal, scores: list[float], met: bool
) -> None:
    calls = iter([scores[0]] + [scores[1]] * 99)
    config = TuningConfig(goal=goal, max_trials=1)
    result = fit(net, eval_func=lambda m: next(calls), config=config).result
    assert result.trials[0].meets_goal is met
    assert (result.best.number == 1) is met


def test_metrics_and_per_sample_scores(net: nn.Module) -> None:
    eval_func = agreement(net)
    config = TuningConfig(goal=AccuracyGoal(metric="acc"))
    best = fit(net, eval_func=lambda m: {"acc": eval_func(m), "size": 3}, config=config).result.best
    assert best.metrics == {"acc": best.accuracy, "size": 3.0}
    labels = net(X).argmax(-1)
    best = fit(net, eval_func=lambda m: m(X).argmax(-1) == labels).result.best
    assert best.scores is not None
    assert len(best.scores) == 64
    assert best.accuracy == pytest.approx(np.mean(best.scores))


def test_without_eval_func(net: nn.Module) -> None:
    result = quantization.fit(net, [X]).result
    assert result.stop_reason == "no_eval_func"
    assert result.baseline is None
    assert result.goal_met is None
    assert result.evaluations == 0
    assert result.quantized_ops == 2


@pytest.mark.parametrize("strategy", ["auto", "basic", "random", "tpe"])
@pytest.mark.parametrize("objective", ["bops", "size"])
def test_every_strategy_and_objective(net: nn.Module, strategy: str, objective: str) -> None:
    config = TuningConfig(space="mixed-int", strategy=strategy, objective=objective, max_trials=8)
    result = fit(net, config=config).result
    assert result.goal_met
    assert len({t.plan for t in result.trials}) == len(result.trials)
    again = fit(net, config=config).result
    assert [t.plan for t in again.trials] == [t.plan for t in result.trials]


def test_what_is_proposed_does_not_depend_on_the_budget(net: nn.Module) -> None:
    short, long = (
        fit(net, config=MIXED.model_copy(update={"max_trials": n})).result.trials for n in (3, 6)
    )
    assert [t.plan for t in short] == [t.plan for t in long[: len(short)]]


def test_rules_reach_the_plan(net: nn.Module) -> None:
    space = SearchSpace(preset="int8", rules=[Rule(names=["2"], options=[OpConfig.float()])])
    model = fit(net, config=TuningConfig(space=space))
    assert model.plan["2"].is_float
    assert not model.plan["0"].is_float


def test_print_shows_schemes_and_scales(net: nn.Module) -> None:
    text = str(fit(net).model)
    assert text.count("weight int8 per-channel") == 2
    assert text.count("input 0 uint8 per-tensor") == 2
    assert text.count("scale") == 4


def test_ops_that_eval_func_never_runs_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = seeded(Branching)
    x = inputs_for(net, 16).clamp(max=1)
    quantization.fit(net, [x], lambda m: m.parts["shared"](x).detach().sum() * 0 + 1)
    assert "never ran 1 quantized ops" in caplog.text
    assert "parts.other" in caplog.text


def test_ops_reached_by_later_batches_only_are_quantized() -> None:
    net = seeded(Branching)
    first = inputs_for(net, 16).clamp(max=1)
    second = first + 3 - first[:1, :1]
    model = quantization.fit(net, [first, second], lambda m: 1.0)
    assert not model.plan["parts.shared"].is_float
    result = quantization.fit(net, [first], lambda m: 1.0).result
    assert result.unreached == ("never",)


# ---------------------------------------------------------------- the user's model


def test_the_users_model_is_never_changed(net: nn.Module) -> None:
    net.train()
    net[0].weight.requires_grad_(False)
    fired: list[int] = []
    net.register_forward_hook(lambda *_: fired.append(1))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)

    def eval_func(model: nn.Module) -> float:
        torch.rand(7), np.random.rand(7), random.random()
        model(X)
        assert not model.training
        return 1.0

    def broken(model: nn.Module) -> float:
        eval_func(model)
        raise KeyboardInterrupt

    fit(net, eval_func=eval_func)
    with pytest.raises(KeyboardInterrupt):
        fit(net, eval_func=broken)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert type(net[0]) is nn.Linear
    assert len(net._forward_hooks) == 1


def test_eval_func_gets_the_users_own_class() -> None:
    class Mine(Tied):
        kind = "mine"

        def complete(self, tokens: Tensor) -> Tensor:
            return self(tokens).logits.argmax(-1)  # type: ignore[no-any-return]

    net = seeded(Mine)
    x = torch.randint(0, 20, (16, 9))
    labels = net.complete(x)

    def eval_func(model: nn.Module) -> Tensor:
        assert isinstance(model, Mine)
        assert model.kind == "mine"
        return (model.complete(x) == labels).float().mean()

    model = quantization.fit(net, [x], eval_func, MIXED)
    assert isinstance(model.model, Mine)
    assert model.model.head.weight is model.model.embed.weight


# ---------------------------------------------------------------- calibration data


@pytest.mark.parametrize(
    "loader",
    [
        [X],
        [(X, torch.zeros(64))],
        [[X, torch.zeros(64)]],
        [{"input": X}],
        [({"input": X}, torch.zeros(64))],
        iter([X, X]),
        (x for x in (X[:32], X[32:])),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X), batch_size=16),
    ],
)
def test_kinds_of_batches(net: nn.Module, loader: Any) -> None:
    assert fit(net, loader=loader).result.goal_met


def test_two_positional_inputs_and_a_label() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.linear(a + b)  # type: ignore[no-any-return]

    model = quantization.fit(Two(), [(X, X, torch.zeros(64))])
    assert model.result.quantized_ops == 1
    model = quantization.fit(Two(), [X], forward=lambda m, batch: m(batch, batch))
    assert model.result.quantized_ops == 1


def test_calib_samples_bounds_what_is_read(net: nn.Module) -> None:
    read: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i in range(10):
            read.append(i)
            yield X

    fit(net, loader=batches(), config=TuningConfig(calib_samples=100))
    assert read == [0, 1]


def test_nonfinite_calibration_values_are_left_out_and_said(net: nn.Module) -> None:
    bad = X.clone()
    bad[0, 0], bad[1, 1] = float("nan"), float("inf")
    with pytest.warns(CalibrationWarning, match="2 non-finite"):
        model = quantization.fit(nn.Sequential(net[0]), [bad])
    with torch.no_grad():
        assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (X, "single Tensor"),
        (None, "NoneType"),
        ([torch.randn(4, 9)], r"refused calibration batch 0 .*\[4, 9\]"),
        ([X, "text"], "refused calibration batch 1"),
        ([torch.empty(0, 8)], "without elements"),
        ([()], "empty batch"),
        ([torch.full((4, 8), float("nan"))], "no finite value"),
    ],
)
@pytest.mark.filterwarnings("ignore::tuner.CalibrationWarning")
def test_bad_loaders(net: nn.Module, loader: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        quantization.fit(net, loader)


# ---------------------------------------------------------------- bad models and evaluations


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("net", ModelError),
        (nn.ReLU(), SpaceError),
        (nn.Linear(8, 4, device="meta"), ModelError),
    ],
)
def test_bad_models(model: Any, error: type[TunerError]) -> None:
    with pytest.raises(error):
        quantization.fit(model, [X], lambda m: 1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module_is_refused(net: nn.Module) -> None:
    with pytest.raises(ModelError, match="ScriptModule"):
        quantization.fit(torch.jit.script(net), [X])


@pytest.mark.parametrize("value", [None, "0.9", float("nan"), 1j, float("inf"), True, object()])
def test_bad_scores_of_the_baseline(net: nn.Module, value: Any) -> None:
    with pytest.raises(EvaluationError, match="eval_func returned"):
        fit(net, eval_func=lambda m: value)


def test_an_exception_on_the_baseline_is_raised_as_it_is(net: nn.Module) -> None:
    error = ValueError("mine")

    def eval_func(model: nn.Module) -> float:
        raise error

    with pytest.raises(ValueError, match="mine") as caught:
        fit(net, eval_func=eval_func)
    assert caught.value is error


def test_failed_trials_are_kept_and_the_search_goes_on(net: nn.Module) -> None:
    answers = iter([1.0, "raise", float("nan"), 1.0, 1.0, 1.0, 1.0])

    def eval_func(model: nn.Module) -> Any:
        answer = next(answers)
        if answer == "raise":
            raise RuntimeError("lost the disk")
        return answer

    result = fit(net, eval_func=eval_func, config=MIXED).result
    first, second, third = result.trials[:3]
    assert (first.state, second.state, third.state) == ("failed", "failed", "complete")
    assert "lost the disk" in (first.error or "")
    assert "finite" in (second.error or "")
    assert first.accuracy is None
    assert result.goal_met


def test_odd_texts_of_eval_func_can_be_stored_everywhere(net: nn.Module, tmp_path: Path) -> None:
    calls = iter(range(99))

    def eval_func(model: nn.Module) -> dict[str, float]:
        if next(calls) == 1:
            raise OSError("a file of the name \0 \udcff")
        return {"right": 1.0, "\0 \udcff": 2.0}

    goal = AccuracyGoal(metric="right")
    q_model = fit(net, eval_func=eval_func, config=MIXED.model_copy(update={"goal": goal}))
    failed, passed = q_model.result.trials[:2]
    assert "OSError: a file of the name  ?" in (failed.error or "")
    assert passed.metrics == {"right": 1.0, " ?": 2.0}
    q_model.save(tmp_path)
    q_model.result.report(tmp_path / "report.html")


def test_three_failures_in_a_row_end_it_with_the_first_traceback(net: nn.Module) -> None:
    calls = iter(range(99))

    def eval_func(model: nn.Module) -> float:
        number = next(calls)
        if number:
            raise RuntimeError(f"failure {number}")
        return 1.0

    with pytest.raises(EvaluationError, match="failure 1"):
        fit(net, eval_func=eval_func, config=MIXED)


def test_a_search_of_one_trial_that_fails_raises_too(net: nn.Module) -> None:
    calls = iter([1.0])
    with pytest.raises(EvaluationError, match="StopIteration"):
        fit(net, eval_func=lambda m: next(calls))


# ---------------------------------------------------------------- stopping


def test_keyboard_interrupt_carries_the_partial_result(net: nn.Module) -> None:
    calls = iter(range(99))

    def eval_func(model: nn.Module) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(net, eval_func=eval_func, config=MIXED.model_copy(update={"strategy": "random"}))
    partial = caught.value.tuning_result  # type: ignore[attr-defined]
    assert len(partial.trials) == 2
    assert partial.best.number > 0


def test_keyboard_interrupt_before_the_search_carries_none(net: nn.Module) -> None:
    def batches() -> Iterator[Tensor]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt) as caught:
        quantization.fit(net, batches(), lambda model: 1.0)
    assert caught.value.tuning_result is None  # type: ignore[attr-defined]


def test_callbacks_see_every_trial_and_may_cancel(net: nn.Module) -> None:
    seen: list[TrialRecord] = []

    def cancel(record: TrialRecord) -> None:
        if record.number == 2:
            raise TuningCancelled("enough")

    config = MIXED.model_copy(update={"strategy": "random"})
    result = fit(net, config=config, callbacks=[seen.append, cancel]).result
    assert result.stop_reason == "cancelled"
    assert tuple(seen) == result.trials
    assert len(seen) == 2


def test_budgets(net: nn.Module) -> None:
    config = TuningConfig(space="mixed-int", strategy="tpe", max_trials=2)
    assert fit(net, config=config).result.stop_reason == "max_trials"
    config = TuningConfig(space="mixed-int", strategy="tpe", timeout_s=1e-9)
    with pytest.warns(NothingQuantizedWarning):
        result = fit(net, config=config).result
    assert result.stop_reason == "timeout"
    assert result.trials == ()


def test_exhausted(net: nn.Module) -> None:
    config = TuningConfig(strategy="random")
    result = fit(net, config=config).result
    assert result.stop_reason == "exhausted"
    assert len(result.trials) == 3


# ---------------------------------------------------------------- storage


def test_resume_runs_no_evaluation_twice_and_ends_alike(net: nn.Module, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/tuning.db"
    eval_func, calls = agreement(net), []

    def counted(model: nn.Module) -> float:
        calls.append(1)
        return eval_func(model)  # type: ignore[no-any-return]

    whole = fit(net, config=MIXED).result
    part = MIXED.model_copy(update={"max_trials": 2})
    fit(net, eval_func=counted, config=part, storage=storage, study_name="s")
    resumed = fit(net, eval_func=counted, config=MIXED, storage=storage, study_name="s").result
    assert len(calls) == whole.evaluations == resumed.evaluations
    assert [t.plan for t in resumed.trials] == [t.plan for t in whole.trials]
    assert resumed.best.plan == whole.best.plan


def test_a_new_goal_judges_stored_trials_anew(net: nn.Module, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/tuning.db"
    first = fit(net, config=MIXED, storage=storage, study_name="s").result
    strict = MIXED.model_copy(update={"goal": AccuracyGoal(max_drop=0.0)})
    second = fit(net, config=strict, storage=storage, study_name="s").result
    for record in second.trials[: len(first.trials)]:
        assert record.meets_goal == (record.accuracy == second.baseline)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"strategy": "tpe"}, "strategy: 'auto' -> 'tpe'"),
        ({"space": "int8"}, "space: 'mixed-int"),
        ({"objective": "size"}, "space: .*for bops.*for size"),
    ],
)
def test_another_study_is_not_resumed(
    net: nn.Module, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    storage = f"sqlite:///{tmp_path}/tuning.db"
    config = MIXED.model_copy(update={"max_trials": 1})
    fit(net, config=config, storage=storage, study_name="s")
    with pytest.raises(StorageError, match=says):
        fit(net, config=config.model_copy(update=changes), storage=storage, study_name="s")


def test_another_model_is_not_resumed(net: nn.Module, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/tuning.db"
    fit(net, storage=storage, study_name="s")
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    with pytest.raises(StorageError, match="model: 'Sequential"):
        fit(net, storage=storage, study_name="s")


# ---------------------------------------------------------------- what later versions bring


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_func": "an epoch"}, "train_func"),
        ({"executor": object()}, "executor"),
        ({"config": TuningConfig(objective="latency")}, "latency"),
        ({"config": TuningConfig(target="onyx")}, "target"),
        ({"config": TuningConfig(goal=AccuracyGoal(confidence=0.95))}, "confidence"),
        ({"config": {"space": "int8"}}, "TuningConfig"),
        ({"eval_func": 3}, "eval_func"),
        ({"forward": 3}, "forward"),
    ],
)
def test_refused_clearly(net: nn.Module, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TunerError, match=says):
        fit(net, **options)


def test_quiet_unless_asked(net: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    fit(net, progress=False)
    fit(net)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_conv_net_with_batch_norm_keeps_its_outputs_in_float() -> None:
    net = seeded(ConvNet)
    space = SearchSpace(preset="int8", rules=[Rule(options=[OpConfig.float()])])
    x = inputs_for(net)
    with pytest.warns(NothingQuantizedWarning):
        model = quantization.fit(net, [x], lambda m: 1.0, TuningConfig(space=space))
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), atol=1e-5)
