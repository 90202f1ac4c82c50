"""The files that a job leaves: written beside their place first, then moved to it in one step."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from server.process_group import tail
from tuner.quantized_model import QuantizedModel

_LOG, _REPORT = "run.log", "report.html"
_LOG_BYTES = 256 << 10
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".log": "text/plain; charset=utf-8",
    ".safetensors": "application/octet-stream",
}


class Outputs:
    """The files of one attempt at a job, staged in a hidden folder until they are published."""

    def __init__(self, artifacts_dir: Path, job_id: str, fence: int) -> None:
        self._target = artifacts_dir / job_id
        self._staged = artifacts_dir / f".{job_id}-{fence}"

    def write(self, model: QuantizedModel, log: Path) -> list[dict[str, Any]]:
        """Write the model, its report and the end of the log; return what to store of each.

        Raises OSError or SaveError where the disk is full or cannot be written.
        """
        model.save(self._staged)
        model.result.report(self._staged / _REPORT)
        (self._staged / _LOG).write_text(tail(log, _LOG_BYTES), encoding="utf-8")
        return [_described(path) for path in sorted(self._staged.iterdir())]

    def publish(self) -> None:
        """Move the files to their place, where only an attempt that failed may have left others."""
        if self._target.exists():
            shutil.rmtree(self._target)
        self._staged.rename(self._target)

    def discard(self) -> None:
        """Remove what was not published."""
        shutil.rmtree(self._staged, ignore_errors=True)


def discard_staged(artifacts_dir: Path, job_id: str) -> None:
    """Remove what attempts at an ended job staged and never published."""
    for folder in artifacts_dir.glob(f".{job_id}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    """Return what is stored of a file, once its bytes are on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {
        "name": path.name,
        "media_type": _MEDIA_TYPES[path.suffix],
        "size_bytes": path.stat().st_size,
        "sha256": digest,
    }
