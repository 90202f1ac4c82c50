"""Files that recipes' parameters name by the SHA-256 of their bytes, never by a path."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tuner.errors import DataError

FORMAT = "asset"
"""The `format` of such a parameter in a JSON schema; `contentMediaType` names its kind."""

_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)
_Digest = StringConstraints(pattern=r"^[0-9a-f]{64}$")

SafetensorsId = Annotated[
    str,
    _Digest,
    Field(json_schema_extra={"format": FORMAT, "contentMediaType": "application/safetensors"}),
]
NpzId = Annotated[
    str, _Digest, Field(json_schema_extra={"format": FORMAT, "contentMediaType": "application/npz"})
]
Kind = Literal["safetensors", "npz"]


@contextmanager
def assets_in(folder: Path) -> Iterator[None]:
    """Let recipes that are built inside the block find their files in a folder, by digest."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def asset_path(asset_id: str) -> Path:
    """Return where the file of this digest lies; raises DataError where there is none."""
    folder = _FOLDER.get()
    if folder is None:
        raise DataError(
            f"file {asset_id[:12]}… is looked for, but no folder is set: build the recipe inside "
            "`with assets_in(folder):`, where the folder's files are named by their SHA-256"
        )
    path = folder / asset_id
    if not path.is_file():
        raise DataError(f"file {asset_id[:12]}… is not in {folder}: upload it again")
    return path
