"""Files of a saved directory: written all or none, read with their checksums."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import SaveError

SAVED_FILES = ("weights.safetensors", "plan.json", "config.json", "result.json")
"""What the folder of a saved model holds."""

_SEAL = "checksum"
_ALTERED = (
    "is truncated or altered: its checksum differs from the one that was saved beside it. Save the "
    "model again"
)


def cache_folder() -> Path:
    """Return the cache folder: `$XDG_CACHE_HOME/accutune`, by default `~/.cache/accutune`.

    A user without a home, as in many containers, has one among the temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "accutune"
    try:
        return Path.home() / ".cache" / "accutune"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"accutune-{os.getuid()}"


def as_json(value: Any) -> bytes:
    """Return a value as the bytes of a JSON file."""
    return json.dumps(value, indent=1).encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """Return an object as the bytes of a JSON file that holds its own checksum."""
    plain = json.loads(as_json(value))
    return as_json({**plain, _SEAL: _seal(plain)})


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_files(files: Mapping[str, bytes], target: Path) -> None:
    """Write all files beside the target first, then move them to it; raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, data in files.items():
            (staged / name).write_bytes(data)
        if not target.exists():
            os.chmod(staged, 0o777 & ~_umask())
            os.rename(staged, target)
            return
        for name in files:
            os.replace(staged / name, target / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _read(source: Path, name: str) -> bytes:
    try:
        return (source / name).read_bytes()
    except OSError as error:
        raise SaveError(
            f"cannot read {str(source / name)!r}: {error.strerror}. Give a directory that "
            "QuantizedModel.save() wrote"
        ) from error


def read_json(source: Path, name: str) -> dict[str, Any]:
    """Return the JSON object of a file; raises SaveError where it is missing or damaged."""
    try:
        value = json.loads(_read(source, name))
    except ValueError as error:
        raise SaveError(f"{source / name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise SaveError(f"{source / name} is damaged: it holds no JSON object")
    return value


def read_sealed(source: Path, name: str) -> dict[str, Any]:
    """Return what `sealed` made a file of; raises SaveError where it is missing or altered.

    Files of version 0.1 have no checksum.
    """
    value = read_json(source, name)
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _seal(value):
        raise SaveError(f"{source / name} {_ALTERED}")
    return value


def checked(source: Path, name: str, sums: Mapping[str, str]) -> bytes:
    """Read a file and hold it against its checksum; raises SaveError where they differ."""
    data = _read(source, name)
    if hashlib.sha256(data).hexdigest() != sums.get(name):
        raise SaveError(f"{source / name} {_ALTERED}")
    return data


def checksums(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of every file, by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
