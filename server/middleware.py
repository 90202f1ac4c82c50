"""What every request passes before the application sees it, and every answer on its way out."""

import re
from collections.abc import Iterable

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access_log import AccessLog
from server.auth import SAFE_METHODS
from server.errors import HostError, OriginError
from server.limits import Bodies, RateLimit, RefusedBody
from server.problems import problem_response
from server.settings import Settings

_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]/@]+)(:\d+)?", re.IGNORECASE)
_WILDCARDS = ("", "0.0.0.0", "::", "*")


def install(app: FastAPI, settings: Settings) -> None:
    """Put the middleware around an application; call it after `problems.install`.

    What is added last sees a request first: it gets its id; then its host, its origin, its caller
    and how often that one calls, and its body are checked.
    """
    app.add_exception_handler(RefusedBody, _refuse)
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(RateLimit, per_minute=settings.requests_per_minute)
    app.add_middleware(SameOrigin)
    app.add_middleware(Hosts, allowed=_hosts(settings))
    app.add_middleware(SafeHeaders)
    app.add_middleware(AccessLog)


class SafeHeaders:
    """Adds the headers that keep a browser from doing harm; a route may have set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and add what its answer lacks."""

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, safe)


class Hosts:
    """Answers only to the names that the operator gave.

    A page whose name was made to point at this machine (DNS rebinding) names another host.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or refuse it (400)."""
        if scope["type"] != "http" or self._is_known(Headers(scope=scope).getlist("host")):
            return await self._app(scope, receive, send)
        error = HostError(
            "this service does not answer to the name in the Host header: the operator can add it "
            "to ACCUTUNE_ALLOWED_HOSTS"
        )
        await problem_response(error, scope["path"])(scope, receive, send)

    def _is_known(self, given: list[str]) -> bool:
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            return False
        return "*" in self._allowed or match[1].lower() in self._allowed


class SameOrigin:
    """Refuses what the pages of other sites make a browser send, unless it only reads.

    Browsers say where a request comes from (Sec-Fetch-Site, Origin); other clients do not, and no
    site can make them send something. There are no CORS headers, so other sites cannot read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or refuse it (403)."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            return await self._app(scope, receive, send)
        if _is_own(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        error = OriginError("a page of another site sent this request: that is not allowed")
        await problem_response(error, scope["path"])(scope, receive, send)


def _is_own(headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return True
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _hosts(settings: Settings) -> set[str]:
    """Return the names to answer to: those of the setting, and the address that is bound."""
    names = {name.lower() for name in settings.allowed_hosts}
    if settings.host not in _WILDCARDS:
        names.add(f"[{settings.host}]" if ":" in settings.host else settings.host.lower())
    return names


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedBody)
    return problem_response(error.error, request.url.path)
