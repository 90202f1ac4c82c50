"""Clients of the service: one that waits for answers, and one for asyncio."""

from server.client.asynchronous import AsyncClient
from server.client.errors import (
    AddressError,
    ApiError,
    ClientError,
    ConflictError,
    DownloadError,
    ForbiddenError,
    ForeignAnswerError,
    InvalidError,
    NotFoundError,
    RateLimitError,
    UnauthorizedError,
    UnavailableError,
    UnreachableError,
    WaitTimeoutError,
)
from server.client.stream import JobEvent
from server.client.sync import Client

__all__ = [
    "AddressError",
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "ConflictError",
    "DownloadError",
    "ForbiddenError",
    "ForeignAnswerError",
    "InvalidError",
    "JobEvent",
    "NotFoundError",
    "RateLimitError",
    "UnauthorizedError",
    "UnavailableError",
    "UnreachableError",
    "WaitTimeoutError",
]
