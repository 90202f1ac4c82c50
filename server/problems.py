"""Errors as problem documents (RFC 9457): every one that a client can get."""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ServerError
from server.ids import new_id

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:accutune:problem:"
_SCHEMA = {"$ref": "#/components/schemas/Problem"}
_SLUGS = {
    HTTPStatus.BAD_REQUEST: "malformed",
    HTTPStatus.NOT_FOUND: "not-found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method-not-allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too-large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported-media-type",
}

_log = logging.getLogger(__name__)


def problem(
    status: int,
    slug: str,
    detail: str,
    instance: str | None = None,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """Return a problem document; `members` tell more, and give way to the standard ones."""
    document = {
        "type": _TYPE + slug,
        "title": slug.replace("-", " ").capitalize(),
        "status": int(status),
        "detail": detail,
        "instance": instance,
    }
    document |= {name: value for name, value in members.items() if name not in document}
    return Response(json.dumps(document), int(status), headers, MEDIA_TYPE)


def problem_response(error: ServerError, instance: str | None = None) -> Response:
    """Return the problem document of an error of the service."""
    return problem(error.status, error.slug, str(error), instance, error.headers, **error.details)


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return these errors as OpenAPI wants them in `responses`."""
    content = {MEDIA_TYPE: {"schema": _SCHEMA}}
    return {
        int(status): {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document."""
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_surprise)  # of the middleware outside of Boundary
    app.add_middleware(Boundary)


class Boundary:
    """Turns what nobody expected into a 500, inside the middleware that adds headers to it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; raise only where the response has begun already."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # the outermost boundary: a bug must not show its traceback
            if has_begun or scope["type"] != "http":
                raise
            await (await _on_surprise(Request(scope), error))(scope, receive, send)


def field_errors(errors: Sequence[Any], body: Any, below: str = "") -> list[dict[str, str]]:
    """Return pydantic's errors with a JSON pointer into the body, or the parameter's name.

    `below` is the pointer to what was validated, where that is a part of the body.
    """
    return [_field_error(error, body, below) for error in errors]


def _field_error(error: Mapping[str, Any], body: Any, below: str) -> dict[str, str]:
    place, detail = error["loc"], str(error["msg"]).removeprefix("Value error, ")
    if place and place[0] in ("query", "header", "path", "cookie"):
        return {"detail": detail, "in": str(place[0]), "parameter": ".".join(map(str, place[1:]))}
    if place and place[0] == "body":
        place = place[1:]
    return {"detail": detail, "pointer": below + _pointer(place, body, error["type"] == "missing")}


def _pointer(place: Sequence[Any], body: Any, is_missing: bool) -> str:
    """Return the JSON pointer (RFC 6901) of a place, without pydantic's names of union branches."""
    pointer = ""
    for depth, part in enumerate(place):
        if _has(body, part):
            body = body[part]
        elif not (is_missing and depth == len(place) - 1):
            continue
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer


def _has(body: Any, part: Any) -> bool:
    if isinstance(body, Mapping):
        return part in body
    return isinstance(body, list) and isinstance(part, int) and part < len(body)


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return await _on_surprise(request, error)
    return problem_response(error, request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    detail = str(error.detail)
    if status == HTTPStatus.NOT_FOUND:
        detail = f"nothing is at {request.url.path!r}: /openapi.json lists what there is"
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
        detail = f"{request.method} is not possible here: {headers['Allow']} can be asked for"
    slug = _SLUGS.get(status, status.phrase.lower().replace(" ", "-"))
    return problem(status, slug, detail, request.url.path, headers)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found, path = error.errors(), request.url.path
    if any(one["type"] == "json_invalid" for one in found):
        reason = found[0]["ctx"]["error"]
        text = f"the body is not JSON: {reason} at character {found[0]['loc'][-1]}"
        return problem(HTTPStatus.BAD_REQUEST, "malformed", text, path)
    if any(one["loc"][0] == "path" for one in found):
        return problem(HTTPStatus.NOT_FOUND, "not-found", f"nothing is at {path!r}", path)
    errors = field_errors(found, error.body)
    text = f"{len(errors)} of the values cannot be accepted: `errors` lists them"
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid", text, path, errors=errors)


async def _on_surprise(request: Request, error: Exception) -> Response:
    incident = new_id()
    _log.error("incident %s: %s %s", incident, request.method, request.url.path, exc_info=error)
    text = f"something went wrong in the service; its log tells more under {incident}"
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal-error",
        text,
        request.url.path,
        incident=incident,
    )


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes of this path; the router itself looks at the first only."""
    app: FastAPI = request.app
    path = request.url.path
    return sorted(
        {
            method
            for route in iter_route_contexts(app.router.routes)
            if route.path is not None and compile_path(route.path)[0].match(path)
            for method in route.methods or ()
        }
    )
