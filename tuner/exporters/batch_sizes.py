"""At which batch sizes a traced model can be timed."""

from tuner.errors import ExportError
from tuner.exporters.timing import takes_batch
from tuner.exporters.tracing import Traced


def check_batch(traced: Traced, size: int) -> None:
    """Raise ExportError where a traced model cannot be run at a batch size."""
    if not takes_batch(traced, size):
        own = traced.example.batch
        raise ExportError(
            f"the model computes with the batch of {own} as a constant: it cannot be timed at "
            f"{size}. Time it at {own}, give calibration batches of {size}, or mend the model"
        )
