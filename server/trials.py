"""Reading what a job's search found: its trials, and the ops of its best plan."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, select

from server.db import Database
from server.db.models import JobRow, OpRow
from server.errors import NotFoundError
from tuner.storage import StudyRow, TrialRow


class Trials:
    """The trials that the library stored, of the service's jobs and of any other study."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self, study_name: str, limit: int, after: int = 0, scores: bool = False
    ) -> list[dict[str, Any]]:
        """Return the records that follow this number, in its order; the baseline is number 0.

        The scores of single samples are left out unless asked for.
        """
        query = _records(study_name).where(TrialRow.number > after).order_by(TrialRow.number)
        with self._database.reading() as session:
            return [_shown(record, scores) for record in session.scalars(query.limit(limit))]

    def get(self, study_name: str, number: int, scores: bool = False) -> dict[str, Any]:
        """Return the record of one trial; raises NotFoundError."""
        query = _records(study_name).where(TrialRow.number == number)
        with self._database.reading() as session:
            record = session.scalars(query).one_or_none()
        if record is None:
            raise NotFoundError(f"there is no trial {number} yet")
        return _shown(record, scores)

    def ops(self, job_id: str, limit: int, after: int = -1) -> list[tuple[int, dict[str, Any]]]:
        """Return the positions and rows of the op table of a job's best plan, in model order."""
        query = select(OpRow.position, OpRow.summary).where(OpRow.job_id == job_id)
        query = query.where(OpRow.position > after).order_by(OpRow.position).limit(limit)
        with self._database.reading() as session:
            if session.get(JobRow, job_id) is None:
                raise NotFoundError(f"there is no job {job_id!r}")
            return [(position, summary) for position, summary in session.execute(query)]


def _records(study_name: str) -> Select[tuple[dict[str, Any]]]:
    study = select(StudyRow.id).where(StudyRow.name == study_name).scalar_subquery()
    return select(TrialRow.record).where(TrialRow.study_id == study)


def _shown(record: Mapping[str, Any], scores: bool) -> dict[str, Any]:
    return {key: value for key, value in record.items() if scores or key != "scores"}
