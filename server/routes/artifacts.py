"""The files that a job left."""

from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse

from server import artifacts, etags, ranges, views
from server.db.models import ArtifactRow
from server.problems import declared
from server.routes.common import JobId, Reader, UsesServices
from server.schemas import Artifact, Page

router = APIRouter(prefix="/v1/jobs/{job_id:id}/artifacts", tags=["artifacts"])

_CHUNK_BYTES = 1 << 18
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_Name = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[^\x00/]+$")]
_Condition = Annotated[str | None, Header()]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": _BYTES},
    206: {"description": "The part that Range asks for.", "content": _BYTES},
    304: {"description": "The file is still what If-None-Match names."},
    **declared(404, 416),
}


@router.get("", operation_id="list_artifacts", summary="List artifacts", responses=declared(404))
def list_artifacts(job_id: JobId, services: UsesServices, caller: Reader) -> Page[Artifact]:
    """Return the files of a job, by name."""
    rows = artifacts.listed(services.database, job_id)
    return Page[Artifact](items=[views.artifact(row) for row in rows], next_cursor=None)


@router.get(
    "/{name}",
    operation_id="download_artifact",
    summary="Download an artifact",
    response_class=Response,
    responses=_RESPONSES,
)
def download_artifact(
    job_id: JobId,
    name: _Name,
    services: UsesServices,
    caller: Reader,
    range: _Condition = None,
    if_range: _Condition = None,
    if_none_match: _Condition = None,
) -> Response:
    """Return a file, or a single range of its bytes; the ETag is the SHA-256 of the whole."""
    row = artifacts.found(services.database, job_id, name)
    path = artifacts.path_of(services.settings.artifacts_dir, row)
    headers = _headers(row)
    if etags.is_among(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    part = range if if_range in (None, headers["ETag"]) else None
    found = ranges.wanted(part, row.size_bytes)
    begin, end = found or (0, row.size_bytes)
    if found is not None:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{row.size_bytes}"
    headers["Content-Length"] = str(end - begin)
    status = 200 if found is None else 206
    return StreamingResponse(_chunks(path, begin, end), status, headers, row.media_type)


@router.head(
    "/{name}",
    operation_id="head_artifact",
    summary="Ask about an artifact",
    response_class=Response,
    responses={200: {"description": "The headers of the file."}, **declared(404)},
)
def head_artifact(job_id: JobId, name: _Name, services: UsesServices, caller: Reader) -> Response:
    """Return the headers that the file itself would come with."""
    row = artifacts.found(services.database, job_id, name)
    artifacts.path_of(services.settings.artifacts_dir, row)
    headers = {**_headers(row), "Content-Length": str(row.size_bytes)}
    return Response(status_code=200, headers=headers, media_type=row.media_type)


def _headers(row: ArtifactRow) -> dict[str, str]:
    name = quote(row.name, safe="")
    return {
        "ETag": etags.strong(row.sha256),
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=utf-8''{name}",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }


async def _chunks(path: FilePath, begin: int, end: int) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(begin)
        while begin < end:
            chunk = await file.read(min(_CHUNK_BYTES, end - begin))
            if not chunk:  # it was cut short while it was sent: the client sees too few bytes
                return
            begin += len(chunk)
            yield chunk
