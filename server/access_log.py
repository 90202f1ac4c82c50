"""One line and one measurement a request, and the id that ties them together."""

import logging
import re
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import Caller
from server.ids import new_id
from server.logs import bind

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = logging.getLogger("server.access")


class AccessLog:
    """Names every request (X-Request-ID), logs it when it ends, and counts it.

    The id of the client is kept where it is 1 to 64 letters, digits, dots, dashes or underscores.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and take note of its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status, is_stream = time.perf_counter(), 500, False

        async def named(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["X-Request-ID"] = request_id
                status = message["status"]
                is_stream = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)

        with bind(request_id=request_id):
            try:
                await self._app(scope, receive, named)
            finally:
                seconds = time.perf_counter() - begun
                _count(scope, status, None if is_stream else seconds)
                _write(scope, status, seconds)


def route_of(scope: Scope) -> str:
    """Return the template of the route that was found, such as /v1/jobs/{job_id}."""
    found = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    path: str | None = getattr(found, "path", None)
    return path if path is not None else "unmatched"


def _count(scope: Scope, status: int, seconds: float | None) -> None:
    metrics = scope["app"].state.services.metrics
    metrics.count_request(route_of(scope), scope["method"], status, seconds)


def _write(scope: Scope, status: int, seconds: float) -> None:
    identity = scope["state"].get("identity")
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "route": route_of(scope),
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
        "client": (scope.get("client") or ("unknown", 0))[0],
    }
    if isinstance(identity, Caller):
        fields |= {"owner": identity.owner, "token_id": identity.token_id}
    if "job_id" in scope.get("path_params", {}):
        fields["job_id"] = scope["path_params"]["job_id"]
    text = "%s %r %d in %.1f ms"
    _log.info(text, scope["method"], scope["path"], status, fields["duration_ms"], extra=fields)
