"""The requests of the service's API, for clients that wait and clients that do not."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from server.client.errors import ClientError, ForeignAnswerError
from server.schemas import (
    Artifact,
    Asset,
    Job,
    Page,
    RecipeInfo,
    Submission,
    Trial,
    WorkerInfo,
)

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Model = TypeVar("Model", bound=BaseModel)
Asked = Literal["cancel", "pause", "resume"]

_PAGE = 200
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KINDS = {".safetensors": "safetensors", ".npz": "npz"}


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and how its answer is read. `file` is sent as the body.

    `is_repeatable`: sending it twice does no more than sending it once.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], Answer]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    file: Path | None = None
    is_repeatable: bool = True


def submit(submission: Submission, key: str) -> Call[Job]:
    """Queue a job; the key makes the request repeatable."""
    if not _KEY.fullmatch(key):
        raise ClientError(f"{key!r} is no Idempotency-Key: give up to 255 ASCII characters")
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    body = submission.model_dump_json().encode()
    return Call("POST", "/v1/jobs", _reader(Job), headers=headers, body=body)


def job(job_id: str) -> Call[Job]:
    """Read a job."""
    return Call("GET", job_path(job_id), _reader(Job))


def job_if_changed(job_id: str, etag: str | None) -> Call[tuple[Job | None, str | None]]:
    """Read a job and its entity tag; None where the tag is still `etag`."""

    def read(response: httpx.Response) -> tuple[Job | None, str | None]:
        if response.status_code == httpx.codes.NOT_MODIFIED:
            return None, etag
        return _reader(Job)(response), response.headers.get("ETag")

    headers = {} if etag is None else {"If-None-Match": etag}
    return Call("GET", job_path(job_id), read, headers=headers)


def ask(job_id: str, what: Asked) -> Call[Job]:
    """Cancel, pause or resume a job."""
    return Call("POST", f"{job_path(job_id)}:{what}", _reader(Job), is_repeatable=False)


def jobs(**filters: Any) -> Call[Page[Job]]:
    """Read a page of jobs, the newest first."""
    known = {name: value for name, value in filters.items() if value is not None}
    return Call("GET", "/v1/jobs", _reader(Page[Job]), params={"limit": _PAGE, **known})


def trials(job_id: str) -> Call[Page[Trial]]:
    """Read a page of a job's trials."""
    return Call("GET", f"{job_path(job_id)}/trials", _reader(Page[Trial]), params={"limit": _PAGE})


def trial(job_id: str, number: int) -> Call[Trial]:
    """Read one trial; the baseline is number 0."""
    return Call("GET", f"{job_path(job_id)}/trials/{number:d}", _reader(Trial))


def artifacts(job_id: str) -> Call[Page[Artifact]]:
    """Read which files a job left."""
    return Call("GET", f"{job_path(job_id)}/artifacts", _reader(Page[Artifact]))


def recipes() -> Call[Page[RecipeInfo]]:
    """Read a page of the recipes."""
    return Call("GET", "/v1/recipes", _reader(Page[RecipeInfo]))


def workers() -> Call[Page[WorkerInfo]]:
    """Read a page of the workers, the newest first."""
    return Call("GET", "/v1/workers", _reader(Page[WorkerInfo]), params={"limit": _PAGE})


def upload(path: Path, kind: str | None) -> Call[Asset]:
    """Send a file; its bytes name it, so that sending it twice does no harm."""
    kind = kind or _KINDS.get(path.suffix)
    if kind not in _KINDS.values():
        raise ClientError(
            f"{path.name!r} is of no kind that can be uploaded: give a .safetensors or .npz file"
        )
    try:
        length = str(path.stat().st_size)
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror or error}") from error
    headers = {"Content-Type": "application/octet-stream", "Content-Length": length}
    params = {"kind": kind, "name": path.name}
    return Call("POST", "/v1/assets", _reader(Asset), params=params, headers=headers, file=path)


def following(call: Call[Page[Item]], cursor: str) -> Call[Page[Item]]:
    """Return the call that reads the next page."""
    return replace(call, params={**call.params, "cursor": cursor})


def job_path(job_id: str) -> str:
    """Return where a job is."""
    if not job_id:
        raise ClientError("the id of a job cannot be empty")
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _reader(model: type[Model]) -> Callable[[httpx.Response], Model]:
    def read(response: httpx.Response) -> Model:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise ForeignAnswerError(
                f"what {response.url} answered is no {model.__name__}: is it this service, and of "
                f"the version of this client? {error}"
            ) from error

    return read
