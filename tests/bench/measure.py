"""One benchmark run: tune one model in one space with one strategy, and keep the figures."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import machine
from scipy.stats import spearmanr

from tuner import NothingQuantizedWarning, TrialRecord, TuningConfig, TuningResult, quantization
from tuner.isolation import copied
from tuner.preparation import Preparation
from tuner.progress import Progress
from tuner.recipes import Task
from tuner.schemes import OpConfig

_FLOAT_BOPS_PER_MAC = 32 * 32
_COUNTED_TYPES = ("Linear", "Conv2d")

Damages = Mapping[str, Mapping[OpConfig, float]]


@dataclass(frozen=True)
class Run:
    """The figures of one run; ratios are to FP32.

    `bops_ratio` counts every MAC of the model, `layer_bops_ratio` those of Linear and Conv2d only.
    Evaluations do not count the baseline's: `first_pass` is the number of the first trial that met
    the goal, `best_trial` of the one that was returned. `outside_s` is the time of `fit` that was
    not spent in `eval_func`. `damage_correlation` is Spearman's ρ between the predicted damage and
    the measured accuracy drop of the trials.
    """

    model: str
    task: str
    metric: str
    space: str
    repairs: list[str]
    strategy: str
    max_trials: int
    max_drop: float
    seed: int
    baseline: float
    accuracy: float
    goal_met: bool
    stop_reason: str
    evaluations: int
    first_pass: int | None
    best_trial: int
    quantized_ops: int
    ops: int
    bops_ratio: float
    layer_bops_ratio: float
    size_ratio: float
    wall_s: float
    outside_s: float
    baseline_eval_s: float
    damage_correlation: float | None
    trials: list[dict[str, Any]]
    machine: dict[str, Any]
    measured_at: str

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of JSON."""
        return asdict(self)


def run(name: str, task: Task, config: TuningConfig) -> Run:
    """Tune the task's model once and return the figures."""
    surroundings = machine.describe()
    baseline_eval_s = _evaluation_s(task)
    damages = _predicted_damages(task, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        model = quantization.fit(
            task.model, task.calib_dataloader, task.eval_func, config, progress=False
        )
    result = model.result
    assert result.baseline is not None
    assert result.best.accuracy is not None
    passes = [trial.number for trial in result.trials if trial.meets_goal]
    return Run(
        model=name,
        task=task.description,
        metric=task.metric,
        space=config.search_space.preset,
        repairs=list(config.search_space.repairs),
        strategy=config.strategy,
        max_trials=config.max_trials,
        max_drop=config.goal.max_drop,
        seed=config.seed,
        baseline=result.baseline,
        accuracy=result.best.accuracy,
        goal_met=bool(result.goal_met),
        stop_reason=result.stop_reason,
        evaluations=result.evaluations - 1,
        first_pass=min(passes, default=None),
        best_trial=result.best.number,
        quantized_ops=result.quantized_ops,
        ops=len(result.best.plan),
        bops_ratio=result.cost_ratio(result.best, "bops") or 0.0,
        layer_bops_ratio=_layer_bops_ratio(result),
        size_ratio=result.cost_ratio(result.best, "size_bytes") or 0.0,
        wall_s=result.duration_s,
        outside_s=result.duration_s - result.eval_s,
        baseline_eval_s=baseline_eval_s,
        damage_correlation=_correlation(result, damages),
        trials=[_trial(trial, result, damages) for trial in result.trials],
        machine=surroundings,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _evaluation_s(task: Task) -> float:
    """Return the seconds of one FP32 evaluation, the better of two."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        task.eval_func(task.model)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _predicted_damages(task: Task, config: TuningConfig) -> Damages:
    """Return op → configuration → predicted damage, as `fit` will compute them."""
    preparation = Preparation(copied(task.model), task.calib_dataloader, None, config)
    preparation.record()
    with Progress(False, config.cost_name) as silent:
        return preparation.finish(silent).damages


def _damage(trial: TrialRecord, damages: Damages) -> float:
    return sum(damages.get(op, {}).get(choice, 0.0) for op, choice in trial.plan.items())


def _correlation(result: TuningResult, damages: Damages) -> float | None:
    complete = [trial for trial in result.trials if trial.accuracy is not None]
    predicted = [_damage(trial, damages) for trial in complete]
    accuracy: Sequence[float] = [trial.accuracy for trial in complete if trial.accuracy is not None]
    if len(set(predicted)) < 3 or len(set(accuracy)) < 3:
        return None
    rho = float(spearmanr(predicted, accuracy).statistic)
    return rho if result.goal.prefers_higher is False else -rho


def _layer_bops_ratio(result: TuningResult) -> float:
    rows = [row for row in result.op_table if row.type in _COUNTED_TYPES]
    return sum(row.bops for row in rows) / sum(row.macs * _FLOAT_BOPS_PER_MAC for row in rows)


def _trial(trial: TrialRecord, result: TuningResult, damages: Damages) -> dict[str, Any]:
    return {
        "number": trial.number,
        "accuracy": trial.accuracy,
        "meets_goal": trial.meets_goal,
        "bops_ratio": result.cost_ratio(trial, "bops"),
        "predicted_damage": _damage(trial, damages),
        "duration_s": round(trial.duration_s, 4),
        "reason": trial.reason,
    }
