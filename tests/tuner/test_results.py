"""TrialRecord, OpSummary and TuningResult: derived figures, the front, tables and JSON."""

import io
import json
import logging
import math
from dataclasses import replace
from typing import Any

import optuna
import pytest

from tuner.config import TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError, TunerError
from tuner.plan import Plan
from tuner.results import OpSummary, TrialRecord, TuningResult, describe_config
from tuner.schemes import OpConfig, TensorScheme

OPS = ("conv", "fc")


def _config(weight: int | None, inputs: int | None) -> OpConfig:
    return OpConfig(
        weight=None if weight is None else TensorScheme(format=f"int{weight}"),
        inputs=None if inputs is None else TensorScheme(format=f"uint{inputs}", symmetric=False),
    )


def _record(number: int, accuracy: float | None, bops: float, **changes: Any) -> TrialRecord:
    record = TrialRecord(
        number=number,
        plan=Plan({name: OpConfig.float() if number == 0 else _config(8, 8) for name in OPS}),
        accuracy=accuracy,
        metrics={} if accuracy is None else {"top1": accuracy, "loss": 1 - accuracy},
        costs={"size_bytes": bops / 2, "bops": bops},
        meets_goal=None if accuracy is None else accuracy >= 0.89,
        state="failed" if accuracy is None else "complete",
        duration_s=1.5,
        reason=f"proposal {number}",
        error="Traceback: boom" if accuracy is None else None,
    )
    return replace(record, **changes)


BASELINE = _record(0, 0.9, 1000.0)


def _result(*trials: TrialRecord, best: TrialRecord | None = None, **changes: Any) -> TuningResult:
    arguments: dict[str, Any] = {
        "config": TuningConfig(goal=AccuracyGoal(at_least=0.89)),
        "baseline_trial": BASELINE,
        "best": best or BASELINE,
        "trials": trials,
        "stop_reason": "exhausted",
        "evaluations": len(trials) + 1,
    }
    return TuningResult(**arguments | changes)


def _formats(weight: str, inputs: str | None, **others: str) -> OpConfig:
    schemes = {"weight": weight, "inputs": inputs, **others}
    return OpConfig(**{k: TensorScheme(format=f) for k, f in schemes.items() if f is not None})


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (OpConfig.float(), "FP32"),
        (OpConfig(inputs=(None, None)), "FP32"),
        (_config(4, 8), "W4A8"),
        (_config(8, None), "W8"),
        (_config(None, 6), "A6"),
        (OpConfig(inputs=(TensorScheme(format="int8"), TensorScheme(format="uint8"))), "A8"),
        (OpConfig(inputs=(TensorScheme(format="int8"), TensorScheme(format="int4"))), "A8/A4"),
        (OpConfig(inputs=(TensorScheme(format="int8"), None)), "A8/A32"),
        (OpConfig(weight=TensorScheme(format="int2"), output=TensorScheme()), "W2O8"),
        (OpConfig(bias=TensorScheme(format="int16")), "B16"),
        (_formats("int8", "uint8", bias="int32"), "W8A8B32"),
        (OpConfig(weight=TensorScheme(reduce_range=True)), "W7"),
        (_formats("mxfp4", "mxfp8_e4m3"), "W4:mxfp4 A8:mxfp8_e4m3"),
        (_formats("int8", "e5m2"), "W8 A8:e5m2"),
        (_formats("abfp4", None), "W4:abfp4"),
        (_formats("int4", "int8", output="fp16"), "W4 A8 O16:fp16"),
        (OpConfig(inputs=(TensorScheme(format="e4m3fn"), TensorScheme())), "A8:e4m3fn/A8"),
    ],
)
def test_describe_config(config: OpConfig, label: str) -> None:
    assert describe_config(config) == label


