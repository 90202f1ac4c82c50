"""What a job needs only until it has ended."""

from server import model_weights
from server.outputs import discard_staged
from server.settings import Settings


def clear(settings: Settings, job_id: str) -> None:
    """Remove the weights that an ended job began with, and files that it never published."""
    model_weights.path_of(settings.models_dir, job_id).unlink(missing_ok=True)
    discard_staged(settings.artifacts_dir, job_id)
