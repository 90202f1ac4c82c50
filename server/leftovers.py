"""What a job needs only until it has ended."""

import logging
import time

from server import model_weights
from server.errors import NotFoundError
from server.jobs import Jobs
from server.outputs import discard_staged
from server.settings import Settings
from server.states import ENDED

_DAY_S = 24 * 3600.0
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
    old = time.time() - settings.keep_logs_days * _DAY_S
    for log in settings.logs_dir.glob("*.log"):
        try:
            if log.stat().st_mtime < old and _has_ended(jobs, log.stem.rpartition("-")[0]):
                log.unlink()
        except OSError as error:  # another worker on the same disk may have been faster
            _log.info("%s cannot be removed: %s", log, error)


def _has_ended(jobs: Jobs, job_id: str) -> bool:
    try:
        return jobs.get(job_id).state in ENDED
    except NotFoundError:
        return True