def test_a_record_round_trips_through_strict_json() -> None:
    record = _record(
        3,
        math.nan,
        50.0,
        metrics={"a": math.inf, "b": -math.inf, "c": 0.1 + 0.2},
        scores=(0.0, 1.0, 1 / 3),
        state="stopped_early",
    )
    again = TrialRecord.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    assert again.accuracy is not None
    assert math.isnan(again.accuracy)
    assert replace(again, accuracy=0.0) == replace(record, accuracy=0.0)


def test_scores_stay_out_of_the_repr() -> None:
    assert "scores" not in repr(_record(1, 0.9, 1.0, scores=(1.0,) * 5))


@pytest.mark.parametrize(
    "change",
    [{"state": "running"}, {"plan": {"version": 2, "ops": {}}}, {"accuracy": "high"}, {"costs": 3}],
)
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SaveError, match="not a trial record"):
        TrialRecord.from_dict(_record(1, 0.9, 1.0).to_dict() | change)


def test_derived_figures() -> None:
    best = _record(1, 0.895, 62.5)
    result = _result(best, best=best)
    assert result.baseline == 0.9
    assert result.baseline_costs == {"size_bytes": 500.0, "bops": 1000.0}
    assert result.goal_met is True
    assert result.quantized_ops == 2
    assert result.cost_ratio(best) == 0.0625
    assert result.cost_ratio(best, "latency_ms") is None
    assert result.goal == AccuracyGoal(at_least=0.89)


def test_without_eval_func_nothing_is_judged() -> None:
    silent: dict[str, Any] = {"state": "complete", "error": None}
    best = _record(1, None, 62.5, **silent)
    result = _result(best, best=best, baseline_trial=_record(0, None, 1000.0, **silent))
    assert result.baseline is None
    assert result.goal_met is None
    assert result.pareto() == ()
    assert result.study().trials[0].constraints == {}
    assert "not judged" in result.summary()


def test_pareto_holds_what_no_other_record_beats() -> None:
    trials = (
        _record(1, 0.895, 100.0),
        _record(2, 0.8, 50.0),
        _record(3, 0.894, 120.0),
        _record(4, 0.895, 100.0),
        _record(5, None, 1.0),
        _record(6, 0.7, 40.0, state="stopped_early"),
        _record(7, 0.85, 50.0),
    )
    assert [record.number for record in _result(*trials).pareto()] == [7, 1, 0]


def test_pareto_agrees_with_a_comparison_of_all_pairs() -> None:
    accuracies = [((i * 37) % 101) / 101 for i in range(1, 60)]
    trials = tuple(_record(i + 1, a, 10.0 + (i * 53) % 97) for i, a in enumerate(accuracies))
    records = (BASELINE, *trials)

    def beaten(ours: TrialRecord) -> bool:
        mine = (ours.accuracy or 0.0, -ours.costs["bops"])
        others = [(other.accuracy or 0.0, -other.costs["bops"]) for other in records]
        return any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others)

    expected = {record.number for record in records if not beaten(record)}
    assert {record.number for record in _result(*trials).pareto()} == expected


def test_pareto_follows_a_goal_where_lower_is_better() -> None:
    config = TuningConfig(goal=AccuracyGoal(higher_is_better=False), objective="size")
    trials = (_record(1, 0.85, 100.0), _record(2, 0.95, 80.0), _record(3, 0.97, 90.0))
    assert [r.number for r in _result(*trials, config=config).pareto()] == [2, 1]


def test_the_dataframe_has_one_row_per_trial() -> None:
    frame = _result(_record(1, 0.895, 62.5), _record(2, None, 10.0)).to_dataframe()
    assert list(frame.columns) == [
        *("number", "state", "accuracy", "meets_goal", "size_bytes", "bops"),
        *("size_bytes_ratio", "bops_ratio", "duration_s", "reason", "error"),
        *("metrics_top1", "metrics_loss"),
    ]
    assert frame["number"].tolist() == [1, 2]
    assert frame["bops_ratio"].tolist() == [0.0625, 0.01]
    assert frame["state"].tolist() == ["complete", "failed"]
    assert frame["accuracy"].isna().tolist() == [False, True]
    assert frame["error"][1] == "Traceback: boom"


