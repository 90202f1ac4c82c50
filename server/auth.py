"""Who calls, and what that caller may do."""

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from server.errors import ForbiddenError, OriginError, ServerError, UnauthenticatedError
from server.settings import Settings

PUBLIC: dict[str, Any] = {"security": []}
"""Marks a route that needs no token: `@router.get("/healthz", openapi_extra=PUBLIC)`."""

CSRF_FIELD = "csrf_token"
CSRF_HEADER = "X-CSRF-Token"
SESSION_COOKIE = "accutune_session"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FORM = "application/x-www-form-urlencoded"


class Scope(StrEnum):
    """What a token allows; a later one includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


_INCLUDED = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.SUBMIT: frozenset({Scope.READ, Scope.SUBMIT}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True)
class Caller:
    """Someone whose token was checked, or the one user of a service on this machine alone.

    Jobs that the caller submits are owned by `owner`.
    """

    owner: str
    scopes: frozenset[Scope]
    token_id: str | None = None

    def may(self, scope: Scope) -> bool:
        """Return whether one of the caller's scopes includes this one."""
        return any(scope in _INCLUDED[own] for own in self.scopes)


LOCAL = Caller("local", frozenset({Scope.ADMIN}))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach what listens at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def needs_token(settings: Settings) -> bool:
    """Return whether callers need a token; by default, where others than this machine may call."""
    return not is_loopback(settings.host) if settings.auth is None else settings.auth


async def identify(connection: HTTPConnection) -> Caller | ServerError:
    """Return who calls, or the error for the routes that are not for everybody.

    A bearer token goes before the session's cookie. Where no token is needed, one that is given is
    still checked, so that clients can be tried out.
    """
    services = connection.app.state.services
    header = connection.headers.get("authorization")
    cookie = connection.cookies.get(SESSION_COOKIE)
    try:
        if header is not None:
            scheme, _, secret = header.partition(" ")
            if scheme.lower() != "bearer":
                return UnauthenticatedError(
                    f"Authorization must be 'Bearer <token>', not {scheme[:20]!r}"
                )
            found = await run_in_threadpool(services.tokens.find, secret.strip())
            return found or UnauthenticatedError("this token is unknown, expired or revoked")
        if not needs_token(services.settings):
            return LOCAL
        if cookie is not None:
            found = await run_in_threadpool(services.sessions.find, cookie)
            return found or UnauthenticatedError("this session has ended: log in again")
    except ServerError as error:  # such as a database that is down: public routes work on
        return error
    return UnauthenticatedError("this needs a token: send 'Authorization: Bearer <token>'")


def is_public(scope: Mapping[str, Any]) -> bool:
    """Return whether the route that was found is marked as one for everybody."""
    extra = getattr(scope.get("route"), "openapi_extra", None) or {}
    return bool(extra.get("security") == PUBLIC["security"])


async def authenticate(request: Request) -> None:
    """Set `request.state.caller`; the dependency of the whole application.

    Raises UnauthenticatedError on all routes that are not marked with PUBLIC; there the caller may
    be None. Raises OriginError where a session changes something without its CSRF token.
    """
    found = getattr(request.state, "identity", None)  # found by the middleware, where installed
    if found is None:
        found = await identify(request)
    if isinstance(found, ServerError):
        request.state.caller = None
        if not is_public(request.scope):
            raise found
        return
    request.state.caller = found
    if not is_public(request.scope):
        await _check_csrf(request)


async def _check_csrf(request: Request) -> None:
    """Refuse what another site made the browser of a session send."""
    cookie = request.cookies.get(SESSION_COOKIE)
    if request.method in SAFE_METHODS or cookie is None or "authorization" in request.headers:
        return
    services = request.app.state.services
    if not needs_token(services.settings):
        return
    given = request.headers.get(CSRF_HEADER)
    if given is None and request.headers.get("content-type", "").startswith(_FORM):
        given = str((await request.form()).get(CSRF_FIELD, ""))
    if not services.sessions.is_csrf_token(cookie, given or ""):
        raise OriginError(
            f"this session's CSRF token is missing or wrong: send it as {CSRF_HEADER} or in the "
            f"form's field {CSRF_FIELD}, or load the page again"
        )


def require(scope: Scope) -> Callable[[Request], Caller]:
    """Return the dependency of a route that needs this scope; it gives the caller.

    The caller was found before, by the dependency that holds for the whole application.
    """

    def allowed(request: Request) -> Caller:
        caller: Caller = request.state.caller
        if not caller.may(scope):
            raise ForbiddenError(f"this needs a token with the scope {scope}")
        return caller

    return allowed
