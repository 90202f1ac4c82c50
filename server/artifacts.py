"""The files that jobs left: what is stored of them, and where they lie."""

import logging
from pathlib import Path

from sqlalchemy import select

from server.db import Database
from server.db.models import ArtifactRow, JobRow
from server.errors import NotFoundError

_log = logging.getLogger(__name__)


def listed(database: Database, job_id: str) -> list[ArtifactRow]:
    """Return the files of a job, by name; raises NotFoundError where there is no such job."""
    query = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name)
    with database.reading() as session:
        if session.get(JobRow, job_id) is None:
            raise NotFoundError(f"there is no job {job_id!r}")
        return list(session.scalars(query))


def found(database: Database, job_id: str, name: str) -> ArtifactRow:
    """Return one file of a job; raises NotFoundError."""
    with database.reading() as session:
        row = session.get(ArtifactRow, (job_id, name))
    if row is None:
        raise NotFoundError(f"job {job_id!r} has no artifact {name!r}")
    return row


def path_of(folder: Path, row: ArtifactRow) -> Path:
    """Return where a file lies; raises NotFoundError where it does not, or is not what it was.

    The path is made of stored names only, and still may not lead out of the job's own folder.
    """
    own = (folder / row.job_id).resolve()
    path = (own / row.name).resolve()
    if not path.is_relative_to(own) or not path.is_file():
        _log.error("artifact %s of job %s is not at %s", row.name, row.job_id, path)
        raise NotFoundError(f"the file of the artifact {row.name!r} is gone from the server's disk")
    if path.stat().st_size != row.size_bytes:
        _log.error("artifact %s of job %s has another size", row.name, row.job_id)
        raise NotFoundError(f"the file of the artifact {row.name!r} is damaged")
    return path
