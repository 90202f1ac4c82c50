"""What a tuning run found: TuningResult."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import optuna
from pydantic import ValidationError

from tuner import report
from tuner.config import TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError, TunerError
from tuner.records import (
    OpSummary,
    TrialRecord,
    TrialState,
    decode_floats,
    describe_config,
    encode_floats,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OpSummary", "StopReason", "TrialRecord", "TuningResult", "describe_config"]

StopReason = Literal[
    "goal_met_and_minimal", "max_trials", "timeout", "exhausted", "cancelled", "no_eval_func"
]
_VERSION = 1
_OPTUNA_STATES: dict[TrialState, optuna.trial.TrialState] = {
    "complete": optuna.trial.TrialState.COMPLETE,
    "failed": optuna.trial.TrialState.FAIL,
    "stopped_early": optuna.trial.TrialState.PRUNED,
}


@dataclass(frozen=True)
class TuningResult:
    """All that one run found. `best` is the record of the plan that was returned.

    `trials` holds the records from number 1 on, `baseline_trial` is number 0. `evaluations` counts
    the calls of `eval_func` that the result rests on, the baseline's included. `uncovered` maps
    calls that cannot be quantized to their MACs; `unreached` names ops that no calibration batch
    reached. `eval_s` of the `duration_s` seconds were spent in `eval_func`.
    """

    config: TuningConfig
    baseline_trial: TrialRecord
    best: TrialRecord
    trials: tuple[TrialRecord, ...]
    stop_reason: StopReason
    evaluations: int
    op_table: tuple[OpSummary, ...] = ()
    uncovered: Mapping[str, float] = field(default_factory=dict, hash=False)
    unreached: tuple[str, ...] = ()
    duration_s: float = 0.0
    eval_s: float = 0.0

    @property
    def goal(self) -> AccuracyGoal:
        """The goal that the trials were judged by."""
        return self.config.goal

    @property
    def baseline(self) -> float | None:
        """The accuracy of the FP32 model; None without `eval_func`."""
        return self.baseline_trial.accuracy

    @property
    def baseline_costs(self) -> Mapping[str, float]:
        """The costs of the FP32 model."""
        return self.baseline_trial.costs

    @property
    def goal_met(self) -> bool | None:
        """Whether what was returned meets the goal; None without `eval_func`."""
        return self.best.meets_goal

    @property
    def quantized_ops(self) -> int:
        """How many ops the returned plan quantizes."""
        return len(self.best.plan.quantized)

    def cost_ratio(self, record: TrialRecord, cost: str | None = None) -> float | None:
        """Return a record's cost (by default the objective's) ÷ the baseline's, if both exist."""
        name = cost or self.config.cost_name
        ours, theirs = record.costs.get(name), self.baseline_costs.get(name)
        return ours / theirs if ours is not None and theirs else None

    def pareto(self) -> tuple[TrialRecord, ...]:
        """Return the records, the baseline included, that no other beats in accuracy and cost.

        They are ordered by the objective's cost; of records that are equal in both the first stays.
        """
        front: list[TrialRecord] = []
        for record in sorted(self._evaluated(), key=self._pareto_key):
            if not front or self.goal.better(_accuracy(record), _accuracy(front[-1])):
                front.append(record)
        return tuple(front)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return one row per trial, with its costs, their ratios to FP32 and its metrics."""
        import pandas as pd  # pandas takes half a second to import

        costs = list(
            dict.fromkeys((*self.baseline_costs, *(c for t in self.trials for c in t.costs)))
        )
        metrics = list(dict.fromkeys(m for t in self.trials for m in t.metrics))
        columns: dict[str, list[Any]] = {
            name: [getattr(trial, name) for trial in self.trials]
            for name in ("number", "state", "accuracy", "meets_goal")
        }
        columns |= {c: [trial.costs.get(c) for trial in self.trials] for c in costs}
        columns |= {f"{c}_ratio": [self.cost_ratio(t, c) for t in self.trials] for c in costs}
        columns |= {
            name: [getattr(trial, name) for trial in self.trials]
            for name in ("duration_s", "reason", "error")
        }
        columns |= {f"metrics_{m}": [t.metrics.get(m) for t in self.trials] for m in metrics}
        return pd.DataFrame(columns)

    def study(self) -> optuna.Study:
        """Return an in-memory Optuna study of the trials: params are the ops' labels.

        The value is the objective's cost, the constraint `goal` how far the goal is missed, so that
        `best_trial` is the cheapest that meets it. Failed trials are FAIL, those that were not
        measured PRUNED (plans that miss the goal are not timed). The user attribute `number` is the
        record's.
        """
        choices = self._choices_seen()
        with _optuna_silent():
            study = optuna.create_study(direction="minimize")
        for record in self.trials:
            study.add_trial(self._frozen_trial(record, choices))
        return study

    def report(self, path: str | Path) -> Path:
        """Write a self-contained HTML report to `path`; raises SaveError where it cannot."""
        return report.write(self, path)

    def summary(self) -> str:
        """Return the result in a few lines of text."""
        lines = [
            f"goal      {self.goal.describe(self.baseline)}: {_MET[self.goal_met]}",
            f"accuracy  {_number(self.best.accuracy)} (FP32 {_number(self.baseline)})",
        ]
        lines += [self._cost_line(name) for name in self.best.costs if name not in _SPREAD]
        lines.append(
            f"plan      trial {self.best.number}, {self.quantized_ops} of {len(self.best.plan)} "
            "ops quantized"
        )
        lines.append(
            f"search    {self.evaluations} evaluations in {self.duration_s:.1f} s "
            f"({self.eval_s:.1f} s in eval_func), stopped: {self.stop_reason}"
        )
        if self.unreached:
            lines.append(f"unreached {', '.join(self.unreached)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON that holds the whole result."""
        return {
            "version": _VERSION,
            "config": self.config.model_dump(mode="json"),
            "baseline_trial": self.baseline_trial.to_dict(),
            "best": self.best.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "goal_met": self.goal_met,
            "quantized_ops": self.quantized_ops,
            "stop_reason": self.stop_reason,
            "evaluations": self.evaluations,
            "op_table": [op.to_dict() for op in self.op_table],
            "uncovered": encode_floats(self.uncovered),
            "unreached": list(self.unreached),
            "duration_s": self.duration_s,
            "eval_s": self.eval_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TuningResult":
        """Read what `to_dict` wrote; raises SaveError on anything else."""
        try:
            if data["version"] != _VERSION:
                raise SaveError(f"result version {data['version']!r}: this tuner reads {_VERSION}")
            if data["stop_reason"] not in get_args(StopReason):
                raise SaveError(f"unknown stop_reason {data['stop_reason']!r}")
            return cls(
                config=TuningConfig.model_validate(data["config"]),
                baseline_trial=TrialRecord.from_dict(data["baseline_trial"]),
                best=TrialRecord.from_dict(data["best"]),
                trials=tuple(TrialRecord.from_dict(trial) for trial in data["trials"]),
                stop_reason=cast(StopReason, data["stop_reason"]),
                evaluations=int(data["evaluations"]),
                op_table=tuple(OpSummary.from_dict(op) for op in data["op_table"]),
                uncovered=decode_floats(data["uncovered"]),
                unreached=tuple(data["unreached"]),
                duration_s=float(data["duration_s"]),
                eval_s=float(data["eval_s"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise SaveError(f"not a tuning result ({type(error).__name__}: {error})") from error

    def _evaluated(self) -> Iterator[TrialRecord]:
        for record in (self.baseline_trial, *self.trials):
            if (
                record.state == "complete"
                and record.accuracy is not None
                and self.config.cost_name in record.costs
            ):
                yield record

    def _cost_line(self, name: str) -> str:
        costs, ratio = self.best.costs, self.cost_ratio(self.best, name)
        share = "" if ratio is None else f" ({ratio:.2%} of FP32)"
        spread = ""
        if name == "latency_ms" and all(edge in costs for edge in _SPREAD):
            lower, upper = (f"{costs[edge]:.3g}" for edge in _SPREAD)
            spread = f", half of the calls took {lower} to {upper}"
        return f"{name:<9} {costs[name]:.5g}{share}{spread}"

    def _pareto_key(self, record: TrialRecord) -> tuple[float, float, int]:
        accuracy = _accuracy(record)
        worse = -accuracy if self.goal.prefers_higher else accuracy
        return record.costs[self.config.cost_name], worse, record.number

    def _choices_seen(self) -> dict[str, optuna.distributions.CategoricalDistribution]:
        labels: dict[str, dict[str, None]] = {}
        for trial in self.trials:
            for name, config in trial.plan.items():
                labels.setdefault(name, {})[describe_config(config)] = None
        return {
            name: optuna.distributions.CategoricalDistribution(tuple(seen))
            for name, seen in labels.items()
        }

    def _frozen_trial(
        self,
        record: TrialRecord,
        choices: Mapping[str, optuna.distributions.CategoricalDistribution],
    ) -> optuna.trial.FrozenTrial:
        attributes = {
            "number": record.number,
            "accuracy": record.accuracy,
            "meets_goal": record.meets_goal,
            "reason": record.reason,
        }
        cost = record.costs.get(self.config.cost_name)
        is_whole = record.state != "complete" or cost is not None
        trial = optuna.trial.create_trial(
            state=_OPTUNA_STATES[record.state if is_whole else "stopped_early"],
            value=cost if record.state == "complete" else None,
            params={name: describe_config(config) for name, config in record.plan.items()},
            distributions={name: choices[name] for name in record.plan},
            user_attrs=attributes,
            constraints=self._constraints(record),
        )
        ended = datetime.now()
        trial.datetime_start = ended - timedelta(seconds=record.duration_s)
        trial.datetime_complete = ended
        return trial

    def _constraints(self, record: TrialRecord) -> dict[str, float] | None:
        if record.accuracy is None or self.baseline is None:
            return None
        return {"goal": self.goal.violation(record.accuracy, self.baseline)}


_SPREAD = ("latency_lower_ms", "latency_upper_ms")
_MET = {True: "met", False: "missed", None: "not judged"}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _accuracy(record: TrialRecord) -> float:
    if record.accuracy is None:
        raise TunerError(f"trial {record.number} has no accuracy")
    return record.accuracy


@contextmanager
def _optuna_silent() -> Iterator[None]:
    """Keep Optuna from announcing a study on stderr."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
