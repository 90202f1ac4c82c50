"""What a job needs only until it has ended."""

import logging

from server import model_weights
from server.errors import NotFoundError
from server.jobs import Jobs
from server.outputs import discard_staged
from server.settings import Settings
from server.states import ENDED

_log = logging.getLogger(__name__)


def clear(settings: Settings, job_id: str) -> None:
    """Remove the weights that an ended job began with, and files that it never published."""
    discard_staged(settings.artifacts_dir, job_id)
    weights = model_weights.path_of(settings.models_dir, job_id)
    try:
        weights.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", weights, error)


def sweep(settings: Settings, jobs: Jobs) -> None:
    """Clear up after every job that has ended, or is no longer in the database."""
    for weights in settings.models_dir.glob(f"*{model_weights.SUFFIX}"):
        if _has_ended(jobs, weights.stem):
            clear(settings, weights.stem)


def _has_ended(jobs: Jobs, job_id: str) -> bool:
    try:
        return jobs.get(job_id).state in ENDED
    except NotFoundError:
        return True
