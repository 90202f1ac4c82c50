"""What a report reads of a tuning result."""

from collections.abc import Mapping
from typing import Protocol

from tuner.config import TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.records import OpSummary, TrialRecord


class ReportSource(Protocol):
    """The part of TuningResult that a report shows."""

    @property
    def config(self) -> TuningConfig: ...
    @property
    def goal(self) -> AccuracyGoal: ...
    @property
    def goal_met(self) -> bool | None: ...
    @property
    def baseline_trial(self) -> TrialRecord: ...
    @property
    def best(self) -> TrialRecord: ...
    @property
    def trials(self) -> tuple[TrialRecord, ...]: ...
    @property
    def stop_reason(self) -> str: ...
    @property
    def quantized_ops(self) -> int: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def op_table(self) -> tuple[OpSummary, ...]: ...
    @property
    def uncovered(self) -> Mapping[str, float]: ...
    @property
    def unreached(self) -> tuple[str, ...]: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def eval_s(self) -> float: ...

    def pareto(self) -> tuple[TrialRecord, ...]:
        """Return the records that no other beats in accuracy and cost."""

    def cost_ratio(self, record: TrialRecord, cost: str | None = None) -> float | None:
        """Return a record's cost ÷ the baseline's."""
