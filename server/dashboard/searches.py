"""Searches as the pages show them: the trials of one study without their plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from sqlalchemy import select

from server.dashboard.plans import Ops, ops_of
from server.db import Database
from server.db.models import EventRow, JobRow, OpRow
from tuner.config import TuningConfig
from tuner.plan import Plan
from tuner.records import OpSummary, TrialRecord, TrialState, decode_floats
from tuner.results import TuningResult
from tuner.storage import StudyRow, TrialRow

_NO_PLAN = Plan({})
_PARTS = ("accuracy", "metrics", "costs", "meets_goal", "duration_s", "reason", "error")
_DRAWN = 1000


@dataclass(frozen=True)
class Search:
    """What a search has found so far. The records' plans are left out: they are large."""

    config: TuningConfig
    baseline: TrialRecord | None
    trials: tuple[TrialRecord, ...]
    final: int | None = None
    """The number of the trial that was returned, once there is one."""

    @cached_property
    def best(self) -> TrialRecord | None:
        """What was returned, else what would be now: the cheapest that meets the goal."""
        by_number = {record.number: record for record in self._all}
        if self.final is not None:
            return by_number.get(self.final)
        number = list(self.bests().values())[-1:] or [0]
        return by_number.get(number[0])

    def bests(self) -> dict[int, int]:
        """Return trial → the best trial once it had ended; number 0 is FP32."""
        found, best, lowest = {}, 0, float("inf")
        if self.baseline is not None:
            lowest = self.baseline.costs.get(self.config.cost_name, lowest)
        for record in self.trials:
            cost = record.costs.get(self.config.cost_name)
            if record.meets_goal and cost is not None and cost < lowest:
                best, lowest = record.number, cost
            found[record.number] = best
        return found

    def cost_ratio(self, record: TrialRecord | None, cost: str | None = None) -> float | None:
        """Return a record's cost (by default the objective's) ÷ FP32's."""
        if record is None or self.baseline is None:
            return None
        name = cost or self.config.cost_name
        ours, theirs = record.costs.get(name), self.baseline.costs.get(name)
        return ours / theirs if ours is not None and theirs else None

    def source(self) -> TuningResult | None:
        """Return what tuner.report draws; of very many trials a thinned-out selection."""
        if self.baseline is None or self.best is None:
            return None
        whole = TuningResult(
            config=self.config,
            baseline_trial=self.baseline,
            best=self.best,
            trials=self.trials,
            stop_reason="exhausted",  # not drawn
            evaluations=len(self.trials) + 1,
        )
        if len(self.trials) <= _DRAWN:
            return whole
        kept = {record.number for record in (*whole.pareto(), self.best)}
        every = -(-len(self.trials) // _DRAWN)
        drawn = [t for i, t in enumerate(self.trials) if i % every == 0 or t.number in kept]
        return TuningResult(
            self.config, self.baseline, self.best, tuple(drawn), "exhausted", len(drawn)
        )

    @property
    def is_thinned(self) -> bool:
        """Whether not all trials are drawn."""
        return len(self.trials) > _DRAWN

    @property
    def _all(self) -> tuple[TrialRecord, ...]:
        return self.trials if self.baseline is None else (self.baseline, *self.trials)


def of_job(database: Database, job: JobRow) -> Search:
    """Return the search of a job."""
    records = _told(database, job.id)
    final = job.best.get("number") if job.best is not None and job.stop_reason else None
    return _search(records, TuningConfig.model_validate(job.config), final)


def of_study(database: Database, name: str, config: TuningConfig) -> Search:
    """Return the search of any study under this configuration."""
    return _search(_records(database, name), config, None)


def _search(records: Sequence[TrialRecord], config: TuningConfig, final: int | None) -> Search:
    baseline = next((record for record in records if record.number == 0), None)
    trials = tuple(record for record in records if record.number > 0)
    return Search(config, baseline, trials, final)


def _told(database: Database, job_id: str) -> list[TrialRecord]:
    """Return the trials that a job's events tell of: a tenth of the bytes of the trials' rows."""
    query = (
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.kind == "trial")
        .order_by(EventRow.id)
    )
    with database.reading() as session:
        return [_record(data) for data in session.scalars(query)]


def _records(database: Database, study_name: str) -> list[TrialRecord]:
    columns = [TrialRow.record[part].label(part) for part in _PARTS]
    query = (
        select(TrialRow.number, TrialRow.state, *columns)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(StudyRow.name == study_name)
        .order_by(TrialRow.number)
    )
    with database.reading() as session:
        return [_record(row) for row in session.execute(query).mappings()]


def _record(row: Mapping[Any, Any]) -> TrialRecord:
    accuracy, meets_goal = row["accuracy"], row["meets_goal"]
    return TrialRecord(
        number=row["number"],
        plan=_NO_PLAN,
        accuracy=None if accuracy is None else float(accuracy),
        metrics=decode_floats(row["metrics"] or {}),
        costs=decode_floats(row["costs"] or {}),
        meets_goal=None if meets_goal is None else bool(meets_goal),  # SQLite gives 0 and 1
        state=cast(TrialState, row["state"]),
        duration_s=float(row["duration_s"] or 0.0),
        reason=row["reason"] or "",
        error=row["error"],
    )


def baseline_costs(database: Database, study_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return study → the costs of FP32, for those whose baseline was evaluated."""
    query = (
        select(StudyRow.name, TrialRow.record["costs"])
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(StudyRow.name.in_(study_names), TrialRow.number == 0)
    )
    with database.reading() as session:
        return {name: decode_floats(costs or {}) for name, costs in session.execute(query)}


def plans(database: Database, study_name: str, numbers: Sequence[int]) -> dict[int, Ops]:
    """Return trial → its plan, for those of these that are there."""
    query = (
        select(TrialRow.number, TrialRow.record)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(StudyRow.name == study_name, TrialRow.number.in_(numbers))
    )
    with database.reading() as session:
        return {number: ops_of(record) for number, record in session.execute(query)}


def options(database: Database, study_name: str) -> Mapping[str, Any]:
    """Return op → label → {"config", "damage"} of a study; empty until they are predicted."""
    query = select(StudyRow.payload["options"]).where(StudyRow.name == study_name)
    with database.reading() as session:
        return session.scalars(query).one_or_none() or {}


def op_table(database: Database, job_id: str) -> list[OpSummary]:
    """Return the op table of a job's best plan; empty until it has succeeded."""
    query = select(OpRow.summary).where(OpRow.job_id == job_id).order_by(OpRow.position)
    with database.reading() as session:
        return [OpSummary.from_dict(summary) for summary in session.scalars(query)]
