"""What clients see of the rows of the database."""

from typing import cast
from urllib.parse import quote

from server.db.models import ArtifactRow, EventRow, JobRow
from server.schemas import Artifact, Event, EventKind, Job, JobLinks, Progress
from server.states import State
from tuner.config import TuningConfig


def job(row: JobRow) -> Job:
    """Return a job's JSON."""
    config = TuningConfig.model_validate(row.config)
    return Job(
        id=row.id,
        recipe=row.recipe,
        params=row.params,
        config=config,
        priority=row.priority,
        labels=row.labels,
        max_attempts=row.max_attempts,
        timeout_s=row.timeout_s,
        state=State(row.state),
        attempt=row.attempt,
        owner=row.owner,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        progress=Progress(trials=row.trials, max_trials=config.max_trials),
        baseline=row.baseline,
        best=row.best,
        goal_met=row.goal_met,
        quantized_ops=row.quantized_ops,
        stop_reason=row.stop_reason,
        error=row.error,
        links=JobLinks.of(row.id),
    )


def event(row: EventRow) -> Event:
    """Return an event's JSON."""
    kind = cast(EventKind, row.kind)
    return Event(id=row.id, kind=kind, data=row.data, created_at=row.created_at)


def artifact(row: ArtifactRow) -> Artifact:
    """Return an artifact's JSON."""
    return Artifact(
        name=row.name,
        media_type=row.media_type,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=row.created_at,
        href=f"{JobLinks.of(row.job_id).artifacts}/{quote(row.name, safe='')}",
    )
