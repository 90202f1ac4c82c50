"""Which of two trials of a job is the better one."""

from collections.abc import Mapping
from typing import Any

from server.db.models import JobRow


def is_better(record: Mapping[str, Any], job: JobRow) -> bool:
    """Whether a trial goes before the job's best: meeting the goal first, then the lower cost."""
    return _rank(record, job) < _rank(job.best, job)


def _rank(record: Mapping[str, Any] | None, job: JobRow) -> tuple[bool, float]:
    if record is None or record.get("accuracy") is None:
        return True, float("inf")
    if not record.get("meets_goal"):
        return True, -as_number(record["accuracy"]) * _direction(job)
    cost = {"size": "size_bytes"}.get(job.config.get("objective", "bops"), "bops")
    return False, float(record["costs"][cost])


def _direction(job: JobRow) -> int:
    return 1 if job.config.get("goal", {}).get("higher_is_better", True) else -1


def as_number(value: Any) -> float:
    """Read a number as the library's JSON spells it; NaN and inf are strings there."""
    return float("nan") if value is None else float(value)
