"""What a job needs only until it has ended."""

import logging

from server import model_weights
from server.outputs import discard_staged
from server.settings import Settings

_log = logging.getLogger(__name__)


def clear(settings: Settings, job_id: str) -> None:
    """Remove the weights that an ended job began with, and files that it never published."""
    discard_staged(settings.artifacts_dir, job_id)
    weights = model_weights.path_of(settings.models_dir, job_id)
    try:
        weights.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", weights, error)
