"""Reading which workers there are, and which jobs they hold."""

from collections import defaultdict
from datetime import timedelta
from typing import Literal, cast

from sqlalchemy import select

from server.db import Database, now
from server.db.models import JobRow, WorkerRow
from server.schemas import WorkerInfo
from server.states import ACTIVE

MISSED_LEASES = 2  # a heartbeat that is older than this many leases will not come


def listed(
    database: Database, lease_s: float, limit: int, before: str | None = None
) -> list[WorkerInfo]:
    """Return the workers, newest first, that began before the one of this id."""
    query = select(WorkerRow).order_by(WorkerRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(WorkerRow.id < before)
    with database.reading() as session:
        rows = list(session.scalars(query))
        held = select(JobRow.worker_id, JobRow.id).where(
            JobRow.state.in_(ACTIVE), JobRow.worker_id.in_([row.id for row in rows])
        )
        jobs = defaultdict(list)
        for worker_id, job_id in session.execute(held.order_by(JobRow.id)):
            jobs[worker_id].append(job_id)
        oldest = now(session) - timedelta(seconds=MISSED_LEASES * lease_s)
    return [_info(row, jobs[row.id], row.heartbeat_at < oldest) for row in rows]


def _info(row: WorkerRow, jobs: list[str], is_silent: bool) -> WorkerInfo:
    state = "lost" if is_silent and row.state != "ended" else row.state
    return WorkerInfo(
        id=row.id,
        host=row.host,
        pid=row.pid,
        state=cast(Literal["running", "draining", "ended", "lost"], state),
        slots=row.slots,
        gpus=row.gpus,
        version=row.version,
        started_at=row.started_at,
        heartbeat_at=row.heartbeat_at,
        jobs=jobs,
    )
