"""The service's error tree. Each error knows its HTTP status and the slug of its problem type."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar


class ServerError(Exception):
    """Root of the tree; `details` become members of the problem document (RFC 9457)."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    slug: ClassVar[str] = "internal-error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: Mapping[str, Any] = details

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that the answer needs beside the problem document."""
        return {}


class SettingsError(ServerError):
    """The service is set up in a way in which it must not start."""

    slug = "settings"


class NotFoundError(ServerError):
    """There is no such thing, or the caller may not know of it."""

    status = HTTPStatus.NOT_FOUND
    slug = "not-found"


class TransitionError(ServerError):
    """A job in this state cannot do what was asked."""

    status = HTTPStatus.CONFLICT
    slug = "wrong-state"


class InvalidError(ServerError):
    """The request is well formed, but what it says cannot be accepted."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    slug = "invalid"


class IdempotencyError(InvalidError):
    """An Idempotency-Key came again with another body."""

    slug = "idempotency-key-reused"


class UnauthenticatedError(ServerError):
    """There is no valid token."""

    status = HTTPStatus.UNAUTHORIZED
    slug = "unauthenticated"

    @property
    def headers(self) -> Mapping[str, str]:
        """How to say who calls."""
        return {"WWW-Authenticate": 'Bearer realm="accutune"'}


class ForbiddenError(ServerError):
    """The token is valid, but does not allow this."""

    status = HTTPStatus.FORBIDDEN
    slug = "forbidden"


class OriginError(ForbiddenError):
    """A page of another site sent the request, or it lacks the session's CSRF token."""

    slug = "cross-site"


class HostError(ServerError):
    """The request names a host that this service does not answer to."""

    status = HTTPStatus.BAD_REQUEST
    slug = "unknown-host"


class TooLargeError(ServerError):
    """What was sent is larger than the service takes."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    slug = "too-large"


class QuotaError(ServerError):
    """The caller has used up what is allowed."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    slug = "quota-exceeded"


class RateLimitError(ServerError):
    """The caller sends too many requests; `retry_after_s` is in the answer's headers, too."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    slug = "rate-limited"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """When to come again."""
        return {"Retry-After": str(self.retry_after_s)}


class StorageFullError(ServerError):
    """The disk has no room for what was sent."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    slug = "storage-full"


class LeaseLostError(ServerError):
    """Another worker, or nobody, holds the job now: whatever this one computed does not count."""

    status = HTTPStatus.CONFLICT
    slug = "lease-lost"


class MediaTypeError(ServerError):
    """What was sent is of a type that this route does not take."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    slug = "unsupported-media-type"


class RangeError(ServerError):
    """None of the bytes that a Range header asks for exist."""

    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    slug = "range-not-satisfiable"

    def __init__(self, message: str, size_bytes: int) -> None:
        super().__init__(message, size_bytes=size_bytes)
        self.size_bytes = size_bytes

    @property
    def headers(self) -> Mapping[str, str]:
        """How many bytes there are."""
        return {"Content-Range": f"bytes */{self.size_bytes}"}


class NotReadyError(ServerError):
    """The service runs, but cannot do its work yet."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    slug = "not-ready"


class DatabaseError(ServerError):
    """The database cannot be used."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    slug = "database-unavailable"