def test_the_dataframe_of_no_trials_has_its_columns() -> None:
    frame = _result().to_dataframe()
    assert len(frame) == 0
    assert {"number", "bops", "bops_ratio"} <= set(frame.columns)


def test_the_study_holds_every_trial() -> None:
    trials = (
        _record(1, 0.895, 62.5),
        _record(2, 0.8, 20.0, plan=Plan({"conv": _config(4, 8), "fc": _config(8, None)})),
        _record(3, None, 10.0),
        _record(4, 0.5, 15.0, state="stopped_early"),
        replace(_record(5, 0.5, 15.0), costs={}),  # what misses the goal is not timed
    )
    study = _result(*trials).study()
    states = optuna.trial.TrialState
    assert [t.state for t in study.trials] == [
        states.COMPLETE,
        states.COMPLETE,
        states.FAIL,
        states.PRUNED,
        states.PRUNED,
    ]
    assert [t.user_attrs["number"] for t in study.trials] == [1, 2, 3, 4, 5]
    assert study.trials[1].params == {"conv": "W4A8", "fc": "W8"}
    assert study.trials[0].values == [62.5]
    assert study.trials[0].constraints["goal"] <= 0 < study.trials[1].constraints["goal"]
    assert study.trials[0].duration is not None
    assert study.trials[0].duration.total_seconds() == pytest.approx(1.5)
    # The cheapest complete trial misses the goal: the best is the one that meets it.
    assert study.best_trial.user_attrs == {
        "number": 1,
        "accuracy": 0.895,
        "meets_goal": True,
        "reason": "proposal 1",
    }


def test_the_study_is_made_in_silence_and_optunas_verbosity_restored() -> None:
    said = io.StringIO()
    listener = logging.StreamHandler(said)
    logger = logging.getLogger("optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logger.addHandler(listener)
    try:
        _result().study()
        assert said.getvalue() == ""
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        optuna.create_study()
        assert "new study" in said.getvalue()
    finally:
        logger.removeHandler(listener)
        optuna.logging.set_verbosity(before)


def test_the_result_round_trips_through_strict_json() -> None:
    row = OpSummary("conv", "Conv2d", (8, 3, 3, 3), 216, 1e6, "W8A8", math.inf, 216.0, 6.4e7, 0.5)
    best = _record(1, 0.895, 62.5)
    result = _result(
        best,
        _record(2, None, 3.0),
        best=best,
        op_table=(row,),
        uncovered={"fft:0": 12.0},
        unreached=("aux",),
        duration_s=3.25,
        eval_s=2.0,
    )
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert TuningResult.from_dict(json.loads(text)) == result


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"stop_reason": "bored"},
        {"config": {"space": "nonsense"}},
        {"best": None},
        {"trials": [{}]},
        {"op_table": [{"name": "x"}]},
    ],
)
def test_a_damaged_result_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SaveError):
        TuningResult.from_dict(_result().to_dict() | change)


@pytest.mark.parametrize("key", sorted(_result().to_dict().keys() - {"goal_met", "quantized_ops"}))
def test_a_result_with_a_key_missing_is_refused(key: str) -> None:
    data = _result().to_dict()
    del data[key]
    with pytest.raises(TunerError, match=key):
        TuningResult.from_dict(data)


def test_the_summary_names_what_matters() -> None:
    best = _record(1, 0.895, 62.5)
    summary = _result(best, best=best, unreached=("aux.head",)).summary()
    for part in ("accuracy ≥ 0.89: met", "0.895 (FP32 0.9)", "6.25% of FP32", "2 of 2 ops"):
        assert part in summary
    assert "exhausted" in summary
    assert "aux.head" in summary
