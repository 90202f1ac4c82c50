"""What a client raises: the tree of errors, and reading them from problem documents."""

from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from typing import Any

import httpx
from pydantic import ValidationError

from server.schemas import Problem

_MAX_TEXT = 300


class ClientError(Exception):
    """Root of the tree."""


class AddressError(ClientError):
    """The URL of the service, or the token, cannot be used."""


class UnreachableError(ClientError):
    """The service gave no answer."""


class ForeignAnswerError(ClientError):
    """What answered is not this service, or is one of another version."""


class WaitTimeoutError(ClientError, TimeoutError):
    """The job had not ended when the time was up."""


class DownloadError(ClientError):
    """A file could not be fetched whole."""


class ApiError(ClientError):
    """The service refused. The fields are those of its problem document (RFC 9457).

    `errors` says what is wrong where, for each value of the request that cannot be accepted;
    `retry_after_s` is what the service asked to wait, None where it did not.
    """

    advice = ""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        self.status = problem.status
        self.type = problem.type
        self.title = problem.title
        self.detail = problem.detail
        self.errors: tuple[Mapping[str, Any], ...] = _errors(problem)
        self.retry_after_s = retry_after_s
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [f"{self.detail} ({self.status} {self.title})"]
        lines += [f"  {_place(error)}: {error.get('detail', '')}" for error in self.errors]
        return "\n".join([*lines, *filter(None, [self.advice])])


class UnauthorizedError(ApiError):
    """The service wants a token, or does not know this one (401)."""

    advice = "Set ACCUTUNE_TOKEN; the service's operator makes one with: tuner token create NAME"


class ForbiddenError(ApiError):
    """The token does not allow this (403)."""

    advice = "A token with more scopes comes from: tuner token create NAME --scope submit"


class NotFoundError(ApiError):
    """There is no such thing, or it is another owner's (404)."""


class ConflictError(ApiError):
    """The job's state forbids this (409)."""


class InvalidError(ApiError):
    """The service cannot accept what was sent (400, 413, 415, 422)."""


class RateLimitError(ApiError):
    """Too many requests, or too many jobs waiting (429)."""

    advice = "Wait a while, or let some of the waiting jobs end"


class UnavailableError(ApiError):
    """The service, or its database, has a problem (5xx)."""

    advice = "The log of the service tells more; `tuner serve` writes it to its terminal"


_KINDS: dict[int, type[ApiError]] = {
    400: InvalidError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidError,
    415: InvalidError,
    422: InvalidError,
    429: RateLimitError,
}


def api_error(response: httpx.Response) -> ApiError:
    """Return the error that an answer tells of; its body was read before."""
    status = response.status_code
    kind = _KINDS.get(status, UnavailableError if status >= 500 else ApiError)
    return kind(_problem(response), _retry_after_s(response.headers.get("Retry-After")))


def _problem(response: httpx.Response) -> Problem:
    """Read the problem document; a proxy in between may have answered with something else."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        status = response.status_code
        known = [one.phrase for one in HTTPStatus if one.value == status]
        text = " ".join(response.text.split())[:_MAX_TEXT] or "an answer without a text"
        return Problem(type="about:blank", title="".join(known), status=status, detail=text)


def _retry_after_s(value: str | None) -> float | None:
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time(), 0.0)
    except ValueError:
        return None


def _errors(problem: Problem) -> tuple[Mapping[str, Any], ...]:
    found = (problem.model_extra or {}).get("errors")
    if not isinstance(found, Sequence):
        return ()
    return tuple(error for error in found if isinstance(error, Mapping))


def _place(error: Mapping[str, Any]) -> str:
    return str(error.get("pointer") or error.get("parameter") or "request")
