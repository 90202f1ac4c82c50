"""What a caller may send: how many requests a minute, and how large and of what kind a body."""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import SAFE_METHODS, Caller, identify, is_public
from server.errors import MediaTypeError, RateLimitError, ServerError, TooLargeError
from server.problems import problem_response
from server.settings import Settings

UPLOAD = ("POST", "/v1/assets")
"""The one route that takes large bodies, and bytes instead of JSON."""

_JSON = "application/json"
_BYTES = "application/octet-stream"
_FORM = "application/x-www-form-urlencoded"
_MOST_BUCKETS = 10_000


class Buckets:
    """Token buckets: each key has `per_minute` requests at once, and gets them back evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: str) -> int:
        """Return after how many seconds the key has a request again; 0 where it has one now."""
        left = self._now(key)
        return 0 if left >= 1 else math.ceil((1 - left) / self._per_s)

    def take(self, key: str) -> int:
        """Take one request, or return after how many seconds there is one."""
        wait_s = self.wait_s(key)
        if wait_s == 0:
            self._left[key] = (self._now(key) - 1, self._clock())
            self._left.move_to_end(key)
            if len(self._left) > _MOST_BUCKETS:  # the one that was idle longest is full or nearly
                self._left.popitem(last=False)
        return wait_s

    def _now(self, key: str) -> float:
        left, moment = self._left.get(key, (self._most, self._clock()))
        return min(self._most, left + (self._clock() - moment) * self._per_s)


class RateLimit:
    """Finds out who calls, and refuses those who call too often (429).

    A token has a bucket of its own. All others share that of their address, which must not be
    empty for a token to be looked up at all: who guesses tokens is slowed down, too.
    """

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app = app
        self._buckets = Buckets(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with `state.identity`, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        key = _address(scope)
        wait_s = self._buckets.wait_s(key)
        if wait_s == 0:
            found = await identify(HTTPConnection(scope))
            scope.setdefault("state", {})["identity"] = found
            if isinstance(found, Caller) and found.token_id is not None:
                key = f"token {found.token_id}"
            wait_s = self._buckets.take(key)
        if wait_s == 0:
            return await self._app(scope, receive, send)
        error = RateLimitError(f"too many requests: come again in {wait_s} s", wait_s)
        await problem_response(error, scope["path"])(scope, receive, send)


class RefusedBody(HTTPException):
    """Stops whoever reads a body; FastAPI lets an HTTPException through, and wraps others."""

    def __init__(self, error: ServerError) -> None:
        super().__init__(error.status, str(error))
        self.error = error


class Bodies:
    """Refuses bodies that are too large (413), of another kind (415), or of nobody (401).

    A body is counted while it streams in, and of a caller who needs a token and has none nothing
    of it is read.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a body that is watched, or refuse it."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            return await self._app(scope, receive, send)
        limit = self._limit(scope)
        error: ServerError | None = None
        if length.isdecimal() and int(length) > limit:
            error = _too_large(limit)
        elif scope["method"] not in SAFE_METHODS:
            error = _other_type(scope, headers)
        if error is not None:
            return await problem_response(error, scope["path"])(scope, receive, send)
        await self._app(scope, _watched(scope, receive, limit), send)

    def _limit(self, scope: Scope) -> int:
        is_upload = (scope["method"], scope["path"]) == UPLOAD
        return self._settings.max_asset_bytes if is_upload else self._settings.max_body_bytes


def _watched(scope: Scope, receive: Receive, limit: int) -> Receive:
    size = 0

    async def watched() -> Message:
        nonlocal size
        identity = scope.get("state", {}).get("identity")
        if isinstance(identity, ServerError) and not is_public(scope):
            raise RefusedBody(identity)
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise RefusedBody(_too_large(limit))
        return message

    return watched


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the body may have at most {limit} bytes here", max_bytes=limit)


def _other_type(scope: Scope, headers: Headers) -> MediaTypeError | None:
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if (scope["method"], scope["path"]) == UPLOAD:
        allowed: tuple[str, ...] = (_BYTES,)
    elif scope["path"].startswith("/v1/"):
        allowed = (_JSON,)
    else:
        allowed = (_JSON, _FORM)
    if given in allowed:
        return None
    return MediaTypeError(f"Content-Type {given!r} is not taken here: {' or '.join(allowed)}")


def _address(scope: Scope) -> str:
    """Return the caller's address; of IPv6 the network, as one caller has many of its addresses."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
