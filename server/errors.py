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


class ForbiddenError(ServerError):
    """The token is valid, but does not allow this."""

    status = HTTPStatus.FORBIDDEN
    slug = "forbidden"


class TooLargeError(ServerError):
    """What was sent is larger than the service takes."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    slug = "too-large"


class QuotaError(ServerError):
    """The caller has used up what is allowed."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    slug = "quota-exceeded"


class LeaseLostError(ServerError):
    """Another worker, or nobody, holds the job now: whatever this one computed does not count."""

    status = HTTPStatus.CONFLICT
    slug = "lease-lost"


class DatabaseError(ServerError):
    """The database cannot be used."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    slug = "database-unavailable"
