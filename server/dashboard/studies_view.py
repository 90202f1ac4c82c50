"""Library runs in the same store: studies that belong to no job."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from server.dashboard import searches
from server.dashboard.searches import Search
from server.db import Database
from server.db.models import JobRow
from server.errors import NotFoundError
from tuner.config import TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.records import TrialRecord
from tuner.storage import StudyRow, TrialRow


@dataclass(frozen=True)
class StudyLine:
    """A row of the list of studies."""

    id: int
    name: str
    created_at: datetime
    strategy: str
    trials: int


def page(database: Database, limit: int, before: int | None = None) -> list[StudyLine]:
    """Return studies, newest first, that were made before the one of this id."""
    trials = func.count(TrialRow.id).filter(TrialRow.number > 0)
    query = (
        select(StudyRow.id, StudyRow.name, StudyRow.created_at, StudyRow.header["strategy"], trials)
        .outerjoin(TrialRow, TrialRow.study_id == StudyRow.id)
        .where(StudyRow.name.not_in(select(JobRow.study_name)))
        .group_by(StudyRow.id)
        .order_by(StudyRow.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(StudyRow.id < before)
    with database.reading() as session:
        return [_line(*row) for row in session.execute(query)]


def header(database: Database, name: str) -> tuple[datetime, dict[str, Any]]:
    """Return when a study was made, and its header; raises NotFoundError, too, for a job's."""
    query = select(StudyRow.created_at, StudyRow.header).where(
        StudyRow.name == name, StudyRow.name.not_in(select(JobRow.study_name))
    )
    with database.reading() as session:
        row = session.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no study {name!r}")
    return _utc(row[0]), row[1]


def search(database: Database, name: str, objective: str) -> tuple[Search, bool]:
    """Return the search of a study, and whether its goal is known.

    A study that an older version made does not keep its goal: what met it was judged when it ran,
    and that also tells in which direction the metric is better.
    """
    goal = _goal(database, name)
    if goal is not None:
        return _under(database, name, objective, goal), True
    guess = _under(database, name, objective, AccuracyGoal())
    goal = AccuracyGoal(higher_is_better=_is_higher_better(guess.trials))
    return _under(database, name, objective, goal), False


def _goal(database: Database, name: str) -> AccuracyGoal | None:
    query = select(StudyRow.payload["goal"]).where(StudyRow.name == name)
    with database.reading() as session:
        stored = session.scalars(query).one_or_none()
    return None if stored is None else AccuracyGoal.model_validate(stored)


def _under(database: Database, name: str, objective: str, goal: AccuracyGoal) -> Search:
    return searches.of_study(database, name, TuningConfig(objective=objective, goal=goal))


def _is_higher_better(trials: Sequence[TrialRecord]) -> bool:
    met = [t.accuracy for t in trials if t.meets_goal and t.accuracy is not None]
    missed = [t.accuracy for t in trials if t.meets_goal is False and t.accuracy is not None]
    return not met or not missed or max(met) >= max(missed)


def _line(study_id: int, name: str, created_at: datetime, strategy: str, trials: int) -> StudyLine:
    return StudyLine(study_id, name, _utc(created_at), strategy, trials)


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
