"""Writing a file whole or not at all."""

import os
import tempfile
from pathlib import Path

from tuner.errors import SaveError


def write_whole(what: str, path: str | Path, content: str) -> Path:
    """Write text to `path`, whole or not at all; raises SaveError that names `what` it is."""
    try:
        target = Path(path)
        _write_atomically(target, content)
    except (OSError, TypeError, ValueError) as error:  # what is no path, or holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise SaveError(
            f"{what} cannot be written to {path!r}: {reason}. "
            "Give a file name in a folder that exists and is writable"
        ) from error
    return target


def _write_atomically(target: Path, content: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", text=True)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
